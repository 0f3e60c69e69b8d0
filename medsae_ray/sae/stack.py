"""SAEs of one shape that differ in λ, trained together: one matrix product for all where there were several.

Their parameters, gradients and moments become slices of tensors [S, …], so that each stays a `Fitting` that
can be judged, saved and resumed by itself. Small SAEs gain, and on a GPU larger ones too: see `pays`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from medsae_ray.errors import InputError
from medsae_ray.sae.relu import ReLUSAE
from medsae_ray.sae.training import Batches, Fitting, Validation

TIMED_STEPS = 6


class Stack:
    """Fittings of ReLU SAEs that differ in λ alone, on one worker; the weights are as one by one."""

    def __init__(self, fittings: Sequence[Fitting]) -> None:
        """InputError unless they can share their steps."""
        first = fittings[0].settings
        for fitting in fittings:
            if not isinstance(fitting.sae, ReLUSAE) or replace(fitting.settings, sparsity=0) != replace(
                first, sparsity=0
            ):
                raise InputError(
                    "Only ReLU SAEs whose settings differ in λ alone train together: set sweep.together to "
                    "never."
                )
        self.fittings = list(fittings)
        self._bind()

    def _bind(self) -> None:
        """Move parameters, gradients and moments into stacked tensors, of which the SAEs keep slices."""
        steps = [fitting.step for fitting in self.fittings]
        self._parameters, moments = {}, {}
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            own = [getattr(step.sae, name) for step in steps]
            stacked = torch.nn.Parameter(torch.stack([parameter.detach() for parameter in own]))
            stacked.grad = torch.zeros_like(stacked)
            self._parameters[name] = stacked
            states = [step.optimiser.state.get(p, {}) for step, p in zip(steps, own, strict=True)]
            moments[name] = [
                torch.stack(
                    [state.get(moment, torch.zeros_like(p)) for state, p in zip(states, own, strict=True)]
                )
                for moment in ("exp_avg", "exp_avg_sq")
            ]
        group = steps[0].optimiser.param_groups[0]
        self._optimiser = torch.optim.Adam(
            self._parameters.values(), lr=group["lr"], betas=group["betas"], fused=True
        )
        done = torch.tensor(float(steps[0].n_steps), device=steps[0].sae.W_enc.device)
        for name, stacked in self._parameters.items():
            first, second = moments[name]
            counted = done.clone()
            self._optimiser.state[stacked] = {"step": counted, "exp_avg": first, "exp_avg_sq": second}
            for i, step in enumerate(steps):
                parameter = getattr(step.sae, name)
                parameter.data, parameter.grad = stacked.data[i], stacked.grad[i]  # type: ignore[index]
                step.optimiser.state[parameter] = {
                    "step": counted, "exp_avg": first[i], "exp_avg_sq": second[i]
                }  # fmt: skip
        self._scratch = torch.empty(0)

    @property
    def history(self) -> list[list[dict[str, Any]]]:
        """That of each fitting."""
        return [fitting.history for fitting in self.fittings]

    @property
    def finished(self) -> bool:
        """Whether every epoch is over."""
        return self.fittings[0].finished

    def run(self, batches: Batches, valid: Validation) -> Iterator[bool]:
        """As `Fitting.run`, for all of them on the same batches."""
        first = self.fittings[0]
        every = first.settings.checkpoint_every
        started = time.monotonic() - first.seconds
        while not self.finished:
            for rows, n in batches(first.epoch, first.batch):
                self.step(rows, n)
                if every and first.step.n_steps % every == 0:
                    for fitting in self.fittings:
                        fitting.seconds = time.monotonic() - started
                    yield False
            ends = [f.end_epoch(valid, time.monotonic() - started) for f in self.fittings]
            if ends[0]:
                yield True

    @torch.no_grad()
    def step(self, x: torch.Tensor, n: int) -> None:
        """Train every SAE on one batch x [n, d]: as `ReLUSAE.write_gradients` and `TrainStep.step` do."""
        steps = [fitting.step for fitting in self.fittings]
        config = steps[0].sae.config
        W_enc, b_enc, W_dec, b_dec = (parameter.data for parameter in self._parameters.values())
        g_W_enc, g_b_enc, g_W_dec, g_b_dec = (
            parameter.grad for parameter in self._parameters.values() if parameter.grad is not None
        )
        if self._scratch.shape[2:3] != (n,) or self._scratch.device != x.device:
            self._scratch = x.new_empty(2, len(steps), n, config.n_neurons)
        z, grad_z = self._scratch
        sparsity = torch.tensor([step.sparsity for step in steps], device=x.device)
        terms = steps[0].sae.terms(n)

        centred = x - b_dec[:, None]
        torch.baddbmm(b_enc[:, None], centred, W_enc, out=z).relu_()
        error = torch.baddbmm(b_dec[:, None], z, W_dec).sub_(x)
        reconstruction = error.square().sum((1, 2)) / terms
        z_sums = z.sum(1)
        unit = config.decoder_norm == "unit"
        weights = torch.ones_like(z_sums) if unit else torch.linalg.vector_norm(W_dec, dim=2)
        penalty = (z_sums * weights).sum(1) / n
        error *= 2 / terms
        torch.bmm(z.mT, error, out=g_W_dec)
        torch.sum(error, 1, out=g_b_dec)
        each = (sparsity / n)[:, None]
        if not unit:
            g_W_dec.addcmul_((each * z_sums / weights.clamp(min=1e-30))[..., None], W_dec)
        torch.bmm(error, W_dec.mT, out=grad_z).add_((each * weights)[:, None])
        torch.ops.aten.threshold_backward.grad_input(grad_z, z, 0, grad_input=grad_z)
        torch.bmm(centred.mT, grad_z, out=g_W_enc)
        torch.sum(grad_z, 1, out=g_b_enc)
        g_b_dec.sub_((W_enc @ g_b_enc[..., None])[..., 0])

        if unit:
            along = torch.einsum("smd,smd->sm", g_W_dec, W_dec)
            g_W_dec.addcmul_(along[..., None], W_dec, value=-1)
        for group in self._optimiser.param_groups:
            group["lr"] = steps[0].rate
        self._optimiser.step()
        if unit:
            W_dec.div_(torch.linalg.vector_norm(W_dec, dim=2, keepdim=True).clamp(min=1e-30))
        loss = reconstruction + sparsity * penalty
        parts = torch.stack([loss, reconstruction, penalty, torch.zeros_like(loss)], 1)
        for fitting, told, fired in zip(self.fittings, parts, torch.count_nonzero(z, 1), strict=True):
            fitting.step.fired.copy_(fired)
            fitting.step.finish(x, n)
            fitting.observe(told, n)

    def state_dict(self) -> list[dict[str, Any]]:
        """That of each fitting, with tensors of their own: a slice would be saved with the whole stack."""
        return [_owned(fitting.state_dict()) for fitting in self.fittings]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue from `state_dict`."""
        for fitting, state in zip(self.fittings, states, strict=True):
            fitting.load_state_dict(state)
        self._bind()


def pays(fittings: Sequence[Fitting], n: int) -> bool:
    """Whether these train faster together than one by one here, at n embeddings a batch: by trying both.

    The fittings must be new; they are spoilt for training.
    """
    x = torch.randn(n, fittings[0].sae.config.embedding_dim, device=fittings[0].sae.W_enc.device)

    def seconds(step: Any) -> float:
        step()
        started = time.perf_counter()
        for _ in range(TIMED_STEPS):
            step()
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    one_by_one = sum(seconds(lambda f=f: f.step.step(x, n)) for f in fittings)
    stack = Stack(fittings)
    return seconds(lambda: stack.step(x, n)) < one_by_one


def _owned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _owned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_owned(item) for item in value)
    return value
