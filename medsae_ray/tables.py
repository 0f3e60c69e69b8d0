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
