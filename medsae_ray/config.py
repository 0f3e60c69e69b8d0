"""Every setting: one frozen dataclass a stage; the docstring under each field is its help text.

Read from the dataclass defaults, then a YAML file (`--config`), then `--stage.field value`
(see cli.py). A field marked `resource` says where and how fast a stage runs, not what it computes:
it stays out of the stage's fingerprint, so that a run resumes on another machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

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


DEFAULT_L0 = 32
"""Neurons that topk and its kin let fire on an embedding where `fit.l0` is not given."""
BY_RANK = ("topk", "batchtopk", "matryoshka")
"""Architectures whose neurons are chosen by rank: `l0`, not λ, says how many fire."""


@dataclass(frozen=True)
class FitSettings:
    """Embeddings to a sparse autoencoder, by Ray Train. Objective and lengths default to the paper's (arXiv
    2510.26411), the care for dead neurons does not: `jobs/paper.yaml` switches it off."""

    architecture: Literal["relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"] = "relu"
    """ReLU with L1 (the paper's), Gated, JumpReLU, TopK, BatchTopK or Matryoshka BatchTopK."""
    expansion: int = 16
    """Neurons per embedding dimension (paper: 16, that is 8,192 neurons for 512-d)."""
    sparsity: float = 3e-4
    """λ, the weight of the sparsity term of relu, gated and jumprelu (paper: 3e-4). Its strength depends on
    `normalisation` and `reconstruction`: they are recorded with it."""
    l0: int | None = None
    """Neurons that fire on an embedding: k of topk, batchtopk and matryoshka (default there: 32). With
    jumprelu a target: λ then weighs (L0 / l0 - 1)² instead of L0."""
    bandwidth: float = 1e-3
    """Width of the kernel through which jumprelu's thresholds learn, in units of the normalised embeddings'
    pre-activations."""
    auxk: float = 1 / 32
    """Weight of topk's, batchtopk's and matryoshka's second reconstruction, of the error by dead neurons
    (0: none)."""
    dead_after: float = 2.0
    """Epochs without firing after which a neuron counts as dead in training (`auxk`, `resample_every`)."""
    resample_every: float = 0.0
    """Epochs after which neurons that have died start anew from the embeddings that are reconstructed worst;
    again after as many, up to half of the training (0: never)."""
    sparsity_warmup: float = 0.05
    """Share of all steps over which λ rises linearly from 0, in [0, 1) (paper: none)."""
    learning_rate_warmup: float = 0.02
    """Share of all steps over which the learning rate rises linearly from 0, in [0, 1) (paper: none)."""
    learning_rate_decay: float = 0.2
    """Share of all steps, the last ones, over which it falls linearly towards 0, in [0, 1) (paper: none)."""
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
    checkpoint_every: int = resource(500)
    """Steps after which the training is checkpointed between evaluations, so that a kill loses no more
    (0: only with evaluations)."""

    def __post_init__(self) -> None:
        _require(self.expansion >= 1, "fit.expansion", self.expansion, "at least 1")
        _require(self.l0 is None or self.l0 >= 1, "fit.l0", self.l0, "at least 1")
        for name in ("bandwidth", "dead_after"):
            value = getattr(self, name)
            _require(value > 0, f"fit.{name}", value, "above 0")
        for name in ("sparsity", "auxk", "resample_every"):
            value = getattr(self, name)
            _require(value >= 0, f"fit.{name}", value, "0 or above")
        for name in ("sparsity_warmup", "learning_rate_warmup", "learning_rate_decay"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"fit.{name}", value, "in [0, 1)")
        _require(
            self.learning_rate_warmup + self.learning_rate_decay <= 1,
            "fit.learning_rate_decay",
            self.learning_rate_decay,
            "at most 1 - fit.learning_rate_warmup",
        )
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
        _require(self.checkpoint_every >= 0, "fit.checkpoint_every", self.checkpoint_every, "0 or above")

    @property
    def strength(self) -> tuple[Literal["sparsity", "l0"], float]:
        """The setting that decides how many neurons fire, and its value."""
        if self.architecture in BY_RANK:
            return "l0", DEFAULT_L0 if self.l0 is None else self.l0
        if self.architecture == "jumprelu" and self.l0 is not None:
            return "l0", self.l0
        return "sparsity", self.sparsity


@dataclass(frozen=True)
class SweepSettings:
    """Many SAEs on the same embeddings, by Ray Tune. What is not searched is as in `fit`."""

    search: Literal["grid", "random", "optuna"] = "grid"
    """`grid`: every combination of the values below; `random` and `optuna` (tree-structured Parzen): `trials`
    draws, for which `sparsity` and `learning_rate` are bounds on a log scale and the others choices."""
    trials: int = 16
    """Draws of `random` and `optuna`."""
    architecture: list[str] = field(default_factory=list)
    """Architectures to try (default: that of `fit`, and so for all below)."""
    sparsity: list[float] = field(default_factory=list)
    """Values of λ; architectures that have none ignore it."""
    l0: list[int] = field(default_factory=list)
    """Values of `fit.l0`; architectures that have none ignore it."""
    expansion: list[int] = field(default_factory=list)
    """Neurons per embedding dimension."""
    learning_rate: list[float] = field(default_factory=list)
    """Learning rates."""
    seeds: list[int] = field(default_factory=list)
    """Seeds of the weights and the order of the radiographs."""
    asha: bool = False
    """Stop the worse trials early (ASHA), by the selection score."""
    grace: int = 3
    """Evaluations a trial is given before ASHA may stop it."""
    reduction_factor: int = 3
    """ASHA lets one in so many trials go on at each rung."""
    together: Literal["auto", "always", "never"] = "auto"
    """Whether the λs of a relu grid train as one stack on shared batches; `auto` times both ways first, and
    does not with ASHA, which stops a stack as a whole."""
    promote: str | None = resource(None)
    """Name of the trial whose SAE becomes the run's (default: the best by selection score)."""
    seed: int = 0
    """Seed of the draws."""
    cpus_per_trial: float = resource(1.0)
    """Logical CPUs reserved for a trial."""
    gpus_per_trial: float = resource(0.0)
    """GPUs reserved for a trial."""
    concurrent: int = resource(0)
    """Trials at a time at most (0: as many as fit)."""
    threads: int = resource(0)
    """Torch threads of a trial on the CPU; 0: this machine's cores shared out over the trials at a time, or
    in a cluster `cpus_per_trial`."""

    def __post_init__(self) -> None:
        for name in ("trials", "grace"):
            value = getattr(self, name)
            _require(value >= 1, f"sweep.{name}", value, "at least 1")
        _require(
            self.together != "always" or self.search == "grid",
            "sweep.together",
            self.together,
            "auto or never unless sweep.search is grid",
        )
        _require(self.reduction_factor >= 2, "sweep.reduction_factor", self.reduction_factor, "at least 2")
        known = get_args(get_type_hints(FitSettings)["architecture"])
        for name in self.architecture:
            _require(name in known, "sweep.architecture", name, f"one of {', '.join(known)}")
        for name in ("l0", "expansion"):
            for value in getattr(self, name):
                _require(value >= 1, f"sweep.{name}", value, "at least 1")
        for value in self.learning_rate:
            _require(value > 0, "sweep.learning_rate", value, "above 0")
        for value in self.sparsity:
            _require(value >= 0 if self.search == "grid" else value > 0, "sweep.sparsity", value, "above 0")
        if self.search != "grid":
            for name in ("sparsity", "learning_rate"):
                values = getattr(self, name)
                _require(
                    len(values) in (0, 1) or (len(values) == 2 and values[0] < values[1]),
                    f"sweep.{name}",
                    values,
                    "a lower and an upper bound",
                )
        _require(self.cpus_per_trial > 0, "sweep.cpus_per_trial", self.cpus_per_trial, "above 0")
        for name in ("gpus_per_trial", "concurrent", "threads"):
            value = getattr(self, name)
            _require(value >= 0, f"sweep.{name}", value, "0 or above")


@dataclass(frozen=True)
class ExperimentSettings:
    """The paper's experiments (`replicate`, `expansion`, `architectures`). What they do not vary is as in
    `fit`; resources are those of `sweep`'s trials."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of `expansion` and `architectures`; figures are told as mean ± standard deviation over them."""
    expansions: list[int] = field(default_factory=lambda: [8, 16, 32])
    """Neurons per embedding dimension that `expansion` compares (paper: 8, 16, 32)."""
    architectures: list[str] = field(
        default_factory=lambda: ["relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"]
    )
    """What `architectures` compares; relu, the paper's, is the reference and always among them."""
    l0: int = 32
    """Firing neurons an image at which they are compared, within 10 % (at most 64 can still be read)."""
    sparsities: list[float] = field(default_factory=lambda: [0.01, 0.03, 0.1])
    """λs of relu and gated from which the one that meets `l0` is found."""
    l0s: list[int] = field(default_factory=lambda: [16, 32, 64])
    """Settings of the others, from which the one that meets relu's FVE is found."""
    jumprelu_sparsity: float = 1.0
    """λ with which jumprelu is held to its target of L0."""

    def __post_init__(self) -> None:
        known = get_args(get_type_hints(FitSettings)["architecture"])
        for name in self.architectures:
            _require(name in known, "experiment.architectures", name, f"one of {', '.join(known)}")
        _require("relu" in self.architectures, "experiment.architectures", self.architectures, "with relu")
        for name in ("seeds", "expansions"):
            _require(len(getattr(self, name)) > 0, f"experiment.{name}", getattr(self, name), "not empty")
        for name in ("sparsities", "l0s"):
            values = getattr(self, name)
            _require(
                len(set(values)) >= 2 and min(values) > 0, f"experiment.{name}", values, "two or more above 0"
            )
        _require(self.l0 >= 1, "experiment.l0", self.l0, "at least 1")


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
class ControlsSettings:
    """What lies beside the SAE's entropy and AUROC: the same measures of units that no SAE has learned."""

    ica_rows: int = 20_000
    """Training embeddings at most from which ICA is fitted."""
    seed: int = 0
    """Seed of the untrained SAE, the rotation, ICA and the shuffle."""

    def __post_init__(self) -> None:
        _require(2 <= self.ica_rows <= 20_000, "controls.ica_rows", self.ica_rows, "in [2, 20000]")


@dataclass(frozen=True)
class PanelsSettings:
    """Which radiographs stand for a neuron: for naming, and, of other patients, for detection."""

    per_label: int | None = None
    """Candidates are the first n neurons of each label by r on validation, sign kept (default: all)."""
    min_patients: int = 10
    """Patients on whom a candidate must fire, and on whom it must be silent, in each of the two splits."""
    name_images: int = 10
    """Radiographs a naming prompt shows, one a patient (validation split)."""
    name_from: Literal["top", "top+middle"] = "top"
    """`top`: the highest activations; `top+middle`: half of them from the middle of the firing range."""
    contrast_images: int = 0
    """Radiographs on which the neuron is silent that a naming prompt shows beside them."""
    detect_images: int = 20
    """Firing radiographs, and as many silent ones, on which a name is tested, one a patient (test split)."""
    negative_pool: int = 400
    """Size of the pool of test radiographs from which the silent ones of all neurons are drawn first: shared
    radiographs are read by the model once for many neurons."""
    match_acquisition: bool = False
    """Draw the silent radiographs with the same views and sexes as the firing ones."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        _require(self.per_label is None or self.per_label >= 1, "panels.per_label", self.per_label, "above 0")
        _require(self.min_patients >= 2, "panels.min_patients", self.min_patients, "at least 2")
        _require(self.name_images >= 1, "panels.name_images", self.name_images, "at least 1")
        _require(self.contrast_images >= 0, "panels.contrast_images", self.contrast_images, "0 or above")
        _require(self.detect_images >= 1, "panels.detect_images", self.detect_images, "at least 1")
        _require(self.negative_pool >= 1, "panels.negative_pool", self.negative_pool, "at least 1")


ENGINE_SETTINGS = {
    "model": "model",
    "dtype": "dtype",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "tensor_parallel_size": "tensor_parallel",
    "kv_cache_memory_bytes": "kv_cache_gib",
}
"""vLLM's names of what has a setting of its own."""
ENGINE_RESOURCES = (
    "block_size",
    "enforce_eager",
    "gpu_memory_utilization",
    "max_num_batched_tokens",
    "mm_processor_cache_gb",
    "enable_prefix_caching",
    "disable_log_stats",
    "swap_space",
)
"""Arguments of vLLM's engine that change no reply."""


@dataclass(frozen=True)
class MedgemmaSettings:
    """The vision-language model that names and judges, by vLLM inside Ray Data or behind an HTTP endpoint."""

    backend: str = resource("engine")
    """`engine` (vLLM in Ray Data), `endpoint` (an OpenAI-compatible server), or `package.module:function`."""
    model: str = resource("google/medgemma-4b-it")
    """Folder of a checkpoint, a name on the hub, or `stand-in` (the demo's small model). For the engine the
    SHA-256 of its files counts as a setting; for an endpoint this name, under which its results are shown
    (one with `stand-in` in it is labelled so)."""
    download: bool = resource(False)
    """Fetch a hub name that is not on this machine yet; otherwise nothing is asked of the hub."""
    dtype: Literal["bfloat16", "float32", "float16", "auto"] = "bfloat16"
    """Arithmetic of the model (Gemma 3 overflows in float16)."""
    max_model_len: int = resource(8192)
    """Longest prompt with its reply, in tokens; MedGemma takes 256 an image."""
    max_side: int = 1024
    """Radiographs with a longer side are shrunk to it, in pixels, before the model's own resize."""
    max_pixels: int = 100_000_000
    """Largest width x height that is decoded, in pixels."""
    replicas_min: int = resource(1)
    """Fewest engines kept in the pool."""
    replicas_max: int = resource(1)
    """Most engines the pool grows to."""
    tensor_parallel: int = resource(1)
    """GPUs over which one engine splits the model."""
    gpus_per_replica: float = resource(1.0)
    """GPUs reserved for each of an engine's `tensor_parallel` parts: 1, or 0 for a CPU."""
    cpus_per_replica: float = resource(1.0)
    """Logical CPUs reserved for one engine, and threads with which it reads radiographs."""
    kv_cache_gib: float = resource(0.0)
    """Memory of an engine's key-value cache, in GiB (0: vLLM's own choice)."""
    max_num_seqs: int = resource(256)
    """Prompts an engine works on at a time."""
    block_rows: int = resource(256)
    """Radiographs shown by the prompts of a block (at least one prompt): the unit that is written, and lost
    at most by a kill, with `concurrent_batches` of them in flight an engine."""
    concurrent_batches: int = resource(4)
    """Blocks an engine works on at a time."""
    engine: dict[str, Any] = field(default_factory=dict, metadata={"resource": True})
    """Further arguments of vLLM's engine, by its names; those that may change a reply count as settings."""
    url: str | None = resource(None)
    """Address of the endpoint, up to and including its version: http://host:8000/v1."""
    key_variable: str = resource("MEDGEMMA_API_KEY")
    """Environment variable that holds the endpoint's key, if it wants one."""
    dialect: Literal["vllm", "openai"] = "vllm"
    """`vllm`: the endpoint takes vLLM's own request fields; `openai`: none but OpenAI's are sent."""
    concurrency: int = resource(32)
    """Requests under way at the endpoint at a time."""
    retries: int = resource(6)
    """How often a request is sent again after 429, 5xx, a lost connection or a time-out."""
    timeout_s: float = resource(120.0)
    """Seconds until a request to the endpoint is given up."""
    max_failed_share: float = resource(0.05)
    """Largest share of prompts that may fail before the stage is an error, in [0, 1]; running again asks
    those alone (with --overwrite once the stage is done)."""

    def __post_init__(self) -> None:
        _require(
            self.backend in ("engine", "endpoint") or ":" in self.backend,
            "medgemma.backend",
            self.backend,
            "engine, endpoint or package.module:function",
        )
        _require(self.max_model_len >= 64, "medgemma.max_model_len", self.max_model_len, "at least 64")
        _require(self.max_side >= 16, "medgemma.max_side", self.max_side, "at least 16")
        _require(self.max_pixels >= 1, "medgemma.max_pixels", self.max_pixels, "at least 1")
        _require(
            1 <= self.replicas_min <= self.replicas_max,
            "medgemma.replicas_min",
            self.replicas_min,
            "at least 1 and at most medgemma.replicas_max",
        )
        for name in ("tensor_parallel", "max_num_seqs", "block_rows", "concurrent_batches", "concurrency"):
            value = getattr(self, name)
            _require(value >= 1, f"medgemma.{name}", value, "at least 1")
        _require(
            self.gpus_per_replica in (0, 1), "medgemma.gpus_per_replica", self.gpus_per_replica, "0 or 1"
        )
        for name in ("kv_cache_gib", "retries"):
            value = getattr(self, name)
            _require(value >= 0, f"medgemma.{name}", value, "0 or above")
        _require(self.cpus_per_replica > 0, "medgemma.cpus_per_replica", self.cpus_per_replica, "above 0")
        _require(self.timeout_s > 0, "medgemma.timeout_s", self.timeout_s, "above 0")
        _require(
            0 <= self.max_failed_share <= 1, "medgemma.max_failed_share", self.max_failed_share, "in [0, 1]"
        )
        _require(
            not self.engine.get("trust_remote_code"),
            "medgemma.engine",
            "trust_remote_code",
            "without it: code from a checkpoint is never run",
        )
        for name, setting in ENGINE_SETTINGS.items():
            _require(name not in self.engine, "medgemma.engine", name, f"set as medgemma.{setting}")


@dataclass(frozen=True)
class NameSettings:
    """The naming prompt: a panel's radiographs to a concept and a description."""

    template: str | None = resource(None)
    """File with the prompt; its fields are $images, $n and, with contrast images, $contrast (default: the
    package's own). Its SHA-256 counts as a setting."""
    max_tokens: int = 200
    """Longest reply, in tokens."""

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 16, "name.max_tokens", self.max_tokens, "at least 16")


