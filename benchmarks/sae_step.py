"""How fast one SAE training step is beside a plain one: `python benchmarks/sae_step.py [--threads 2]`.

Plain is what a first version would be: autograd, the constraint by two formulas, `torch.optim.Adam` as is.
Both take turns on the same batch, so that whatever else the machine does slows both; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from medsae_ray.sae.base import SAEConfig
from medsae_ray.sae.relu import ReLUSAE
from medsae_ray.sae.step import TrainStep

EMBEDDING_DIM = 512
SHAPES = ((8192, 1024), (4096, 512))
"""(neurons, batch): the paper's shape and the demo's."""


def plain_step(config: SAEConfig, learning_rate: float) -> Callable[[torch.Tensor], object]:
    """The same arithmetic by autograd."""
    sae = ReLUSAE(config)
    adam = torch.optim.Adam(sae.parameters(), lr=learning_rate)

    def step(x: torch.Tensor) -> None:
        adam.zero_grad()
        sae.loss(x).loss.backward()
        with torch.no_grad():
            rows, gradient = sae.W_dec, sae.W_dec.grad
            assert gradient is not None
            gradient -= (gradient * rows).sum(1, keepdim=True) * rows
            adam.step()
            rows /= rows.norm(dim=1, keepdim=True)

    return step


def synchronised_ms(step: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    """Milliseconds of one step, waiting for the GPU where there is one."""
    start = time.perf_counter()
    step(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Print a line a shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for n_neurons, batch in SHAPES:
        config = SAEConfig(EMBEDDING_DIM, n_neurons, sparsity=1e-2)
        x = torch.randn(batch, EMBEDDING_DIM) / EMBEDDING_DIM**0.5
        train = TrainStep(ReLUSAE(config), learning_rate=1e-4)
        steps = (lambda x, train=train: train.step(x, len(x))), plain_step(config, 1e-4)
        for step in steps:
            step(x)
        pairs = [[synchronised_ms(step, x) for step in steps] for _ in range(options.steps)]
        ours, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
        print(
            f"{n_neurons} neurons, batch {batch}, {options.threads} threads: "
            f"{ours:.0f} ms a step, plain {plain:.0f} ms, plain / ours {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
