"""Every setting: one frozen dataclass a stage; the docstring under each field is its help text.

Read from the dataclass defaults, then a YAML file (`--config`), then `--stage.field value`
(see cli.py). A field marked `resource` says where and how fast a stage runs, not what it computes:
it stays out of the stage's fingerprint, so that a run resumes on another machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from medsae_ray.errors import InputError


def resource(default: Any) -> Any:
    """A field that changes no result (actors, devices, threads, paths)."""
    return field(default=default, metadata={"resource": True})


def _require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise InputError(f"Setting {key} is {value!r}, but it must be {rule}.")


@dataclass(frozen=True)
class RadiographsSettings:
    """Which radiographs, and how their patients are split."""

    dataset: Literal["phantom", "chexpert", "nih", "folder"] = "phantom"
    """Layout of the data set under `root`; `phantom` generates synthetic radiographs first."""
    root: str | None = resource(None)
    """Folder or URI that holds the data set; for `phantom` the default is `RUN/phantoms`."""
    table: str | None = resource(None)
    """CSV file name inside `root` (`folder` data sets only; default radiographs.csv)."""
    split: Literal["patient", "official"] = "patient"
    """`patient`: a seeded split of the training table by patient; `official`: the data set's own files."""
    train_fraction: float = 0.8
    """Share of patients in the training split, in (0, 1) (CheXpert's official files are too small)."""
    valid_fraction: float = 0.1
    """Share of patients in the validation split, in (0, 1); the rest are the test split."""
    seed: int = 0
    """Seed of the patient split."""
    limit: int | None = None
    """Use only the first n radiographs in `image_id` order: for a quick look (default: all)."""
    max_refused_share: float = resource(0.01)
    """Largest share of table rows that may be refused before the stage stops with an error, in [0, 1]."""
    phantom_images: int = 6000
    """Number of synthetic radiographs to generate (`phantom` only)."""
    phantom_size: int = 224
    """Side of a synthetic radiograph in pixels (`phantom` only)."""
    phantom_seed: int = 0
    """Seed of the synthetic radiographs (`phantom` only); the stand-in models trained on other seeds."""

    def __post_init__(self) -> None:
        _require(0 < self.train_fraction < 1, "radiographs.train_fraction", self.train_fraction, "in (0, 1)")
        _require(
            self.valid_fraction > 0 and self.train_fraction + self.valid_fraction < 1,
            "radiographs.valid_fraction",
            self.valid_fraction,
            "above 0 and leave a share for the test split",
        )
        _require(
            0 <= self.max_refused_share <= 1,
            "radiographs.max_refused_share",
            self.max_refused_share,
            "in [0, 1]",
        )
        _require(self.limit is None or self.limit > 0, "radiographs.limit", self.limit, "above 0")
        _require(self.phantom_images >= 20, "radiographs.phantom_images", self.phantom_images, "at least 20")
        _require(self.phantom_size >= 64, "radiographs.phantom_size", self.phantom_size, "at least 64")


@dataclass(frozen=True)
class EmbedSettings:
    """Radiographs to embeddings, by Ray Data with a pool of encoder actors."""

    encoder: str = "medclip-resnet50"
    """`medclip-resnet50`, `stand-in` (the demo's small model), or `package.module:Class` of your own."""
    weights: str | None = resource(None)
    """MedCLIP's checkpoint, a file or folder (`medsae weights` says where it comes from). Its SHA-256 counts
    as a setting, its path does not."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the encoder's body; bfloat16 is meant for GPUs (projection and norm stay float32)."""
    max_pixels: int = 100_000_000
    """Largest width x height that is decoded, in pixels: a guard against decompression bombs."""
    max_bad_share: float = resource(0.05)
    """Largest share of radiographs that may be quarantined before the stage is an error, in [0, 1]."""
    block_rows: int = resource(256)
    """Radiographs a block: the unit that is written, checkpointed and lost at most by a kill."""
    batch_size: int = resource(32)
    """Radiographs a forward pass of the encoder."""
    encoders_min: int = resource(1)
    """Fewest encoder actors kept in the pool."""
    encoders_max: int = resource(1)
    """Most encoder actors the pool grows to."""
    cpus_per_encoder: float = resource(1.0)
    """Logical CPUs reserved for one encoder actor."""
    gpus_per_encoder: float = resource(0.0)
    """GPUs reserved for one encoder actor (0: CPU)."""
    threads: int = resource(0)
    """Torch threads of one encoder actor on the CPU; 0: this machine's cores shared out over the pool."""

    def __post_init__(self) -> None:
        _require(0 <= self.max_bad_share <= 1, "embed.max_bad_share", self.max_bad_share, "in [0, 1]")
        _require(self.block_rows >= 1, "embed.block_rows", self.block_rows, "at least 1")
        _require(self.batch_size >= 1, "embed.batch_size", self.batch_size, "at least 1")
        _require(self.max_pixels >= 1, "embed.max_pixels", self.max_pixels, "at least 1")
        _require(
            1 <= self.encoders_min <= self.encoders_max,
            "embed.encoders_min",
            self.encoders_min,
            "at least 1 and at most embed.encoders_max",
        )
        _require(self.cpus_per_encoder > 0, "embed.cpus_per_encoder", self.cpus_per_encoder, "above 0")
        _require(self.gpus_per_encoder >= 0, "embed.gpus_per_encoder", self.gpus_per_encoder, "0 or above")
        _require(self.threads >= 0, "embed.threads", self.threads, "0 or above")