@dataclass(frozen=True)
class DetectSettings:
    """The detection prompt, one radiograph and one description at a time, and its statistics."""

    template: str | None = resource(None)
    """File with the prompt; its fields are $image, $description and $concept (default: the package's own).
    Its SHA-256 counts as a setting."""
    shuffled_share: float = 1.0
    """Share of the neurons whose panel is asked again with another neuron's description, in [0, 1]."""
    interval: Literal["wilson", "clopper-pearson"] = "wilson"
    """95 % intervals of the two rates."""
    permutations: int = 100
    """Permutations of what is expected, within each neuron, for the null that needs no prompts."""
    max_lost_share: float = 0.2
    """A neuron that lost more than this share of the replies of either side is marked, not ranked."""
    quantiles: int = 5
    """Equal parts of the activation range for which accuracy is told apart."""
    seed: int = 0
    """Seed of the shuffled descriptions and of the permutations."""

    def __post_init__(self) -> None:
        _require(0 <= self.shuffled_share <= 1, "detect.shuffled_share", self.shuffled_share, "in [0, 1]")
        _require(self.permutations >= 1, "detect.permutations", self.permutations, "at least 1")
        _require(0 <= self.max_lost_share < 1, "detect.max_lost_share", self.max_lost_share, "in [0, 1)")
        _require(self.quantiles >= 1, "detect.quantiles", self.quantiles, "at least 1")


