"""Encoder.embed beside the bare network, and layouts beside each other, measured in turn in one run.

    python benchmarks/encoder.py [--device cuda] [--threads 2] [--batches 16 32]

The bare forward is MedCLIP-ResNet-50 as transformers builds it (batch normalisations apart, random weights)
on pixels already scaled; `embed` starts from uint8, has the normalisations folded in, and projects,
normalises and adds up the positions' shares.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from medsae_ray.encoders.medclip import MedClipResNet50, fold_batch_norms


def best_seconds(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least time of each case; the cases take turns, so that a busy machine slows all of them."""
    seconds = dict.fromkeys(cases, float("inf"))
    for _ in range(repeats + 1):  # the first round warms up
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    encoder = MedClipResNet50()
    bare = copy.deepcopy(encoder).to(arguments.device).eval()
    bare_last = copy.deepcopy(bare).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fold_batch_norms(encoder.eval().backbone)
    encoder.place(arguments.device, arguments.precision)
    kind = torch.device(arguments.device).type

    @torch.inference_mode()
    def forward(network: MedClipResNet50, batch: torch.Tensor) -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=arguments.precision == "bfloat16"):
            network.projection(network.feature_map(batch).mean((2, 3)))

    for n in arguments.batches:
        pixels = np.random.default_rng(0).integers(0, 256, (n, 224, 224), dtype=np.uint8)
        x = encoder.normalise(pixels).contiguous()
        x_last = x.contiguous(memory_format=torch.channels_last)
        mask = np.ones(n, bool)

        seconds = best_seconds(
            {
                "bare forward": partial(forward, bare, x),
                "bare forward, channels last": partial(forward, bare_last, x_last),
                "embed": partial(encoder.embed, pixels),
                "embed with shares": partial(encoder.embed, pixels, mask),
            },
            arguments.repeats,
        )
        for name, s in seconds.items():
            ratio = seconds["bare forward"] / s
            print(
                f"batch {n:4d}  {name:28s} {n / s:8.1f} images/s  {ratio:5.2f} x the bare forward", flush=True
            )


if __name__ == "__main__":
    main()
