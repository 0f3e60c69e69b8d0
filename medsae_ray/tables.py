"""The tables of a run: their columns, types and units (the contract of docs/architecture.md).

Every table is Parquet under `RUN/<table>/`. `Run` (run.py) checks these schemas on write and on read.
"""

from __future__ import annotations

import pyarrow as pa

from medsae_ray.labels import LABELS

SPLITS = ("train", "valid", "test", "official_valid", "official_test")

RADIOGRAPHS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("patient_id", pa.string(), nullable=False),
        pa.field("study_id", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("view", pa.string()),
        pa.field("sex", pa.string()),
        pa.field("age", pa.float32()),
        pa.field("site", pa.string()),
    ]
    + [pa.field(label, pa.float32()) for label in LABELS]
)
"""A row is an image. Labels: 1 present, 0 absent, -1 uncertain, null not mentioned. Age in years."""

TRUTH = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("finding", pa.string(), nullable=False),
        pa.field("severity", pa.float32()),
        pa.field("x0", pa.float32(), nullable=False),
        pa.field("y0", pa.float32(), nullable=False),
        pa.field("x1", pa.float32(), nullable=False),
        pa.field("y1", pa.float32(), nullable=False),
    ]
)
"""A row is a planted sign of a phantom (severity in (0, 1]), or a reader's box (severity null). The box is in
pixels of the image as the data set tells it: phantoms as stored, NIH at 1024 px whatever is stored."""

QUARANTINE = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""A row is an image that could not be used, with its reason."""

ACTIVATIONS = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("neuron", pa.list_(pa.int32()), nullable=False),
        pa.field("value", pa.list_(pa.float32()), nullable=False),
    ]
)
"""A row is an image: its firing neurons, ascending, and their activations (> 0)."""

HISTORY = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
    + [
        pa.field(name, pa.float64())
        for name in (
            "fve",
            "l0",
            "dead",
            "entropy",
            "selection",
            "loss",
            "reconstruction",
            "sparsity",
            "auxiliary",
            "seconds",
        )
    ]
)
"""A row is an evaluation of the SAE during training (`sae/history`); `dead` is a share in [0, 1].

Rows of split train are means over the steps since the last evaluation, their `dead` the share of neurons
that fired on none of these embeddings while the weights changed.
"""

EXPERIMENT = pa.schema(
    [
        pa.field("sae", pa.string(), nullable=False),
        pa.field("matched", pa.string()),
        pa.field("architecture", pa.string(), nullable=False),
        pa.field("normalisation", pa.string(), nullable=False),
        pa.field("expansion", pa.int32(), nullable=False),
        pa.field("sparsity_setting", pa.float64()),
        pa.field("l0_setting", pa.int32()),
        pa.field("learning_rate", pa.float64(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("n_living", pa.int64(), nullable=False),
        pa.field("labels_separated", pa.int64(), nullable=False),
        pa.field("n_labels", pa.int64(), nullable=False),
    ]
    + [
        pa.field(name, pa.float64())
        for name in (
            "valid_l0",
            "valid_fve",
            "fve",
            "l0",
            "dead",
            "dead_train",
            "entropy",
            "entropy_low",
            "entropy_high",
            "entropy_floor",
            "best_auroc",
            "share_separated",
            "share_above",
            "raw_entropy",
            "raw_entropy_floor",
            "seconds",
        )
    ]
    + [pa.field("entropy_labels", pa.int64())]
)
"""A row is an SAE of an experiment (`replicate`, `expansion`, `architectures`), measured on the test split.