@dataclass(frozen=True)
class AtlasSettings:
    """What a neuron's card shows beside its measures: radiographs, neighbours, acquisition."""

    top_images: int = 10
    """Radiographs of highest activation, one a patient (validation split); a candidate shows its naming
    panel."""
    range_images: int = 10
    """Radiographs spread over the activation range, one a patient (test split); a candidate shows its
    detection panel."""
    nearest: int = 8
    """Neurons of nearest decoder direction (cosine)."""
    perplexity: float = 30.0
    """Of the t-SNE that lays the decoder directions out on a plane."""
    seed: int = 0
    """Seed of the draws and of the t-SNE."""

    def __post_init__(self) -> None:
        for name in ("top_images", "range_images", "nearest"):
            value = getattr(self, name)
            _require(value >= 1, f"atlas.{name}", value, "at least 1")
        _require(self.perplexity > 0, "atlas.perplexity", self.perplexity, "above 0")


@dataclass(frozen=True)
class LocaliseSettings:
    """Where in a radiograph a neuron fires, and whether that is where the finding lies. The encoder and its
    resources are those of `embed`."""

    others: int = 20
    """Other neurons whose maps of the same radiograph tell what position alone would hit."""
    seed: int = 0
    """Seed of their draw."""

    def __post_init__(self) -> None:
        _require(self.others >= 1, "localise.others", self.others, "at least 1")


