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
        pa.field("severity", pa.float32(), nullable=False),
        pa.field("x0", pa.float32(), nullable=False),
        pa.field("y0", pa.float32(), nullable=False),
        pa.field("x1", pa.float32(), nullable=False),
        pa.field("y1", pa.float32(), nullable=False),
    ]
)
"""A row is a planted sign of a phantom. Box in pixels of the stored image, severity in (0, 1]."""

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
            "seconds",
        )
    ]
)
"""A row is an evaluation of the SAE during training (`sae/history`); `dead` is a share in [0, 1]."""


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
