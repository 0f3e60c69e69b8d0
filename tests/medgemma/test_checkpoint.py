"""The check of a checkpoint: what passes, and the sentence for each defect, before any engine starts."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layout import gemma_tokenizer, write_medgemma_layout
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from medsae_ray.errors import InputError
from medsae_ray.medgemma.checkpoint import check_checkpoint

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBEDDINGS = "language_model.model.embed_tokens.weight"
PATCHES = "vision_tower.vision_model.embeddings.patch_embedding.weight"
PROJECTION = "multi_modal_projector.mm_input_projection_weight"


@pytest.fixture(scope="module", autouse=True)
def _warm(layout: Path) -> None:
    """transformers is imported once; the time limits below are those of the check itself."""
    check_checkpoint(str(layout), download=False)


@pytest.fixture
def copy(layout: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(layout, tmp_path / "medgemma"))


def refusal(folder: Path | str, download: bool = False) -> str:
    """The sentence with which a checkpoint is refused, within two seconds of work."""
    start = time.process_time()  # a machine that is busy with other things is not the check's fault
    with pytest.raises(InputError) as caught:
        check_checkpoint(str(folder), download)
    assert time.process_time() - start < 2
    told = str(caught.value)
    assert told.endswith(".")
    assert "\n" not in told
    return told


Defect = Callable[[Path], Any]


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Defect:
    """A defect: `change` applied to a JSON file."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def weights(change: Callable[[dict[str, Any]], Any]) -> Defect:
    """A defect: `change` applied to all tensors, which are then stored as one file without an index."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / FIRST) | load_file(folder / SECOND)
        change(tensors)
        for name in (FIRST, SECOND, INDEX):
            (folder / name).unlink()
        save_file(tensors, folder / "model.safetensors")

    return apply


def rename(old: str, new: str) -> Defect:
    def change(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if key.startswith(old)]:
            tensors[new + key.removeprefix(old)] = tensors.pop(key)

    return weights(change)


def both(*defects: Defect) -> Defect:
    return lambda folder: [defect(folder) for defect in defects]


def remove(*names: str) -> Defect:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def write(name: str, content: bytes) -> Defect:
    return lambda folder: (folder / name).write_bytes(content)


def replace(name: str, old: str, new: str) -> Defect:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


def truncate(folder: Path) -> None:
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[: len(content) // 2])


def only_pickles(folder: Path) -> None:
    for name in (FIRST, SECOND, INDEX):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def split_no(folder: Path) -> None:
    """A tokenizer that has no piece `no`."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].remove(["n", "o"])
    (folder / "tokenizer.json").write_text(json.dumps(content))


def join_processor_files(folder: Path) -> None:
    """One processor_config.json, as transformers 5 writes it."""
    images = json.loads((folder / "preprocessor_config.json").read_text())
    edit("processor_config.json", put("image_processor", images))(folder)
    (folder / "preprocessor_config.json").unlink()


def text_only(config: dict[str, Any]) -> None:
    text = config.pop("text_config")
    config.clear()
    config.update(text, architectures=["Gemma3ForCausalLM"])


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(name)


