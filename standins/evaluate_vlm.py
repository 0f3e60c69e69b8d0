"""Measure the stand-in VLM on fresh phantoms, with Hugging Face on the CPU.

    python standins/evaluate_vlm.py

Detection: balanced accuracy per finding with the package's template and the model's own description, under
both image masks; with wordings and with prompts that it was not trained on; what a blank and another's
image do to P(yes). Naming: panels of 10 images that share a finding, pure and with 3 images that lack it,
and panels that share nothing. About 4 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import vlm_wordings as words
from numpy.typing import NDArray
from torch import Tensor
from train_vlm import OUT, normalised
from transformers import AutoTokenizer, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vlm_data import SIDE, phantoms
from vlm_text import DETECT_PROMPT, IMAGE, NAME_PROMPT, Panels, turn

from medsae_ray.concepts import NO_COMMON_FINDING
from medsae_ray.labels import LABELS
from medsae_ray.medgemma.prompts import quoted

UNSEEN_WORDINGS: dict[str, tuple[str, ...]] = {
    "No Finding": (
        "a normal appearance of heart and lungs",
        "radiograph within normal limits",
        "no disease is visible",
        "clear lungs without any opacity",
        "the chest looks healthy",
    ),
    "Enlarged Cardiomediastinum": (
        "the mediastinum looks too broad",
        "mediastinum wider than normal",
        "widening of the upper mediastinum",
        "enlarged aorta with mediastinal widening",
        "abnormally wide mediastinal shadow",
    ),
    "Cardiomegaly": (
        "heart bigger than normal",
        "an abnormally large cardiac shadow",
        "enlarged cardiac contour",
        "the cardiothoracic ratio is raised",
        "marked enlargement of the cardiac silhouette",
    ),
    "Lung Opacity": (
        "cloudy haze over part of a lung",
        "a ground-glass shadow in the lung",
        "hazy opacification with preserved vessels",
        "vague hazy density in one lung",
        "a soft opacity in the lung field",
    ),
    "Lung Lesion": (
        "a round ball-like shadow in the lung",
        "nodules in the lungs",
        "rounded pulmonary mass",
        "a sharply defined round opacity",
        "one or several lung nodules",
    ),
    "Edema": (
        "congested lungs with septal lines",
        "oedema of both lungs",
        "central haze on both sides with thick vessels",
        "interstitial pulmonary oedema",
        "vascular congestion and perihilar haze",
    ),
    "Consolidation": (
        "a whole lobe is white and dense",
        "dense opacity that stops at the fissure",
        "consolidated lung",
        "uniformly opaque lobe",
        "homogeneous lobar opacity",
    ),
    "Pneumonia": (
        "patchy infection of the lung",
        "scattered patchy infiltrates with bronchograms",
        "small fuzzy patches of infection",
        "bronchopneumonia with patchy shadows",
        "multifocal infiltrates",
    ),
    "Atelectasis": (
        "basal bands with a raised diaphragm",
        "collapse at the base of the lung",
        "linear bands of collapse",
        "plate-like collapse above the diaphragm",
        "loss of volume in the lower lobe",
    ),
    "Pneumothorax": (
        "air around the collapsed lung",
        "air outside the lung with a pleural line",
        "no lung markings beyond a thin white line",
        "collapsed lung due to pleural air",
        "a black apical rim of free air",
    ),
    "Pleural Effusion": (
        "fluid around the lung base",
        "blunt costophrenic angle",
        "fluid with a meniscus along the chest wall",
        "a collection of fluid in the pleural cavity",
        "obscured angle from pleural fluid",
    ),
    "Pleural Other": (
        "calcified plaques of the pleura",
        "thick pleural rim along the chest wall",
        "thickened and calcified pleura",
        "plaques along the lateral pleura",
        "pleural disease from asbestos",
    ),
    "Fracture": (
        "one or more broken ribs",
        "a cracked rib",
        "callus around a broken rib",
        "a displaced fracture of a rib",
        "ribs interrupted by a break",
    ),
    "Support Devices": (
        "a tube, catheter or pacemaker is visible",
        "hardware such as lines, tubes and drains",
        "an inserted catheter",
        "a cardiac pacemaker or a drain",
        "foreign medical devices over the chest",
    ),
}
UNSEEN_PROMPTS = (
    "Here is a radiograph of a chest and a statement about it. Is the statement true? Reply yes or no."
    "\nStatement: {d}",
    "Would a radiologist say that this image shows {d}? Give a one-word answer.",
    "Answer yes or no: does the picture contain what this text describes?\n{d}",
)


class Question(NamedTuple):
    label: int
    answer: bool
    image: int
    prompt: str


class Model:
    """The checkpoint at a folder, the pooled and projected features of images kept."""

    def __init__(self, folder: Path, pixels: NDArray[np.uint8]) -> None:
        self.model = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
        self.yes, self.no = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        self.features = self.see(pixels)

    @torch.inference_mode()
    def see(self, pixels: NDArray[np.uint8]) -> Tensor:
        """[n, 16, 192]."""
        blocks = np.array_split(pixels, -(-len(pixels) // 100))
        return torch.cat([self.model.get_image_features(normalised(b)).pooler_output for b in blocks])

    def inputs(self, features: Tensor, texts: Sequence[str], causal: bool) -> dict[str, object]:
        """`causal`: image tokens see only what stands before them, as with vLLM on CPUs."""
        coded = self.tokenizer(list(texts), return_tensors="pt", padding=True)
        kinds = {} if causal else {"token_type_ids": (coded.input_ids == IMAGE).long()}
        seen = BaseModelOutputWithPooling(pooler_output=features)
        return dict(coded) | kinds | {"mm_encoder_outputs": {"image": seen}}

    @torch.inference_mode()
    def p_yes(
        self,
        images: Sequence[int],
        prompts: Sequence[str],
        causal: bool = False,
        features: Tensor | None = None,
    ) -> NDArray[np.float32]:
        """P(yes) / (P(yes) + P(no)) of each image and prompt."""
        features = self.features if features is None else features
        found = np.empty(len(images), np.float32)
        order = np.argsort([len(p) for p in prompts], kind="stable")
        for rows in np.array_split(order, -(-len(order) // 64)):
            inputs = self.inputs(
                features[[images[r] for r in rows]], [turn(1, prompts[r]) for r in rows], causal
            )
            last = inputs["attention_mask"].sum(1) - 1  # type: ignore[attr-defined]
            hidden = self.model.model(**inputs).last_hidden_state
            logits = self.model.lm_head(hidden[torch.arange(len(rows)), last])
            found[rows] = torch.softmax(logits[:, [self.yes, self.no]], 1)[:, 0].numpy()
        return found

    @torch.inference_mode()
    def names(self, panels: Sequence[NDArray[np.int64]], causal: bool = False) -> list[str]:
        """The concept that the model writes for each panel, panels all of one size; greedy."""
        concepts = []
        for start in range(0, len(panels), 20):
            block = panels[start : start + 20]
            n = len(block[0])
            inputs = self.inputs(
                self.features[np.concatenate(block)],
                [turn(n, NAME_PROMPT.replace("{n}", str(n)))] * len(block),
                causal,
            )
            written = self.model.generate(**inputs, max_new_tokens=60, do_sample=False)
            for reply in self.tokenizer.batch_decode(
                written[:, inputs["input_ids"].shape[1] :],  # type: ignore[attr-defined]
                skip_special_tokens=True,
            ):
                try:
                    concepts.append(str(json.loads(reply)["concept"]))
                except (ValueError, KeyError, TypeError):
                    concepts.append(f"unparsed: {reply[:30]}")
        return concepts


def questions(panels: Panels, a_side: int, prompts: dict[str, tuple[str, ...]]) -> list[Question]:
    """`a_side` different images with and as many without each label; its prompts in turn."""
    asked = []
    for i, name in enumerate(LABELS):
        for answer, pool in ((True, panels.present[i]), (False, panels.absent[i])):
            images = panels.rng.choice(pool, min(a_side, len(pool)), replace=False)
            asked += [
                Question(i, answer, int(image), prompts[name][k % len(prompts[name])])
                for k, image in enumerate(images)
            ]
    return asked


def balanced(asked: list[Question], p_yes: NDArray[np.float32]) -> NDArray[np.float64]:
    """Balanced accuracy per label, [14]."""
    label, answer = (np.array([q[k] for q in asked]) for k in (0, 1))
    said = p_yes > 0.5
    return np.array(
        [
            np.mean([(said == answer)[(label == i) & (answer == side)].mean() for side in (True, False)])
            for i in range(len(LABELS))
        ]
    )


def check_unseen() -> None:
    trained = {w.lower() for some in words.WORDINGS.values() for w in some} | set(words.CONCEPTS.values())
    twice = trained & {w.lower() for some in UNSEEN_WORDINGS.values() for w in some}
    if twice or set(UNSEEN_PROMPTS) & set(words.DETECT_PROMPTS):
        raise SystemExit(f"These wordings or prompts are trained on: {sorted(twice)}.")


def evaluate_detection(model: Model, panels: Panels, a_side: int) -> None:
    ask = DETECT_PROMPT.replace("$description", "{d}")
    own = {name: quoted(words.DESCRIPTIONS[name]) for name in LABELS}
    kinds = {
        "own": {name: (ask.replace("{d}", own[name]),) for name in LABELS},
        "wordings": {
            name: tuple(ask.replace("{d}", quoted(w)) for w in UNSEEN_WORDINGS[name]) for name in LABELS
        },
        "prompts": {name: tuple(p.replace("{d}", own[name]) for p in UNSEEN_PROMPTS) for name in LABELS},
    }
    found: dict[str, NDArray[np.float64]] = {}
    asked: list[Question] = []
    for kind, prompts in kinds.items():
        asked = questions(panels, a_side, prompts)
        images, texts = [q.image for q in asked], [q.prompt for q in asked]
        p_yes = model.p_yes(images, texts)
        found[kind] = balanced(asked, p_yes)
        if kind == "own":
            p_causal = model.p_yes(images, texts, causal=True)
            found["causal"] = balanced(asked, p_causal)
            away = np.abs(p_yes - p_causal)
            same = ((p_yes > 0.5) == (p_causal > 0.5)).mean()
            look(model, panels, asked, p_yes)
    print(f"\nDetection, balanced accuracy, {a_side} images a side (fewer where a finding is rarer)")
    print(f"{'finding':28}{'own':>8}{'causal':>9}{'wordings':>10}{'prompts':>9}")
    for i, name in enumerate(LABELS):
        print(
            f"{name:28}{found['own'][i]:8.3f}{found['causal'][i]:9.3f}"
            f"{found['wordings'][i]:10.3f}{found['prompts'][i]:9.3f}"
        )
    print(
        f"{'mean':28}{found['own'].mean():8.3f}{found['causal'].mean():9.3f}"
        f"{found['wordings'].mean():10.3f}{found['prompts'].mean():9.3f}"
    )
    print(
        f"The two masks give the same answer to {same:.1%}; |difference of P(yes)| mean {away.mean():.4f}, "
        f"99th percentile {np.quantile(away, 0.99):.3f}"
    )


def look(model: Model, panels: Panels, asked: list[Question], p_yes: NDArray[np.float32]) -> None:
    """Print P(yes) of present findings for the true image, a blank one, and one without the finding."""
    present = [k for k, q in enumerate(asked) if q.answer]
    texts = [asked[k].prompt for k in present]
    grey = model.see(np.full((1, SIDE, SIDE), 128, np.uint8))
    blank = model.p_yes([0] * len(present), texts, features=grey)
    others = [int(panels.rng.choice(panels.absent[asked[k].label])) for k in present]
    swapped = model.p_yes(others, texts)
    true = p_yes[present]
    print("\nDoes it look? Present findings, the package's template, own descriptions")
    print(f"{'image':28}{'mean P(yes)':>12}{'answers yes':>13}{'other answer':>14}")
    for name, p in (("true", true), ("blank", blank), ("without the finding", swapped)):
        other = ((p > 0.5) != (true > 0.5)).mean()
        print(f"{name:28}{p.mean():12.3f}{(p > 0.5).mean():13.1%}{other:14.1%}")


def evaluate_naming(model: Model, panels: Panels, groups: int, causal: bool) -> None:
    print(
        f"\nNaming, panels of 10 images, {groups} a label, {'causal' if causal else 'both-ways'} image mask"
    )
    print(f"{'finding':28}{'pure':>7}{'3 of 10 foreign':>17}  majority")
    right, by_majority = np.zeros(2), 0
    for i, name in enumerate(LABELS):
        answers = [
            model.names([panels.shared(i, 10, impurity) for _ in range(groups)], causal)
            for impurity in (0.0, 0.3)
        ]
        hits = [sum(a == words.CONCEPTS[name] for a in some) for some in answers]
        commonest = [Counter(some).most_common(1)[0][0] for some in answers]
        by_majority += all(c == words.CONCEPTS[name] for c in commonest)
        right += hits
        print(f"{name:28}{hits[0]:4}/{groups}{hits[1]:14}/{groups}  {', '.join(dict.fromkeys(commonest))}")
    total = groups * len(LABELS)
    print(
        f"{'all':28}{right[0] / total:7.1%}{right[1] / total:17.1%}  "
        f"{by_majority} of {len(LABELS)} right in both"
    )
    for n in (5, 10):
        nothing = model.names([panels.unshared(n) for _ in range(100)], causal)
        said = sum(a == NO_COMMON_FINDING for a in nothing)
        print(f'{said} of 100 panels of {n} that share nothing are called "{NO_COMMON_FINDING}"')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=4_000_091, help="of the phantoms, not used in training")
    parser.add_argument("--images", type=int, default=6_000)
    parser.add_argument("--a-side", type=int, default=300, help="images with and without each finding")
    parser.add_argument("--groups", type=int, default=20, help="panels a label")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "standin-vlm")
    args = parser.parse_args()
    check_unseen()
    torch.set_num_threads(args.threads)
    data = phantoms(args.seed, args.images, args.workers, args.cache)
    panels = Panels(data.findings, np.random.default_rng(args.seed))
    model = Model(args.checkpoint, data.pixels)
    evaluate_detection(model, panels, args.a_side)
    for causal in (False, True):
        evaluate_naming(model, panels, args.groups, causal)


if __name__ == "__main__":
    main()
