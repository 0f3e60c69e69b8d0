"""Who the phantom patients are: sex, age, diseases, studies, planted signs, labels and report sentences.

Diseases cause findings, so findings occur together as they do in a hospital: heart failure brings a large
heart, oedema and effusions; an operation brings devices and atelectasis. Prevalences are far above
CheXpert's for the rare findings (10 to 30 %), so that a test split of a few hundred images holds at least
50 positives of each.

Every patient draws from a stream of its own, seeded by (seed, patient number): patient 7 is the same
whether 10 or 10,000 patients are made, in one process or in many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from medsae_ray.labels import LABELS

FINDINGS = LABELS[1:]
"""The 13 findings with a visible sign; `No Finding` is the absence of all but Support Devices."""

CHRONIC = frozenset(
    {"Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Pleural Other", "Fracture"}
)
"""Findings that a patient keeps from one study to the next, at the same place."""

PREVALENCE_BASE = 0.03

# Disease: (probability among ill patients or per study, finding -> probability that the disease shows it).
CHRONIC_DISEASES: dict[str, tuple[float, dict[str, float]]] = {
    "heart failure": (
        0.27,
        {"Cardiomegaly": 0.85, "Edema": 0.65, "Pleural Effusion": 0.45, "Support Devices": 0.2},
    ),
    "tumour": (
        0.18,
        {"Lung Lesion": 0.95, "Pleural Effusion": 0.25, "Lung Opacity": 0.2, "Atelectasis": 0.15},
    ),
    "asbestosis": (0.18, {"Pleural Other": 0.95, "Pleural Effusion": 0.15, "Lung Lesion": 0.1}),
    "aortic disease": (0.19, {"Enlarged Cardiomediastinum": 0.95, "Cardiomegaly": 0.25}),
    "fall": (0.16, {"Fracture": 0.95, "Pneumothorax": 0.15, "Pleural Other": 0.1}),
}
ACUTE_DISEASES: dict[str, tuple[float, dict[str, float]]] = {
    "lobar infection": (0.19, {"Consolidation": 0.9, "Lung Opacity": 0.3, "Pleural Effusion": 0.2}),
    "bronchial infection": (0.2, {"Pneumonia": 0.9, "Lung Opacity": 0.35, "Atelectasis": 0.1}),
    "air leak": (0.17, {"Pneumothorax": 0.9, "Support Devices": 0.35}),
    "operation": (0.26, {"Support Devices": 0.8, "Atelectasis": 0.55, "Pleural Effusion": 0.25}),
    "haze": (0.16, {"Lung Opacity": 0.9, "Edema": 0.1}),
    "fluid": (0.1, {"Pleural Effusion": 0.9, "Edema": 0.2, "Atelectasis": 0.2}),
}

SENTENCES: dict[str, tuple[str, ...]] = {
    "No Finding": (
        "No acute cardiopulmonary abnormality.",
        "Heart size and lungs are normal.",
        "The lungs are clear.",
        "Normal chest radiograph.",
    ),
    "Enlarged Cardiomediastinum": (
        "The mediastinum is widened.",
        "Widening of the superior mediastinal contour.",
        "Enlarged cardiomediastinal silhouette.",
    ),
    "Cardiomegaly": (
        "The heart is enlarged.",
        "{Degree} cardiomegaly.",
        "The cardiac silhouette is enlarged.",
    ),
    "Lung Opacity": (
        "Hazy opacity in the {side} lung.",
        "Ill-defined ground-glass opacity on the {side}.",
        "There is a {degree} {side} lung opacity.",
    ),
    "Lung Lesion": (
        "Round nodule in the {side} lung.",
        "A well-defined {side} pulmonary nodule is seen.",
        "Nodular lesion of the {side} lung.",
    ),
    "Edema": (
        "{Degree} pulmonary edema.",
        "Perihilar haze with septal lines, in keeping with edema.",
        "Interstitial edema is present.",
    ),
    "Consolidation": (
        "Dense {side} lobar consolidation.",
        "Homogeneous consolidation of the {side} lung.",
        "There is a consolidated lobe on the {side}.",
    ),
    "Pneumonia": (
        "Patchy {side} airspace disease with air bronchograms, consistent with pneumonia.",
        "Multifocal {side} pneumonia.",
        "Findings of {side} bronchopneumonia.",
    ),
    "Atelectasis": (
        "Plate-like atelectasis at the {side} base.",
        "{Side} basal linear atelectasis with volume loss.",
        "Bands of {side} lower lobe atelectasis.",
    ),
    "Pneumothorax": (
        "{Degree} {side} pneumothorax.",
        "A {side} pleural line with absent lung markings beyond it.",
        "There is a {side} apical pneumothorax.",
    ),
    "Pleural Effusion": (
        "{Degree} {side} pleural effusion.",
        "Blunting of the {side} costophrenic angle by an effusion.",
        "{Side} pleural fluid with a meniscus.",
    ),
    "Pleural Other": (
        "Calcified pleural plaque along the {side} chest wall.",
        "{Side} pleural thickening.",
        "Lateral pleural thickening on the {side}.",
    ),
    "Fracture": (
        "Displaced {side} rib fracture.",
        "Healing fractures of the {side} ribs with callus.",
        "{Side} rib fractures are seen.",
    ),
    "Support Devices": (
        "Support devices are in place.",
        "Lines and tubes are unchanged in position.",
        "Medical devices project over the chest.",
    ),
}


class Sign(NamedTuple):
    """One planted sign. `stream` seeds its place and shape, so that all views of a study agree."""

    finding: str
    severity: float
    """In (0, 1]."""
    side: int
    """-1 the patient's right (left half of the image), 1 the patient's left, 0 both or the midline."""
    stream: tuple[int, ...]


@dataclass(frozen=True)
class PhantomStudy:
    """One visit of a phantom patient: what is there, what the labels say, which views were taken."""

    seed: int
    patient: int
    study: int
    sex: str
    """`Male` or `Female`."""
    age: int
    """Years, 18 to 90."""
    ap: bool
    """The frontal views are AP (bedside) rather than PA."""
    views: tuple[str, ...]
    """`frontal` or `lateral`, in the order of their numbers."""
    signs: tuple[Sign, ...]
    labels: tuple[float | None, ...]
    """The 14 labels in CheXpert's order: 1 present, 0 absent, -1 uncertain, None not mentioned."""
    report: str

    @property
    def findings(self) -> np.ndarray:
        """What is truly there: float32 [14], 1 present, 0 absent, in CheXpert's order."""
        present = {sign.finding for sign in self.signs}
        no_finding = not (present - {"Support Devices"})
        return np.array(
            [no_finding if name == "No Finding" else name in present for name in LABELS], np.float32
        )


