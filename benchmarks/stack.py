"""Whether six SAEs of a λ path cost less together than one by one: `python benchmarks/stack.py`.

Both ways train the same six on the same batches, in turns; a shape's line tells seconds for six times
`--steps` steps each way, their ratio, and the largest difference between the weights they end with.
"""

from __future__ import annotations

import argparse
import time

import torch

from medsae_ray.config import FitSettings
from medsae_ray.sae.stack import Stack
from medsae_ray.sae.training import Fitting

EMBEDDING_DIM = 512
SHAPES = ((8, 256), (2, 128), (1, 64), (16, 1024))
"""(expansion, batch): the demo's, the sweep demo's, a small one, the paper's."""
LAMBDAS = (1e-3, 3e-3, 1e-2, 3e-2, 6e-2, 1e-1)


def path(expansion: int, batch: int, device: str) -> list[Fitting]:
    """Six new fittings."""
    settings = [
        FitSettings(expansion=expansion, batch_size=batch, sparsity=sparsity, learning_rate=1e-4)
        for sparsity in LAMBDAS
    ]
    return [Fitting(s, n_train=5000, embedding_dim=EMBEDDING_DIM, device=device) for s in settings]


def main() -> None:
    """Print a line a shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for expansion, batch in SHAPES:
        alone, stack = path(expansion, batch, options.device), Stack(path(expansion, batch, options.device))
        generator = torch.Generator().manual_seed(0)
        # Fewer steps of larger SAEs, so that every shape takes about as long.
        steps = max(2, options.steps * 2**17 // (expansion * batch * EMBEDDING_DIM))
        told = [0.0, 0.0]
        for _ in range(options.turns + 1):
            x = torch.randn(steps, batch, EMBEDDING_DIM, generator=generator) / EMBEDDING_DIM**0.5
            x = x.to(options.device)
            started = time.perf_counter()
            for fitting in alone:
                for rows in x:
                    fitting.step.step(rows, batch)
            _wait(options.device)
            between = time.perf_counter()
            for rows in x:
                stack.step(rows, batch)
            _wait(options.device)
            # The first turn warms up.
            if fitting.step.n_steps > steps:
                told = [told[0] + between - started, told[1] + time.perf_counter() - between]
        difference = max(
            float((one - other).abs().max().detach())
            for a, b in zip(alone, stack.fittings, strict=True)
            for one, other in zip(a.sae.parameters(), b.sae.parameters(), strict=True)
        )
        print(
            f"{expansion * EMBEDDING_DIM} neurons, batch {batch}, {options.device}, {options.threads} "
            f"threads: one by one {told[0]:.2f} s, together {told[1]:.2f} s, ratio {told[1] / told[0]:.2f}; "
            f"weights differ by {difference:.1e} at most after {stack.fittings[0].step.n_steps} steps"
        )


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