def put(*path: Any) -> Callable[[dict[str, Any]], Any]:
    """A change: the last of `path` put under the keys before it."""

    def change(content: dict[str, Any]) -> None:
        *inner, key, value = path
        for name in inner:
            content = content[name]
        content[key] = value

    return change


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4961251752\n"
DEFECTS: dict[str, tuple[Defect, tuple[str, ...]]] = {
    "no config": (remove("config.json"), ("holds no config.json",)),
    "config not JSON": (write("config.json", b'{"model_type": '), ("config.json is not JSON",)),
    "config a pointer": (write("config.json", LFS), ("config.json", "Git LFS pointer")),
    "config a list": (write("config.json", b"[]"), ("config.json", "no JSON object")),
    "text only": (edit("config.json", text_only), ("Gemma3ForCausalLM", "text-only", "medgemma-4b-it")),
    "no vision_config": (edit("config.json", drop("vision_config")), ("config.json", "without a vision")),
    "another architecture": (
        edit("config.json", put("architectures", ["LlavaForConditionalGeneration"])),
        ("LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"),
    ),
    "wrong type in config": (
        edit("config.json", put("text_config", "hidden_size", "large")),
        ("config.json", "hidden_size"),
    ),
    "heads do not divide": (
        edit("config.json", put("text_config", "num_attention_heads", 7)),
        ("config.json", "attention heads (7)"),
    ),
    "remote code": (
        edit("config.json", put("auto_map", {"AutoModel": "modeling.Model"})),
        ("config.json", "auto_map", "never"),
    ),
    "remote code in the tokenizer": (
        edit("tokenizer_config.json", put("auto_map", {"AutoTokenizer": ["t.T", None]})),
        ("tokenizer_config.json", "auto_map"),
    ),
    "missing shard": (remove(SECOND), ("lacks " + SECOND, "1 of the 2 weight files", INDEX)),
    "index not JSON": (write(INDEX, b"<html>"), (INDEX + " is not JSON",)),
    "index without a map": (edit(INDEX, drop("weight_map")), (INDEX, "weight_map")),
    "truncated shard": (truncate, (SECOND, "truncated", "bytes")),
    "shard a pointer": (write(FIRST, LFS), (FIRST, "Git LFS pointer", "git lfs pull")),
    "shard empty": (write(FIRST, b""), (FIRST, "truncated")),
    "pickles": (only_pickles, ("pytorch_model.bin", "pickle", "safetensors")),
    "no weights": (remove(FIRST, SECOND, INDEX), ("holds no weights",)),
    "no vision tower": (
        weights(lambda t: [t.pop(key) for key in list(t) if key.startswith("vision_tower.")]),
        ("lacks the whole vision tower",),
    ),
    "no projector": (
        weights(lambda t: [t.pop(key) for key in list(t) if key.startswith("multi_modal")]),
        ("lacks the whole projector",),
    ),
    "no language model": (
        weights(lambda t: [t.pop(key) for key in list(t) if key.startswith("language_model.")]),
        ("lacks the whole language model",),
    ),
    "one tensor missing": (
        weights(drop("language_model.model.layers.2.mlp.up_proj.weight")),
        ("lacks 1 of the 93 tensors of the language model", "layers.2.mlp.up_proj.weight"),
    ),
    "a surplus layer": (
        weights(lambda t: t.update({"language_model.model.layers.7.mlp.up_proj.weight": t[EMBEDDINGS] + 1})),
        ("language_model.model.layers.7.mlp.up_proj.weight", "does not have"),
    ),
    "fewer rows than the vocabulary": (
        weights(lambda t: t.update({EMBEDDINGS: t[EMBEDDINGS][:-64].contiguous()})),
        (EMBEDDINGS, "[576, 96]", "[640, 96]"),
    ),
    "another patch size": (
        weights(lambda t: t.update({PATCHES: t[PATCHES][..., :8, :8].contiguous()})),
        (PATCHES, "[64, 3, 8, 8]", "[64, 3, 14, 14]"),
    ),
    "another projector": (
        weights(lambda t: t.update({PROJECTION: t[PROJECTION].T.contiguous()})),
        (PROJECTION, "[96, 64]", "[64, 96]"),
    ),
    "vision width": (
        edit("config.json", put("vision_config", "hidden_size", 128)),
        ("has shape [64, 96]", "asks for [128, 96]"),
    ),
    "image size of the weights": (
        both(
            edit("config.json", put("vision_config", "image_size", 112)),
            edit("preprocessor_config.json", put("size", {"height": 112, "width": 112})),
        ),
        ("position_embedding.weight", "[16, 64]", "[64, 64]"),
    ),
    "integers": (
        weights(lambda t: t.update({PROJECTION: t[PROJECTION].char()})),
        (PROJECTION, "I8", "quantization_config"),
    ),
    "tower named as transformers 5": (
        rename("vision_tower.vision_model.", "vision_tower."),
        ("vision_tower.embeddings", "rename", "vision_tower.vision_model"),
    ),
    "tower named so below model": (
        rename("vision_tower.vision_model.", "model.vision_tower."),
        ("vision_tower.embeddings", "rename"),
    ),
    "untied without a head": (
        both(
            edit("config.json", put("tie_word_embeddings", False)),
            edit("config.json", put("text_config", "tie_word_embeddings", False)),
        ),
        ("language model", "lm_head"),
    ),
    "processor of another image size": (
        edit("preprocessor_config.json", put("size", {"height": 896, "width": 896})),
        ("preprocessor_config.json", "896", "image_size 56"),
    ),
    "processor without a size": (
        edit("preprocessor_config.json", drop("size")),
        ("preprocessor_config.json", "224", "image_size 56"),
    ),
    "processor of another model": (
        edit("preprocessor_config.json", put("image_processor_type", "SiglipImageProcessor")),
        ("preprocessor_config.json", "SiglipImageProcessor"),
    ),
    "no processor": (remove("preprocessor_config.json"), ("preprocessor_config.json",)),
    "another sequence length": (
        edit("processor_config.json", put("image_seq_length", 256)),
        ("processor_config.json", "image_seq_length is 256", "mm_tokens_per_image 4"),
    ),
    "no square": (
        edit("config.json", put("mm_tokens_per_image", 8)),
        ("config.json", "4 x 4", "mm_tokens_per_image 8"),
    ),
    "grid does not pool": (
        edit("config.json", put("mm_tokens_per_image", 9)),
        ("config.json", "4 x 4", "mm_tokens_per_image 9"),
    ),
    "patches do not fit": (
        edit("config.json", put("vision_config", "patch_size", 16)),
        ("config.json", "3.5 x 3.5"),
    ),
    "no tokenizer": (remove("tokenizer.json"), ("holds no tokenizer.json",)),
    "no tokenizer settings": (remove("tokenizer_config.json"), ("holds no tokenizer_config.json",)),
    "damaged tokenizer": (write("tokenizer.json", b"{}"), ("tokenizer.json", "cannot be read")),
    "no chat template": (remove("chat_template.jinja", "chat_template.json"), ("no chat template", "-it")),
    "template without images": (
        both(*(replace(f"chat_template.{end}", "<start_of_image>", "") for end in ("json", "jinja"))),
        ("chat template", "<start_of_image>"),
    ),
    "failing template": (
        both(
            write("chat_template.jinja", b"{{ raise_exception('no images') }}"), remove("chat_template.json")
        ),
        ("chat template fails",),
    ),
    "no image token": (
        replace("tokenizer.json", "<start_of_image>", "<picture>"),
        ("<start_of_image>",),
    ),
    "image token of another id": (
        edit("config.json", put("image_token_index", 3)),
        ("<image_soft_token>", "image_token_index 3"),
    ),
    "vocabulary too small": (
        edit("config.json", put("text_config", "vocab_size", 64)),
        (EMBEDDINGS, "[640, 96]", "[64, 96]"),
    ),
    "no single token": (split_no, ("'no' is 2 tokens", "tokenizer.json")),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_has_its_sentence(copy: Path, name: str) -> None:
    defect, words = DEFECTS[name]
    defect(copy)
    told = refusal(copy)
    for word in words:
        assert word in told


def test_the_layout_passes(layout: Path) -> None:
    found = check_checkpoint(str(layout), download=False)
    config = json.loads((layout / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(layout)
    model = AutoModelForImageTextToText.from_pretrained(layout)
    assert found.path == str(layout)
    assert not found.stand_in
    assert (found.image_size, found.image_tokens, found.max_positions) == (56, 4, 131072)
    assert [found.yes_ids[0], found.no_ids[0]] == tokenizer.convert_tokens_to_ids(["yes", "no"])
    assert found.n_parameters == sum(p.numel() for p in model.parameters())
    assert config["text_config"]["vocab_size"] % 64 == 0


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(weights(lambda t: None), id="one file"),
        pytest.param(
            rename("language_model.model.", "model.language_model."),
            id="language model named as transformers saves it",
        ),
        pytest.param(
            weights(lambda t: t.update({"lm_head.weight": t[EMBEDDINGS].clone()})), id="a tied head, stored"
        ),
        pytest.param(
            weights(lambda t: t.update({"vision_tower.vision_model.head.probe": t[PROJECTION] + 1})),
            id="a pooling head that nobody reads",
        ),
        pytest.param(
            join_processor_files,
            id="one processor file",
        ),
        pytest.param(
            both(
                edit("config.json", put("quantization_config", {"quant_method": "compressed-tensors"})),
                rename(
                    "language_model.model.layers.0.mlp.up_proj.", "language_model.model.layers.0.mlp.packed."
                ),
            ),
            id="quantised",
        ),
    ],
)
def test_other_layouts_that_the_engine_reads_pass(copy: Path, change: Callable[[Path], Any]) -> None:
    change(copy)
    assert check_checkpoint(str(copy), download=False).image_size == 56


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weights", weights(lambda t: t[PROJECTION].view(-1)[0].add_(1))),
        (
            "template",
            replace("chat_template.jinja", "trim", "trim "),
        ),
        ("tokenizer", edit("tokenizer_config.json", put("model_max_length", 8192))),
        ("config", edit("config.json", put("text_config", "rms_norm_eps", 1e-5))),
        ("processor", edit("preprocessor_config.json", put("resample", 3))),
    ],
)
def test_the_digest_follows_the_content(
    layout: Path, copy: Path, name: str, change: Callable[[Path], Any]
) -> None:
    before = check_checkpoint(str(copy), download=False).digest
    assert before == check_checkpoint(str(layout), download=False).digest  # not the folder's name, nor times
    (copy / "README.md").write_text("notes")
    assert before == check_checkpoint(str(copy), download=False).digest
    change(copy)
    assert before != check_checkpoint(str(copy), download=False).digest


