"""When two names mean the same finding: a synonym table onto CheXpert's 14 labels.

Names come from a vision-language model and are free text. `canonical` maps what is known onto a label and
tidies the rest, so that two names can be compared; it is a comparison of words, no radiologist's judgement.
"""

from __future__ import annotations

import re
import unicodedata

from medsae_ray.labels import LABELS

NO_COMMON_FINDING = "no common finding"
"""The concept of a panel whose images share nothing."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "No Finding": (
        "normal",
        "normal chest",
        "normal chest radiograph",
        "normal chest x-ray",
        "normal radiograph",
        "normal study",
        "normal lungs",
        "normal heart and lungs",
        "clear lungs",
        "lungs are clear",
        "clear lung fields",
        "no findings",
        "no abnormality",
        "no acute abnormality",
        "no acute finding",
        "no acute disease",
        "no acute cardiopulmonary abnormality",
        "no acute cardiopulmonary process",
        "no acute cardiopulmonary disease",
        "unremarkable chest radiograph",
        "unremarkable radiograph",
        "healthy chest",
        "nothing abnormal",
        "unremarkable",
    ),
    "Enlarged Cardiomediastinum": (
        "enlarged cardiomediastinal silhouette",
        "cardiomediastinal enlargement",
        "enlarged cardiomediastinal contour",
        "enlarged mediastinum",
        "enlarged mediastinal silhouette",
        "widened mediastinum",
        "wide mediastinum",
        "wide mediastinal contour",
        "prominent mediastinum",
        "widened mediastinal silhouette",
        "mediastinum is widened",
        "mediastinal widening",
        "widened superior mediastinum",
        "superior mediastinal widening",
        "widening of the mediastinum",
        "widening of the superior mediastinum",
        "widened mediastinal contour",
        "widening of the superior mediastinal contour",
        "mediastinal enlargement",
    ),
    "Cardiomegaly": (
        "enlarged heart",
        "heart enlargement",
        "heart is enlarged",
        "cardiac enlargement",
        "large heart",
        "big heart",
        "dilated heart",
        "large cardiac silhouette",
        "large cardiac shadow",
        "enlarged cardiac shadow",
        "enlarged heart shadow",
        "widened heart shadow",
        "enlarged cardiac silhouette",
        "enlarged heart silhouette",
        "cardiac silhouette enlargement",
        "cardiac silhouette is enlarged",
        "enlargement of the heart",
        "enlargement of the cardiac silhouette",
        "increased heart size",
        "increased cardiac size",
        "increased cardiothoracic ratio",
    ),
    "Lung Opacity": (
        "opacity",
        "hazy opacity",
        "lung haze",
        "haze",
        "pulmonary opacity",
        "airspace opacity",
        "air space opacity",
        "perihilar opacity",
        "airspace disease",
        "pulmonary infiltrate",
        "infiltrate",
        "infiltration",
        "ground-glass opacity",
        "ground glass",
        "opacification",
        "ground glass opacification",
        "lung opacification",
    ),
    "Lung Lesion": (
        "nodule",
        "mass",
        "nodule/mass",
        "lesion",
        "lung nodule",
        "lung mass",
        "pulmonary nodule",
        "pulmonary mass",
        "pulmonary lesion",
        "solitary pulmonary nodule",
        "round nodule",
        "round lesion",
        "nodular lesion",
        "nodular opacity",
        "lung tumor",
        "lung tumour",
        "round mass",
        "metastases",
        "pulmonary metastases",
        "lung metastases",
        "coin lesion",
    ),
    "Edema": (
        "oedema",
        "pulmonary edema",
        "pulmonary oedema",
        "lung edema",
        "interstitial edema",
        "interstitial pulmonary edema",
        "cardiogenic pulmonary edema",
        "alveolar edema",
        "vascular congestion",
        "pulmonary vascular congestion",
        "pulmonary congestion",
        "congestion",
        "perihilar haze",
        "kerley lines",
        "kerley b lines",
        "septal lines",
        "fluid overload",
        "heart failure",
        "congestive heart failure",
    ),
    "Consolidation": (
        "lobar consolidation",
        "dense consolidation",
        "consolidated",
        "consolidated lobe",
        "lung consolidation",
        "pulmonary consolidation",
        "airspace consolidation",
        "air space consolidation",
        "focal consolidation",
    ),
    "Pneumonia": (
        "bronchopneumonia",
        "multifocal pneumonia",
        "lobar pneumonia",
        "lung infection",
        "pulmonary infection",
        "infection",
        "infectious infiltrate",
    ),
    "Atelectasis": (
        "atelectases",
        "linear atelectasis",
        "platelike atelectasis",
        "plate-like atelectasis",
        "discoid atelectasis",
        "subsegmental atelectasis",
        "atelectatic band",
        "lung collapse",
        "lobar collapse",
        "collapse",
        "volume loss",
    ),
    "Pneumothorax": (
        "pneumothoraces",
        "apical pneumothorax",
        "tension pneumothorax",
        "air in the pleural space",
        "pleural air",
    ),
    "Pleural Effusion": (
        "effusion",
        "pleural fluid",
        "fluid in the pleural space",
        "blunted costophrenic angle",
        "costophrenic angle blunting",
        "blunting of the costophrenic angle",
        "hydrothorax",
    ),
    "Pleural Other": (
        "pleural thickening",
        "thickened pleura",
        "pleural plaque",
        "pleural calcification",
        "calcified pleural plaque",
        "pleural plaque/thickening",
        "pleural scarring",
        "pleural rind",
        "pleural disease",
        "calcified pleura",
        "apical pleural thickening",
    ),
    "Fracture": (
        "rib fracture",
        "broken rib",
        "fractured rib",
        "displaced rib fracture",
        "healed rib fracture",
        "healing rib fracture",
        "clavicle fracture",
        "bone fracture",
        "broken bone",
    ),
    "Support Devices": (
        "pacemaker",
        "cardiac pacemaker",
        "pacemaker lead",
        "pacemaker wire",
        "lines and tubes",
        "tubes and lines",
        "tube",
        "line",
        "catheter",
        "central line",
        "central venous line",
        "central venous catheter",
        "picc",
        "picc line",
        "port",
        "endotracheal tube",
        "et tube",
        "nasogastric tube",
        "ng tube",
        "enteric tube",
        "feeding tube",
        "tracheostomy tube",
        "chest tube",
        "chest drain",
        "sternal wire",
        "sternotomy wire",
        "device",
        "medical device",
        "medical hardware",
        "medical equipment",
        "hardware",
        "implanted device",
        "cardiac device",
        "implantable cardioverter defibrillator",
        "defibrillator",
        "icd",
        "life support device",
        "lines, tubes and devices",
    ),
}
"""Label to other names of it, in any case, punctuation and number."""

UNNAMED = (
    NO_COMMON_FINDING,
    "no shared finding",
    "no common abnormality",
    "no shared abnormality",
    "no common feature",
    "no shared feature",
    "no common radiographic finding",
    "no shared radiographic finding",
    "no common concept",
    "no single finding",
    "no specific finding",
    "no consistent finding",
    "nothing in common",
    "nothing shared",
    "nothing",
    "none",
    "n/a",
    "na",
    "null",
    "unknown",
    "indeterminate",
)
"""Ways to say that the images of a panel share nothing."""

_NOTHING_SHARED = re.compile(
    r"(no|not|without) (\w+ )?(common|shared|sharing|single|consistent|specific|clear|unifying)\b"
    r"|(none|unclear|unknown|indeterminate|cannot)\b|nothing( \w+)? (common|shared)\b"
)
_FILLERS = {"a", "an", "the", "of", "in", "on", "at", "is", "are", "there"}
_FILLERS |= {"seen", "present", "presence", "sign", "evidence", "visible", "both"}
_NEGATIONS = frozenset({"no", "not", "non", "without", "absent", "absence", "negative", "resolved"})
_JOINED = re.compile(r"\b(?:and|or|with|plus|versus|vs)\b|[,;/&+]", re.IGNORECASE)


def canonical(concept: str) -> str:
    """The label that a concept means, as `LABELS` writes it, or its own words, normalised.

    Case, punctuation, plurals, articles and the order of words do not count, nor do words for side, place and
    degree where the table does not list them ("small left pleural effusions" is Pleural Effusion). Of joined
    findings ("cardiomegaly with edema") a label results only if all that are known mean the same one. A
    negated concept is a label only if the table lists it.
    """
    words = _words(concept)
    if (label := _label(words)) or _NEGATIONS & set(words):
        return label or " ".join(words)
    bare = _without_modifiers(words)
    parts = [_words(part) for part in _JOINED.split(concept)]
    labels = {_label(part) or _label(_without_modifiers(part)) for part in parts} | {_label(bare)}
    known = labels - {None}
    return (known.pop() if len(known) == 1 else None) or " ".join(bare or words)


def is_named(concept: str | None) -> bool:
    """Whether a concept names a finding: not None, not blank, not a way to say that nothing is shared."""
    words = " ".join(_words(concept or ""))
    return bool(words) and words not in _UNNAMED and not _NOTHING_SHARED.match(words)


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = [_singular(word) for word in re.findall(r"[^\W_]+", plain)]
    return [word for word in words if word not in _FILLERS]


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _without_modifiers(words: list[str]) -> list[str]:
    return [word for word in words if word not in _MODIFIERS]


def _label(words: list[str]) -> str | None:
    return _TABLE.get(frozenset(words))


# Without their order, as "fracture of a rib" is a "rib fracture".
_TABLE = {frozenset(_words(said)): label for label in LABELS for said in (label, *SYNONYMS[label])}
_MODIFIERS = frozenset(
    # Which side, where and how much: not what.
    _words(
        "left right bilateral unilateral sided small large tiny big massive minimal trace mild mildly "
        "moderate moderately severe severely marked subtle extensive diffuse focal multifocal patchy dense "
        "hazy homogeneous ill well defined acute chronic new old stable upper lower middle mid lobe lobar "
        "zone lung base basal basilar bibasilar apical apex hilar retrocardiac peripheral central lateral"
    )
)
_UNNAMED = frozenset(" ".join(_words(told)) for told in UNNAMED)
