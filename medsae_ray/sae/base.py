"""What every sparse autoencoder (SAE) is to the trainer, the measures and the files.

An architecture is a subclass of `SparseAutoencoder` that says how it encodes and what it minimises. Training
goes through `write_gradients` alone: the one here lets autograd work on `objective`, and a subclass may put
a hand-written backward pass in its place.

Shapes: batch B, embedding d, neurons m; x [B, d], z [B, m], W_enc [d, m], W_dec [m, d].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import nn

from medsae_ray.config import DEFAULT_L0
from medsae_ray.errors import InputError
from medsae_ray.sae.workers import ALONE, Workers

Architecture = Literal["relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"]

DecoderNorm = Literal["unit", "weighted"]
"""What keeps neurons from dodging an L1 penalty by small z and large W_dec: "unit" holds the rows of W_dec at
norm 1; "weighted" leaves them free and penalises z · ‖W_dec row‖ (April 2024 update of Bricken et al.)."""

Reduction = Literal["sum", "mean"]
"""Whether ‖x − x̂‖² is summed over the d dimensions (the authors' library) or averaged: λ depends on it."""


@dataclass(frozen=True)
class SAEConfig:
    """Shape and objective of an SAE. InputError where a value is out of range."""

    embedding_dim: int
    """d, the width of the embedding."""
    n_neurons: int
    """m, expansion × d."""
    sparsity: float = 3e-4
    """λ ≥ 0, the weight of the sparsity term; what it does depends on `reduction` and the normalisation."""
    decoder_norm: DecoderNorm = "unit"
    reduction: Reduction = "sum"
    l0: int | None = None
    """k of TopK, BatchTopK and Matryoshka (None: 32); JumpReLU's target, if it has one."""
    bandwidth: float = 1e-3
    """JumpReLU: width ε > 0 of the kernel through which thresholds learn."""
    auxk: float = 1 / 32
    """TopK, BatchTopK, Matryoshka: weight α ≥ 0 of the dead neurons' reconstruction of the error."""

    def __post_init__(self) -> None:
        if self.embedding_dim < 1 or self.n_neurons < 1:
            raise InputError(
                f"An SAE of {self.embedding_dim} dimensions and {self.n_neurons} neurons cannot be built; "
                "both must be at least 1."
            )
        if not 0 <= self.sparsity < float("inf"):
            raise InputError(f"The sparsity weight λ is {self.sparsity}; it must be 0 or more.")
        if self.l0 is not None and not 1 <= self.l0 <= self.n_neurons:
            raise InputError(
                f"l0 is {self.l0}; of {self.n_neurons} neurons between 1 and all can fire on an embedding."
            )

    @property
    def k(self) -> int:
        """Neurons that TopK and its kin let fire on an embedding."""
        return self.l0 if self.l0 is not None else min(DEFAULT_L0, self.n_neurons)


class LossParts(NamedTuple):
    """Means over the batch, as 0-d tensors: reading one as a float waits for the GPU, so do that seldom."""

    loss: torch.Tensor
    """reconstruction + λ · sparsity + auxiliary."""
    reconstruction: torch.Tensor
    sparsity: torch.Tensor
    """The sparsity term before λ; what it is, the architecture says. 0 where there is none."""
    auxiliary: torch.Tensor
    """The auxiliary loss of Gated, or AuxK with its weight; 0 where there is none."""


class SparseAutoencoder(nn.Module):
    """x̂ = z W_dec + b_dec, with z ≥ 0 from `encode`."""

    architecture: ClassVar[Architecture]
    """Name in our settings."""
    saelens_name: ClassVar[str]
    """SAELens's name of the class that reads it."""
    has_sparsity: ClassVar[bool] = True
    """Whether λ means something to it."""

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, config: SAEConfig, *, centre: torch.Tensor | None = None, seed: int = 0) -> None:
        """Seeded initialisation, equal on every worker; b_dec starts at `centre` [d] (default 0)."""
        super().__init__()
        self.config = config
        d, m = config.embedding_dim, config.n_neurons
        rows = torch.randn(m, d, generator=torch.Generator().manual_seed(seed))
        rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter((rows.T * self.encoder_scale()).contiguous())
        self.b_dec = nn.Parameter(
            torch.zeros(d) if centre is None else centre.to("cpu", torch.float32).clone()
        )
        check_width(self, self.b_dec.numel())
        self.dead: torch.Tensor | None = None
        """Which neurons are dead in training, bool [m], as the trainer tells before each step."""
        self._scratch: dict[str, torch.Tensor] = {}

    def encoder_scale(self) -> float:
        """What the rows of W_dec are multiplied by to start W_enc.

        Half of m random neurons fire on any x, and Σ z·w over them is m/(2d) · x: this factor makes x̂ ≈ x
        at the start, so that training begins with sparsifying instead of undoing an m/(2d)-fold overshoot.
        """
        return 2 * self.config.embedding_dim / self.config.n_neurons

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Activations z ≥ 0 [B, m] of x [B, d], as at inference."""
        raise NotImplementedError

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Reconstruction x̂ [B, d] of z [B, m]."""
        return torch.addmm(self.b_dec, z, self.W_dec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction x̂ [B, d] of x [B, d]."""
        return self.decode(self.encode(x))

    def penalty(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Sum over the rows of x [B, d], with activations z [B, m], of what λ weighs; float64, 0-d."""
        return torch.zeros((), dtype=torch.float64, device=x.device)

    def objective(
        self, x: torch.Tensor, sparsity: float, n: int, workers: Workers = ALONE
    ) -> tuple[torch.Tensor, LossParts, torch.Tensor]:
        """What training minimises, on this worker's slice x [b, d] of a global batch of n embeddings.

        Returns a 0-d tensor whose gradients, summed over the workers, are those of the loss of the whole
        batch; this slice's share of the loss parts; and how often each neuron fired, [m]. `sparsity` is λ.
        """
        raise NotImplementedError

    def loss(self, x: torch.Tensor, sparsity: float | None = None) -> LossParts:
        """The training loss on x [B, d] as one batch, differentiable; `sparsity` is λ if not yet full."""
        weight = self.config.sparsity if sparsity is None else sparsity
        return self.objective(x, weight, len(x))[1]

    def write_gradients(
        self, x: torch.Tensor, sparsity: float, n: int, workers: Workers = ALONE
    ) -> tuple[LossParts, torch.Tensor]:
        """Write the gradient of `objective` into every parameter's `.grad`, which must exist.

        Returns this slice's share of the loss parts, and how often each neuron fired on it, [m].
        """
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        with torch.enable_grad():
            objective, parts, fired = self.objective(x, sparsity, n, workers)
        objective.backward()
        return LossParts(*(part.detach() for part in parts)), fired

    def terms(self, n: int) -> int:
        """What sums of squares over n embeddings are divided by."""
        return n * (1 if self.config.reduction == "sum" else self.config.embedding_dim)

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """With unit rows, remove from each decoder row's gradient the part along the row.

        That part would only change the norm, which `constrain` undoes, but Adam's moments would keep it.
        """
        if self.config.decoder_norm == "unit" and self.W_dec.grad is not None:
            along = torch.einsum("md,md->m", self.W_dec.grad, self.W_dec)
            self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def constrain(self) -> None:
        """With unit rows, bring the rows of W_dec back to norm 1."""
        if self.config.decoder_norm == "unit":
            self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp(min=1e-30))

    @torch.no_grad()
    def restart_neurons(self, neurons: torch.Tensor, directions: torch.Tensor, scale: float) -> None:
        """Let neurons [r] start anew: decoder rows `directions` [r, d] of norm 1, encoder `scale` × these."""
        self.W_dec[neurons] = directions
        self.W_enc[:, neurons] = scale * directions.T
        for name, parameter in self.named_parameters():
            if name not in ("W_dec", "W_enc", "b_dec"):
                parameter[neurons] = 0

    @torch.no_grad()
    def export(self) -> dict[str, torch.Tensor]:
        """Weights by SAELens's names, float64 on the CPU, still for normalised embeddings."""
        return {name: tensor.detach().cpu().double() for name, tensor in self.state_dict().items()}

    def describe(self) -> dict[str, object]:
        """Keys of SAELens's `cfg.json` that only this architecture has."""
        return {}

    def scratch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A [b, m] matrix kept between steps: fresh ones of that size cost a page fault every 4 kB."""
        kept = self._scratch.get(name)
        if kept is None or len(kept) < len(x) or kept.device != x.device:
            kept = self._scratch[name] = x.new_empty(len(x), self.config.n_neurons)
        return kept[: len(x)]


def check_width(sae: SparseAutoencoder, embedding_dim: int) -> None:
    """InputError unless the SAE takes embeddings of `embedding_dim`."""
    if sae.config.embedding_dim != embedding_dim:
        raise InputError(
            f"The SAE takes embeddings of {sae.config.embedding_dim} dimensions but these have "
            f"{embedding_dim}; use the encoder it was trained on, or fit an SAE to these embeddings."
        )