def patient_studies(seed: int, patient: int) -> list[PhantomStudy]:
    """All studies of one patient (1 to 5), in the order of time."""
    rng = np.random.default_rng((seed, patient))
    sex = "Male" if rng.random() < 0.59 else "Female"
    age = int(np.clip(rng.normal(60, 17), 18, 88))
    ill = rng.random() < 0.76
    diseases = [
        shows for chance, shows in CHRONIC_DISEASES.values() if rng.random() < chance * (0.6 + age / 150)
    ]
    kept = _caused(rng, diseases if ill else [], PREVALENCE_BASE if ill else 0.0)
    chronic = {finding: rng.beta(2.2, 1.6) for finding in FINDINGS if finding in kept & CHRONIC}
    sides = {finding: int(rng.choice((-1, 1))) for finding in FINDINGS}
    n_studies = int(np.searchsorted([0.45, 0.72, 0.88, 0.96], rng.random())) + 1
    return [
        _study(rng, seed, patient, number, sex, age, ill, diseases, chronic, sides)
        for number in range(1, n_studies + 1)
    ]


def _caused(rng: np.random.Generator, diseases: list[dict[str, float]], base: float) -> set[str]:
    chances = dict.fromkeys(FINDINGS, base)
    for shows in diseases:
        for finding, chance in shows.items():
            chances[finding] = 1 - (1 - chances[finding]) * (1 - chance)
    return {finding for finding in FINDINGS if rng.random() < chances[finding]}


