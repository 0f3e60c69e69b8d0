"""The stand-in VLM as shipped: MedGemma's layout, labelled a stand-in, and it looks at the pixels."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, Gemma3ForConditionalGeneration

from medsae_ray.labels import LABELS
from medsae_ray.medgemma.prompts import MAX_CONCEPT, MAX_DESCRIPTION, Task, chat_prompt, load_template
from medsae_ray.radiographs.phantom import PHANTOM_VERSION, sample_images

SHIPPED = Path(str(files("medsae_ray.medgemma") / "standin"))
CLEAR = {
    "Cardiomegaly": "The heart is enlarged.",
    "Pleural Effusion": "pleural fluid with a blunted costophrenic angle",
    "Support Devices": "lines and tubes",
    "Edema": "pulmonary edema",
    "No Finding": "normal chest radiograph",
}
A_SIDE = 12


class Asked:
    """The checkpoint behind Hugging Face's processor, as anyone would load it."""

    def __init__(self) -> None:
        self.processor = AutoProcessor.from_pretrained(SHIPPED)
        self.model, self.loading = Gemma3ForConditionalGeneration.from_pretrained(
            SHIPPED, dtype=torch.float32, output_loading_info=True
        )
        self.model.eval()
        self.tokenizer = self.processor.tokenizer

    def inputs(self, task: Task, images: list[Image.Image], description: str = "") -> dict[str, torch.Tensor]:
        row = {
            "image_ids": [""] * len(images),
            "uris": [""] * len(images),
            "n_contrast": 0,
            "concept": None,
            "description": description,
        }
        return self.processor(
            text=chat_prompt(self.tokenizer, task.parts(row)), images=images, return_tensors="pt"
        )

    @torch.inference_mode()
    def p_yes(self, image: Image.Image, description: str) -> float:
        inputs = self.inputs(Task("detect", load_template("detect", None), 1, 1), [image], description)
        logits = self.model(**{k: v for k, v in inputs.items() if k != "num_crops"}).logits[0, -1]
        return float(logits[self.tokenizer.convert_tokens_to_ids(["yes", "no"])].softmax(0)[0])

    @torch.inference_mode()
    def name(self, images: list[Image.Image]) -> str:
        inputs = self.inputs(Task("name", load_template("name", None), 200, len(images)), images)
        inputs.pop("num_crops", None)
        written = self.model.generate(**inputs, max_new_tokens=80, do_sample=False)
        return self.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def asked() -> Asked:
    return Asked()


@pytest.fixture(scope="module")
def phantoms() -> tuple[list[Image.Image], np.ndarray]:
    pixels, findings, _ = sample_images(4_000_123, 1, 240)
    return [Image.fromarray(image) for image in pixels], findings > 0


def test_it_is_labelled_small_and_laid_out_as_medgemma(asked: Asked) -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 9_000_000
    assert json.loads((SHIPPED / "config.json").read_text())["medsae_stand_in"] is True
    with safe_open(SHIPPED / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        prefixes = {".".join(key.split(".")[:2]) for key in file.keys()}  # noqa: SIM118
    assert metadata["stand_in"] == "true"
    assert int(metadata["phantom_version"]) == PHANTOM_VERSION, "train the stand-in VLM again"
    assert metadata["training"].startswith("python standins/train_vlm.py")
    assert int(metadata["seed"]) >= 1_000_000
    assert dtypes == {"BF16"}
    assert prefixes == {
        "language_model.model",
        "multi_modal_projector.mm_input_projection_weight",
        "multi_modal_projector.mm_soft_emb_norm",
        "vision_tower.vision_model",
    }
    assert not any(asked.loading.values())


def test_tokenizer_holds_gemmas_tokens(asked: Asked) -> None:
    for text in ("yes", "no", "\n", "\n\n", "\n\n\n", "\n\n\n\n", "<start_of_turn>", "<end_of_turn>"):
        assert len(asked.tokenizer.encode(text, add_special_tokens=False)) == 1, repr(text)
    inputs = asked.inputs(
        Task("name", load_template("name", None), 1, 2),
        [Image.new("L", (300, 200)), Image.new("RGB", (9, 9))],
    )
    assert inputs["pixel_values"].shape == (2, 3, 112, 112)
    assert int((inputs["input_ids"] == asked.model.config.image_token_id).sum()) == 2 * 16
    assert int((inputs["input_ids"] == asked.tokenizer.bos_token_id).sum()) == 1
    written = asked.tokenizer.decode(inputs["input_ids"][0])
    assert written.startswith("<bos><start_of_turn>user\n")
    assert written.endswith('"no common finding".<end_of_turn>\n<start_of_turn>model\n')


def test_detection_comes_from_the_pixels(
    asked: Asked, phantoms: tuple[list[Image.Image], np.ndarray]
) -> None:
    images, findings = phantoms
    blank = Image.new("L", (224, 224), 128)
    right, moved_by_blank = [], []
    for name, description in CLEAR.items():
        column = findings[:, LABELS.index(name)]
        present, absent = (np.flatnonzero(column == side)[:A_SIDE] for side in (True, False))
        with_it = [asked.p_yes(images[i], description) for i in present]
        without = [asked.p_yes(images[i], description) for i in absent]
        assert np.mean(with_it) > np.mean(without) + 0.5, name
        right += [p > 0.5 for p in with_it] + [p < 0.5 for p in without]
        moved_by_blank += [abs(p - asked.p_yes(blank, description)) > 0.3 for p in with_it]
    assert np.mean(right) > 0.85
    assert np.mean(moved_by_blank) > 0.5


def test_a_panel_is_named_by_what_it_shares(
    asked: Asked, phantoms: tuple[list[Image.Image], np.ndarray]
) -> None:
    images, findings = phantoms
    named = {"Cardiomegaly": "cardiomegaly", "No Finding": "normal chest radiograph"}
    for label, concept in named.items():
        rows = np.flatnonzero(findings[:, LABELS.index(label)])[:10]
        reply = json.loads(asked.name([images[i] for i in rows]))
        assert reply["concept"] == concept
        assert 0 < len(reply["concept"]) <= MAX_CONCEPT
        assert 0 < len(reply["description"]) <= MAX_DESCRIPTION
    alone = [np.flatnonzero(findings[:, i] & (findings.sum(1) == 1))[:1] for i in range(1, len(LABELS))]
    mixed = np.concatenate(alone)
    assert len(mixed) >= 10
    assert json.loads(asked.name([images[i] for i in mixed]))["concept"] == "no common finding"
