"""An SAE being fitted: what it is, its steps, its evaluations and its state, without Ray.

Where the batches come from, and where the state is kept, is the caller's: a worker of Ray Train
(stages/fit.py) or a trial of Ray Tune (stages/sweep.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from medsae_ray.config import FitSettings
from medsae_ray.sae.architectures import build
from medsae_ray.sae.base import SAEConfig, SparseAutoencoder
from medsae_ray.sae.evaluate import evaluate, selection_score
from medsae_ray.sae.sampling import global_batches, rank_slice
from medsae_ray.sae.step import Schedule, TrainStep
from medsae_ray.sae.workers import ALONE, Workers

Batches = Callable[[int, int], Iterator[tuple[torch.Tensor, int]]]
"""(epoch, b) → an epoch's global batches from the b-th on: this worker's slice [·, d] and the whole size."""


class Validation(NamedTuple):
    """The split on which a fit is judged: normalised embeddings and labels."""

    x: torch.Tensor
    """float32 [n, d], on the device."""
    y: torch.Tensor
    """float64 [n, L], 0 or 1."""
    known: torch.Tensor
    """bool [n, L]."""


class Best(NamedTuple):
    """The evaluation of lowest selection score so far."""

    selection: float
    epoch: int
    weights: dict[str, torch.Tensor]


def new_sae(
    settings: FitSettings, embedding_dim: int, centre: torch.Tensor | None = None
) -> SparseAutoencoder:
    """The SAE that `settings` ask for, on the CPU. InputError where they do not fit together."""
    config = SAEConfig(
        embedding_dim=embedding_dim,
        n_neurons=settings.expansion * embedding_dim,
        sparsity=settings.sparsity,
        decoder_norm=settings.decoder_norm,
        reduction=settings.reconstruction,
        l0=settings.l0,
        bandwidth=settings.bandwidth,
        auxk=settings.auxk,
    )
    return build(settings.architecture, config, centre=centre, seed=settings.seed)


def schedule_of(settings: FitSettings, n_train: int) -> Schedule:
    """Shares and epochs of `settings` as steps over n_train embeddings."""
    an_epoch = -(-n_train // settings.batch_size)
    n_steps = an_epoch * settings.epochs
    return Schedule(
        n_steps=n_steps,
        sparsity_warmup=int(settings.sparsity_warmup * n_steps),
        warmup=int(settings.learning_rate_warmup * n_steps),
        decay=int(settings.learning_rate_decay * n_steps),
        dead_after=max(1, round(settings.dead_after * an_epoch)),
        resample_every=round(settings.resample_every * an_epoch),
    )


def held_batches(x: torch.Tensor, settings: FitSettings, workers: Workers = ALONE) -> Batches:
    """Batches out of a matrix [n, d] that every worker holds whole."""

    def batches(epoch: int, first: int) -> Iterator[tuple[torch.Tensor, int]]:
        for number, rows in enumerate(global_batches(len(x), settings.batch_size, settings.seed, epoch)):
            if number >= first:
                mine = rank_slice(rows, workers.rank, workers.world)
                yield x[torch.from_numpy(mine).to(x.device)], len(rows)

    return batches


class Fitting:
    """One SAE from its first step to its last; interrupted anywhere, it goes on as if it had not been."""

    def __init__(
        self,
        settings: FitSettings,
        *,
        n_train: int,
        embedding_dim: int,
        centre: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        workers: Workers = ALONE,
    ) -> None:
        """`n_train` embeddings of width `embedding_dim`; b_dec starts at `centre` [d], their median."""
        self.settings = settings
        self.workers = workers
        self.sae = new_sae(settings, embedding_dim, centre).to(device)
        self.step = TrainStep(
            self.sae,
            learning_rate=settings.learning_rate,
            schedule=schedule_of(settings, n_train),
            seed=settings.seed,
        )
        self.epoch = 0
        """Epochs that are over."""
        self.batch = 0
        """Global batches of the present one that are over."""
        self.history: list[dict[str, Any]] = []
        """Rows of the `history` table: after each evaluation one of the training split, one of validation."""
        self.best: Best | None = None
        self.density: np.ndarray | None = None
        """float64 [m], of the last evaluation; None on workers that do not evaluate."""
        self.seconds = 0.0
        """Time spent so far, as of the last stop."""
        # Summed on the device: reading a loss at every step would wait for the GPU.
        self._parts = torch.zeros(4, device=device)
        self._fired = torch.zeros(self.sae.config.n_neurons, device=device)
        self._seen = [0, 0]

    @property
    def finished(self) -> bool:
        """Whether every epoch is over."""
        return self.epoch >= self.settings.epochs

    def run(self, batches: Batches, valid: Validation) -> Iterator[bool]:
        """Train to the end, stopping where a checkpoint is due: True after an evaluation, else False.

        Only worker 0 evaluates and writes `history`. Change nothing while stopped, but keep `state_dict()`.
        """
        settings = self.settings
        started = time.monotonic() - self.seconds
        while not self.finished:
            for rows, n in batches(self.epoch, self.batch):
                self.observe(self.step.step(rows, n, self.workers), n)
                if settings.checkpoint_every and self.step.n_steps % settings.checkpoint_every == 0:
                    self.seconds = time.monotonic() - started
                    yield False
            if self.end_epoch(valid, time.monotonic() - started):
                yield True

    def observe(self, parts: Any, n: int) -> None:
        """Count a step of n embeddings with these loss parts."""
        self._parts += torch.stack(list(parts))
        self._fired += self.step.fired
        self._seen[0] += 1
        self._seen[1] += n
        self.batch += 1

    def end_epoch(self, valid: Validation, seconds: float) -> bool:
        """Begin the next epoch, after an evaluation where one is due; whether one was."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.seconds = seconds
        if self.epoch % self.settings.evaluate_every and not self.finished:
            return False
        if self.workers.rank == 0:
            self._evaluate(valid)
        self._parts.zero_()
        self._fired.zero_()
        self._seen = [0, 0]
        return True

    def _evaluate(self, valid: Validation) -> None:
        n_steps, n = self._seen
        told = {"epoch": self.epoch, "step": self.step.n_steps, "seconds": self.seconds}
        losses = dict(
            zip(
                ("loss", "reconstruction", "sparsity", "auxiliary"),
                (self._parts / n_steps).tolist(),
                strict=True,
            )
        )
        trained = {"l0": float(self._fired.sum() / n), "dead": float((self._fired == 0).float().mean())}
        judged, self.density = judge(self.sae, valid, self.settings)
        self.history += [
            {**told, "split": "train", **losses, **trained},
            {**told, "split": "valid", **judged},
        ]
        if self.best is None or judged["selection"] < self.best.selection:
            weights = {name: tensor.cpu().clone() for name, tensor in self.sae.state_dict().items()}
            self.best = Best(judged["selection"], self.epoch, weights)

    @property
    def best_row(self) -> dict[str, Any]:
        """The row of `history` of the best evaluation; there must have been one."""
        assert self.best is not None
        epoch = self.best.epoch
        return next(row for row in self.history if row["split"] == "valid" and row["epoch"] == epoch)

    def best_sae(self) -> SparseAutoencoder:
        """The SAE as it was at the best evaluation, on the CPU; there must have been one."""
        assert self.best is not None
        sae = new_sae(self.settings, self.sae.config.embedding_dim)
        sae.load_state_dict(self.best.weights)
        return sae.requires_grad_(False).eval()

    def state_dict(self) -> dict[str, Any]:
        """All that an exact continuation needs; `torch.load(weights_only=True)` reads it.

        The order of the embeddings and every draw follow from (seed, epoch, step), so there is no state of a
        random generator in it.
        """
        return {
            "step": self.step.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "history": copy.deepcopy(self.history),
            "best": None if self.best is None else tuple(self.best),
            "seconds": self.seconds,
            "parts": self._parts.clone(),
            "fired": self._fired.clone(),
            "seen": list(self._seen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; the settings must be the same."""
        self.step.load_state_dict(state["step"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.history = copy.deepcopy(state["history"])
        self.best = None if state["best"] is None else Best(*state["best"])
        self.seconds = state["seconds"]
        self._parts.copy_(state["parts"])
        self._fired.copy_(state["fired"])
        self._seen = list(state["seen"])


def judge(
    sae: SparseAutoencoder, valid: Validation, settings: FitSettings
) -> tuple[dict[str, float], np.ndarray]:
    """The figures of a validation row of `history`, and the neurons' densities, float64 [m]."""
    judged = evaluate(sae, valid.x, labels=(valid.y, valid.known), min_firing=settings.min_firing)
    figures = {
        "fve": judged.fve,
        "l0": judged.l0,
        "dead": judged.dead,
        "entropy": judged.entropy,
        "selection": selection_score(judged.entropy, judged.fve, settings.fve_floor),
        "loss": judged.loss,
        "reconstruction": judged.reconstruction,
        "sparsity": judged.sparsity,
    }
    return figures, judged.density