@dataclass(frozen=True)
class ReportSettings:
    """The neuron atlas: a folder of pages that opens from disk."""

    images: Literal["none", "thumbnails", "full"] = "thumbnails"
    """Radiographs in the pages: none, small ones, or up to `full_side` pixels. They leave the run with the
    folder: many data sets' licences forbid to pass them on."""
    thumbnail_side: int = 160
    """Side of a thumbnail, in pixels."""
    full_side: int = 1024
    """Longest side of a full radiograph, in pixels."""
    threads: int = resource(0)
    """Threads that read and shrink radiographs (0: one a core)."""

    def __post_init__(self) -> None:
        for name in ("thumbnail_side", "full_side"):
            value = getattr(self, name)
            _require(32 <= value <= 4096, f"report.{name}", value, "in [32, 4096]")
        _require(self.threads >= 0, "report.threads", self.threads, "0 or above")


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
    until: Literal[
        "radiographs",
        "embed",
        "fit",
        "encode",
        "measure",
        "controls",
        "panels",
        "atlas",
        "localise",
        "name",
        "detect",
        "report",
    ] = "report"
    """Last stage of `pipeline`; up to `localise` none needs a vision-language model, and `medsae report`
    then makes pages without names."""
    dry_run: bool = False
    """`name` and `detect` only print the prompts, images and tokens that they would send."""
    radiographs: RadiographsSettings = RadiographsSettings()
    embed: EmbedSettings = EmbedSettings()
    fit: FitSettings = FitSettings()
    encode: EncodeSettings = EncodeSettings()
    measure: MeasureSettings = MeasureSettings()
    controls: ControlsSettings = ControlsSettings()
    sweep: SweepSettings = field(default_factory=SweepSettings)
    experiment: ExperimentSettings = field(default_factory=ExperimentSettings)
    panels: PanelsSettings = PanelsSettings()
    medgemma: MedgemmaSettings = MedgemmaSettings()
    name: NameSettings = NameSettings()
    detect: DetectSettings = DetectSettings()
    atlas: AtlasSettings = AtlasSettings()
    localise: LocaliseSettings = LocaliseSettings()
    report: ReportSettings = ReportSettings()
    ray: RaySettings = RaySettings()

    def __post_init__(self) -> None:
        _require(bool(self.run.strip()), "run", self.run, "the path or URI of a folder")


def fingerprinted(settings: Any) -> dict[str, Any]:
    """The fields of one stage's settings that change its results, by name."""
    told = {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if not f.metadata.get("resource")
    }
    if isinstance(settings, MedgemmaSettings):
        told["engine"] = {k: v for k, v in settings.engine.items() if k not in ENGINE_RESOURCES}
    return told