def _study(
    rng: np.random.Generator,
    seed: int,
    patient: int,
    number: int,
    sex: str,
    age: int,
    ill: bool,
    diseases: list[dict[str, float]],
    chronic: dict[str, float],
    sides: dict[str, int],
) -> PhantomStudy:
    acute = [shows for chance, shows in ACUTE_DISEASES.values() if rng.random() < chance]
    if ill:
        present = _caused(rng, diseases + acute, PREVALENCE_BASE) - CHRONIC
    else:
        present = {"Support Devices"} if rng.random() < 0.1 else set()
    signs = []
    for index, finding in enumerate(FINDINGS):
        stream: tuple[int, ...]
        draw, acute_side = rng.beta(2.2, 1.6), int(rng.choice((-1, 1)))
        if finding in chronic:
            severity, side, stream = (
                chronic[finding] + 0.15 * (draw - 0.5),
                sides[finding],
                (seed, patient, index),
            )
        elif finding in present:
            severity, side, stream = draw, acute_side, (seed, patient, number, index)
        else:
            continue
        if finding in {"Enlarged Cardiomediastinum", "Cardiomegaly", "Edema", "Support Devices"}:
            side = 0
        signs.append(Sign(finding, float(np.clip(0.1 + 0.9 * severity, 0.1, 1)), side, stream))
    devices = any(sign.finding == "Support Devices" for sign in signs)
    # The one planted confounder: bedside (AP) films are taken of patients with devices.
    ap = rng.random() < (0.88 if devices else 0.38)
    views = ["frontal"] * (2 if rng.random() < 0.05 else 1)
    if rng.random() < (0.06 if ap else 0.33):
        views.append("lateral")
    return PhantomStudy(
        seed=seed,
        patient=patient,
        study=number,
        sex=sex,
        age=min(age + (number - 1) // 2, 90),
        ap=bool(ap),
        views=tuple(views),
        signs=tuple(signs),
        labels=_labels(rng, signs),
        report=_report(rng, signs),
    )


def _labels(rng: np.random.Generator, signs: list[Sign]) -> tuple[float | None, ...]:
    """CheXpert-like: faint signs are often uncertain, absent findings mostly not mentioned."""
    severity = {sign.finding: sign.severity for sign in signs}
    labels: dict[str, float | None] = {}
    for finding in FINDINGS:
        chance = rng.random()
        if finding in severity:
            uncertain = 0.5 if severity[finding] < 0.3 else 0.04
            labels[finding] = -1.0 if chance < uncertain else 1.0
        else:
            labels[finding] = -1.0 if chance < 0.008 else 0.0 if chance < 0.2 else None
    if severity.keys() <= {"Support Devices"}:
        # As in CheXpert, a study called normal mentions no other finding but devices.
        for finding in FINDINGS:
            if labels[finding] == -1.0:
                labels[finding] = 1.0 if finding in severity else None
        return 1.0, *labels.values()
    return None, *labels.values()


def _report(rng: np.random.Generator, signs: list[Sign]) -> str:
    severity = {sign.finding: sign for sign in signs}
    sentences = []
    if severity.keys() <= {"Support Devices"}:
        sentences.append(str(rng.choice(SENTENCES["No Finding"])))
    for finding, sign in severity.items():
        side = {-1: "right", 1: "left", 0: "bilateral"}[sign.side]
        degree = "small" if sign.severity < 0.4 else "moderate" if sign.severity < 0.75 else "large"
        if finding in {"Cardiomegaly", "Edema"}:
            degree = {"small": "mild", "large": "severe"}.get(degree, degree)
        template = str(rng.choice(SENTENCES[finding]))
        sentences.append(
            template.format(side=side, Side=side.capitalize(), degree=degree, Degree=degree.capitalize())
        )
    rng.shuffle(sentences)
    return " ".join(sentences)