@dataclass(frozen=True)
class FitSettings:
    """Embeddings to a sparse autoencoder, by Ray Train. Defaults are the paper's (arXiv 2510.26411)."""

    expansion: int = 16
    """Neurons per embedding dimension (paper: 16, that is 8,192 neurons for 512-d)."""
    sparsity: float = 3e-4
    """λ, the weight of the L1 term (paper: 3e-4). Its strength depends on `normalisation` and
    `reconstruction`: they are recorded with it."""
    sparsity_warmup: float = 0.0
    """Share of all steps over which λ rises linearly from 0, in [0, 1) (paper: none)."""
    normalisation: Literal["unit", "dim"] = "unit"
    """Scale after centring: `unit` = mean squared norm 1 (the authors' library), `dim` = d (SAELens)."""
    reconstruction: Literal["sum", "mean"] = "sum"
    """Squared error summed or averaged over the d dimensions (the authors' library: sum)."""
    decoder_norm: Literal["unit", "weighted"] = "unit"
    """`unit`: decoder rows kept at norm 1; `weighted`: λ weighted by their norm."""
    learning_rate: float = 7e-6
    """Adam's learning rate (paper: 7e-6)."""
    batch_size: int = 1024
    """Radiographs a step over all workers together (the global batch), so that the number of workers
    changes no result."""
    epochs: int = 200
    """Passes over the training split (paper: 200)."""
    evaluate_every: int = 10
    """Epochs between two evaluations on the validation split, each with a checkpoint."""
    fve_floor: float = 0.95
    """A checkpoint is kept for its entropy only above this fraction of variance explained (paper: 0.95)."""
    min_firing: int = 10
    """Validation images a neuron must fire on to enter the mean entropy that chooses the checkpoint."""
    seed: int = 0
    """Seed of the initial weights and of the order of the radiographs."""
    in_memory_gib: float = resource(8.0)
    """Training matrices up to this size (GiB) are held whole by every worker: equal results for any number
    of workers. Above it shards stream, and that is not claimed."""
    workers: int = resource(1)
    """Ray Train workers."""
    cpus_per_worker: float = resource(1.0)
    """Logical CPUs reserved for one worker."""
    gpus_per_worker: float = resource(0.0)
    """GPUs reserved for one worker (0: CPU and gloo; else nccl)."""
    threads: int = resource(0)
    """Torch threads of one worker on the CPU; 0: this machine's cores shared out over the workers."""
    max_failures: int = resource(3)
    """How often Ray Train may restart the workers from the last checkpoint."""
    keep_checkpoints: int = resource(2)
    """Best checkpoints kept on disk, besides the last."""

    def __post_init__(self) -> None:
        _require(self.expansion >= 1, "fit.expansion", self.expansion, "at least 1")
        _require(self.sparsity >= 0, "fit.sparsity", self.sparsity, "0 or above")
        _require(0 <= self.sparsity_warmup < 1, "fit.sparsity_warmup", self.sparsity_warmup, "in [0, 1)")
        _require(self.learning_rate > 0, "fit.learning_rate", self.learning_rate, "above 0")
        _require(self.batch_size >= 1, "fit.batch_size", self.batch_size, "at least 1")
        _require(self.epochs >= 1, "fit.epochs", self.epochs, "at least 1")
        _require(self.evaluate_every >= 1, "fit.evaluate_every", self.evaluate_every, "at least 1")
        _require(0 <= self.fve_floor < 1, "fit.fve_floor", self.fve_floor, "in [0, 1)")
        _require(self.min_firing >= 1, "fit.min_firing", self.min_firing, "at least 1")
        _require(self.workers >= 1, "fit.workers", self.workers, "at least 1")
        _require(self.cpus_per_worker > 0, "fit.cpus_per_worker", self.cpus_per_worker, "above 0")
        _require(self.gpus_per_worker >= 0, "fit.gpus_per_worker", self.gpus_per_worker, "0 or above")
        _require(self.threads >= 0, "fit.threads", self.threads, "0 or above")
        _require(self.in_memory_gib >= 0, "fit.in_memory_gib", self.in_memory_gib, "0 or above")
        _require(self.max_failures >= -1, "fit.max_failures", self.max_failures, "-1 (for ever) or above")
        _require(self.keep_checkpoints >= 1, "fit.keep_checkpoints", self.keep_checkpoints, "at least 1")