`sae` is its folder under `saes/` beside the table, in SAELens's format. `matched` says for which comparison
it was fitted (l0, fve; path: only to find the settings of these; null where nothing is matched). `entropy` is
the mean over the `n_living` neurons, its interval over patients; `best_auroc` the mean over the labels of the
neuron chosen on validation; of the `n_labels` with enough positives, `share_separated` have such a neuron by
paper.md's rule and `share_above` one of AUROC > 0.8.
"""

SWEEP = pa.schema(
    [
        pa.field("trial", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("architecture", pa.string(), nullable=False),
        pa.field("expansion", pa.int32(), nullable=False),
        pa.field("sparsity_setting", pa.float64()),
        pa.field("l0_setting", pa.int32()),
        pa.field("learning_rate", pa.float64(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        *HISTORY,
        pa.field("best", pa.bool_(), nullable=False),
        pa.field("front", pa.bool_(), nullable=False),
    ]
)
"""A row is an evaluation of a trial of a sweep on a split; `status` finished, stopped (early, by ASHA) or
failed. `best` marks the validation row that represents its trial, the one of lowest selection score, and
`front` those of finished trials that no other dominates in FVE, L0, dead and entropy; a failed trial has
neither, and one that failed before its first evaluation has one row, of epoch 0, without figures."""

NAMES = pa.schema(
    [
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("concept", pa.string()),
        pa.field("description", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("reply", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("prompt_sha256", pa.string(), nullable=False),
        pa.field("seconds", pa.float64()),
        pa.field("request_id", pa.string(), nullable=False),
    ]
)
"""A row is a candidate neuron: its name, null unless `status` is answered (else unparsed or failed)."""

VERDICTS = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("condition", pa.string(), nullable=False),
        pa.field("description_neuron", pa.int32(), nullable=False),
        pa.field("expected", pa.bool_(), nullable=False),
        pa.field("answer", pa.bool_()),
        pa.field("p_yes", pa.float64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("reply", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("prompt_sha256", pa.string(), nullable=False),
        pa.field("quantile", pa.float32(), nullable=False),
    ]
)
"""A row is a detection prompt: `expected`, whether the neuron fires on the image; `condition` true (its own
description) or shuffled (that of `description_neuron`); `answer` null unless `status` is answered."""

DETECTIONS = pa.schema(
    [
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("named", pa.bool_(), nullable=False),
    ]
    + [
        pa.field(f"{name}{end}", pa.float64())
        for name in ("balanced_accuracy", "tpr", "tnr", "auroc")
        for end in ("", "_low", "_high")
    ]
    + [pa.field("p", pa.float64()), pa.field("q", pa.float64())]
    + [
        pa.field(name, pa.int64(), nullable=False)
        for name in ("n_positive", "n_negative", "n_unparsed", "n_failed")
    ]
    + [
        pa.field("shuffled_balanced_accuracy", pa.float64()),
        pa.field("enough", pa.bool_(), nullable=False),
        pa.field("n_shuffled", pa.int64(), nullable=False),
        pa.field("tpr_by_quantile", pa.list_(pa.float64()), nullable=False),
        pa.field("n_by_quantile", pa.list_(pa.int64()), nullable=False),
    ]
)
"""A row is a candidate neuron: what its own description detects. Rates in [0, 1] over ANSWERED prompts,
intervals 95 %; counts are of condition true but `n_shuffled`. Only where `enough` is it ranked or counted."""

CANDIDATES = pa.schema(
    [
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("candidate", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("label", pa.string()),
        pa.field("n_firing_valid", pa.int64(), nullable=False),
        pa.field("n_silent_valid", pa.int64(), nullable=False),
        pa.field("n_firing_test", pa.int64(), nullable=False),
        pa.field("n_silent_test", pa.int64(), nullable=False),
    ]
)
"""A row is a neuron: whether it has a panel, or the reason why not, and the label it was chosen under (its
best on validation if all are taken). Counts are patients with an image on which it fires, or is silent."""

PANELS = pa.schema(
    [
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
        pa.field("quantile", pa.float32(), nullable=False),
    ]
)
"""A row is an image of a candidate neuron's panel, by neuron, role (name, name_contrast, detect_positive,
detect_negative), falling value and image_id. `quantile` in (0, 1] is the share of the neuron's firing images
of the split with a value not above this one; 0 where it is silent."""

GALLERY = pa.schema(
    [
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
        pa.field("quantile", pa.float32(), nullable=False),
    ]
)
"""A row is a radiograph on a living neuron's card, by neuron, role (top: validation split; range, silent:
test split), falling value and image_id. For a candidate these are the roles name, detect_positive and
detect_negative of `panels`; other neurons have no silent ones. `quantile` as in `panels`."""

ACQUISITION = ("AP", "lateral", "male", "age", "site")
"""How a radiograph was made and of whom: AP against PA, lateral against frontal, sex M against F, age in
years, and the site, one against all others, that correlates most (on validation)."""

ATLAS = pa.schema(
    [
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("x", pa.float32()),
        pa.field("y", pa.float32()),
        pa.field("leaf", pa.int32()),
        pa.field("nearest", pa.list_(pa.int32()), nullable=False),
        pa.field("cosine", pa.list_(pa.float32()), nullable=False),
        pa.field("bins", pa.list_(pa.int64()), nullable=False),
    ]
    + [pa.field(f"{prefix}r_{name}", pa.float64()) for name in ACQUISITION for prefix in ("", "valid_")]
    + [
        pa.field("site", pa.string()),
        pa.field("shortcuts", pa.list_(pa.string()), nullable=False),
    ]
)
"""A row is a neuron. `x`, `y`: its decoder direction on the plane of a t-SNE; `leaf`: its place in the
hierarchical clustering of the neurons by their r with the labels (both null for dead neurons, `leaf` also
where an r is undefined); `nearest`: neurons of highest decoder `cosine`, falling; `bins`: its firing test
images in 20 equal parts of (0, max]. `r_<acquisition>` on test, `valid_r_…` on validation. `shortcuts` names
what it follows beyond |r| 0.2, with one sign, on both splits: of ACQUISITION, and devices (Support Devices)
where another label is its best."""

BOXES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("finding", pa.string(), nullable=False),
        pa.field("x0", pa.float32(), nullable=False),
        pa.field("y0", pa.float32(), nullable=False),
        pa.field("x1", pa.float32(), nullable=False),
        pa.field("y1", pa.float32(), nullable=False),
    ]
)
"""A row is a box of `truth` on a test image, in shares of the square that the encoder sees, in [0, 1]."""

POINTING = pa.schema(
    [
        pa.field("finding", pa.string(), nullable=False),
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("hit", pa.bool_(), nullable=False),
        pa.field("iou", pa.float64(), nullable=False),
        pa.field("box_share", pa.float64(), nullable=False),
        pa.field("others", pa.list_(pa.int32()), nullable=False),
        pa.field("other_hits", pa.float64()),
        pa.field("other_iou", pa.float64()),
    ]
)
"""A row is a finding and a test image that has a box of it and on which the finding's neuron (chosen on
validation) fires. `hit`: the highest point of the neuron's map lies in a box; `iou` of the part of the map
above half its maximum with the boxes; `box_share` of the square; `others`: neurons that fire on the image and
stand for other labels, and the means of their hits (in [0, 1]) and IoU (null where there are none)."""

LOCALISATION = pa.schema(
    [
        pa.field("finding", pa.string(), nullable=False),
        pa.field("neuron", pa.int32()),
        pa.field("n_boxed", pa.int64(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("n_patients", pa.int64(), nullable=False),
    ]
    + [
        pa.field(name, pa.float64())
        for name in (
            "hit_rate",
            "hit_rate_low",
            "hit_rate_high",
            "box_share",
            "other_hit_rate",
            "iou",
            "iou_low",
            "iou_high",
            "other_iou",
        )
    ]
    + [pa.field("above_chance", pa.bool_())]
)
"""A row is a finding: means over its `n` rows of `pointing` (of `n_boxed` test images with a box), intervals
95 % over patients. A point drawn at random hits at `box_share`, which is also the IoU of the whole image.
`above_chance`: the hit rate's lower bound lies above both `box_share` and `other_hit_rate`; null without
rows."""


def maps_schema(positions: int) -> pa.Schema:
    """A row is a neuron and an image: where the neuron fires (see localise.py).

    `map` [positions] row-major; the values sum to `pre_activation` − `constant`.
    """
    return pa.schema(
        [
            pa.field("neuron", pa.int32(), nullable=False),
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("map", pa.list_(pa.float32(), positions), nullable=False),
            pa.field("constant", pa.float32(), nullable=False),
            pa.field("pre_activation", pa.float32(), nullable=False),
        ]
    )


def positions_schema(embedding_dim: int) -> pa.Schema:
    """A row is a position of the encoder's last feature map, row-major: its mean share of the embedding.

    Share of position (i, j) of P: W f_ij / (P ‖e‖), averaged over the training split [embedding_dim]; over
    the positions the shares sum to the mean training embedding.
    """
    return pa.schema(
        [
            pa.field("position", pa.int32(), nullable=False),
            pa.field("share", pa.list_(pa.float64(), embedding_dim), nullable=False),
        ]
    )


def embeddings_schema(embedding_dim: int) -> pa.Schema:
    """A row is an image: its embedding [embedding_dim], L2-normalised by the encoder, before centring."""
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), embedding_dim), nullable=False),
        ]
    )