def test_large_weights_are_told_apart_by_header_and_ends(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medsae_ray.medgemma.checkpoint._SMALL", 100_000)
    monkeypatch.setattr("medsae_ray.medgemma.checkpoint._MIB", 1_000)
    seen = {check_checkpoint(str(copy), download=False).digest}
    content = (copy / SECOND).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for position in (header + 10, len(content) - 10):
        changed = bytearray(content)
        changed[position] ^= 1
        (copy / SECOND).write_bytes(changed)
        seen.add(check_checkpoint(str(copy), download=False).digest)
    assert len(seen) == 3


def test_a_stand_in_says_so(copy: Path) -> None:
    edit("config.json", put("medsae_stand_in", True))(copy)
    assert check_checkpoint(str(copy), download=False).stand_in


def test_names_that_are_nowhere(layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "does not exist" in refusal(tmp_path / "absent")
    assert "is a file" in refusal(layout / "config.json")
    told = refusal("google/medgemma-4b-it")
    assert "accept the terms at https://huggingface.co/google/medgemma-4b-it" in told
    assert "hf download google/medgemma-4b-it" in told
    assert "--medgemma.download true" in told


def test_a_hub_name_is_found_in_the_cache(
    layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--google--medgemma-4b-it"
    commit = "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(layout, cached / "snapshots" / commit)
    found = check_checkpoint("google/medgemma-4b-it", download=False)
    assert found == check_checkpoint(str(layout), download=False)._replace(path=found.path)
    (cached / "snapshots" / commit / SECOND).unlink()
    assert SECOND in refusal("google/medgemma-4b-it")


def test_a_check_loads_no_engine(layout: Path) -> None:
    code = (
        "import sys; from medsae_ray.medgemma.checkpoint import check_checkpoint;"
        f"check_checkpoint({str(layout)!r}, False); print('vllm' in sys.modules, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_layout_is_seeded(layout: Path, tmp_path: Path) -> None:
    again = write_medgemma_layout(tmp_path / "again", seed=0)
    other = write_medgemma_layout(tmp_path / "other", seed=1)
    digests = [check_checkpoint(str(folder), download=False).digest for folder in (layout, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_the_small_tokenizer_is_lossless() -> None:
    tokenizer = gemma_tokenizer()
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = "".join(map(chr, rng.choice([*range(32, 127), 10, 233, 8212, 9731], size=30)))
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