@dataclass(frozen=True)
class EncodeSettings:
    """Embeddings to sparse activations, by Ray Data."""

    batch_size: int = resource(1024)
    """Radiographs a block and a matrix product."""
    cpus_per_task: float = resource(1.0)
    """Logical CPUs reserved for one task."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "encode.batch_size", self.batch_size, "at least 1")
        _require(self.cpus_per_task > 0, "encode.cpus_per_task", self.cpus_per_task, "above 0")


@dataclass(frozen=True)
class MeasureSettings:
    """Activations and labels to the neuron table and the summary."""

    uncertain: Literal["ignore", "zeros", "ones"] = "ignore"
    """What an uncertain label (-1) counts as (CheXpert's U-Ignore, U-Zeros, U-Ones)."""
    blank: Literal["negative", "ignore"] = "negative"
    """What a label that is not mentioned counts as."""
    min_firing: int = 10
    """Images of the split a neuron must fire on to enter the mean entropy."""
    floor_permutations: int = 5
    """Permutations of the label rows from which the entropy's noise floor is averaged."""
    min_positives: int = 50
    """Test positives below which no claim is made about a label's AUROC (paper.md)."""
    seed: int = 0
    """Seed of the permutations."""

    def __post_init__(self) -> None:
        _require(self.min_firing >= 2, "measure.min_firing", self.min_firing, "at least 2")
        _require(
            self.floor_permutations >= 1, "measure.floor_permutations", self.floor_permutations, "at least 1"
        )


@dataclass(frozen=True)
class RaySettings:
    """The Ray that the stages run on. In a submitted job Ray is there already and only `progress` counts."""

    cpus: int = resource(4)
    """Logical CPUs of an embedded local Ray; at least 4, or Ray Data's own pools starve (0: all cores, but
    no fewer than 4)."""
    object_store_gib: float = resource(2.0)
    """Object store of an embedded local Ray, in GiB."""
    progress: bool = resource(True)
    """Ray Data's progress bars."""

    def __post_init__(self) -> None:
        _require(self.cpus == 0 or self.cpus >= 4, "ray.cpus", self.cpus, "0 or at least 4")
        _require(self.object_store_gib >= 0.1, "ray.object_store_gib", self.object_store_gib, "at least 0.1")


@dataclass(frozen=True)
class Settings:
    """Everything `medsae` and `jobs/*.py` accept."""

    run: str = "runs/run"
    """The run folder: every table is written here. A local folder or a URI (s3://…, gs://…)."""
    overwrite: bool = False
    """Make a stage's output again where other settings or inputs made it (what is up to date stays)."""
    radiographs: RadiographsSettings = RadiographsSettings()
    embed: EmbedSettings = EmbedSettings()
    fit: FitSettings = FitSettings()
    encode: EncodeSettings = EncodeSettings()
    measure: MeasureSettings = MeasureSettings()
    ray: RaySettings = RaySettings()

    def __post_init__(self) -> None:
        _require(bool(self.run.strip()), "run", self.run, "the path or URI of a folder")


def fingerprinted(settings: Any) -> dict[str, Any]:
    """The fields of one stage's settings that change its results, by name."""
    return {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if not f.metadata.get("resource")
    }
