"""Seconds to measure every neuron of a CheXpert-sized test split, and the ratio to a plain loop.

    python benchmarks/measure.py [--images 22000] [--neurons 8192] [--density 0.05]

The plain loop is SciPy's pearsonr and scikit-learn's roc_auc_score for each neuron and label, without
intervals and without a floor, timed on 20 neurons in the same run and extrapolated. The ratio is of CPU
seconds (all threads), which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array
from scipy.stats import pearsonr
from sklearn.metrics import roc_auc_score

from medsae_ray.labels import LABELS
from medsae_ray.measure import ActivationState, measure_units
from medsae_ray.tables import ACTIVATIONS

LOOPED = 20


def batches(images: int, neurons: int, density: float, rng: np.random.Generator) -> list[pa.Table]:
    """Activations of independent neurons, 500 images a table."""
    # Densities differ a hundredfold between neurons, as an SAE's do; their mean is as asked.
    share = np.exp(rng.uniform(np.log(0.01), 0, neurons))
    share = np.minimum(share * density / share.mean(), 1).astype(np.float32)
    tables = []
    for start in range(0, images, 500):
        rows = min(500, images - start)
        row, neuron = np.nonzero(rng.random((rows, neurons), dtype=np.float32) < share)
        offsets = np.searchsorted(row, np.arange(rows + 1)).astype(np.int32)
        value = rng.exponential(size=len(neuron)).astype(np.float32)
        lists = (pa.ListArray.from_arrays(offsets, pa.array(v)) for v in (neuron.astype(np.int32), value))
        ids = pa.array([f"made-{i:016x}" for i in range(start, start + rows)])
        tables.append(pa.table([ids, *lists], schema=ACTIVATIONS))
    return tables


def now() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> str:
    """Seconds since `start`, in words."""
    wall, cpu = now()
    return f"{wall - start[0]:7.1f} s ({cpu - start[1]:.1f} s CPU)"


def main() -> None:
    """Print the seconds of each part, peak memory and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=22_000)
    parser.add_argument("--neurons", type=int, default=8_192)
    parser.add_argument("--density", type=float, default=0.05)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    tables = batches(options.images, options.neurons, options.density, rng)
    y = (rng.random((options.images, 14)) < rng.uniform(0.02, 0.5, 14)).astype(np.float64)
    known = rng.random((options.images, 14)) < 0.95
    patients = rng.integers(0, options.images // 3, options.images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    start = now()
    state = ActivationState(options.neurons)
    for table in tables:
        state.update(table)
    activations = state.finish()
    values = csr_array(activations.values)
    print(f"{options.images:,} images x {options.neurons:,} neurons, {values.nnz / 1e6:.1f} M firing entries")
    print(f"  {'gather and sort':<22} {since(start)}")

    cpu = {}
    for name, permutations, with_auroc in (
        ("r and entropy", 0, False),
        ("r, AUROC, intervals", 0, True),
        ("all, floor of 20", 20, True),
    ):
        start = now()
        measure_units(activations, y, known, patients, permutations=permutations, with_auroc=with_auroc)
        cpu[name] = now()[1] - start[1]
        print(f"  {name:<22} {since(start)}")
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"  {'memory above tables':<22} {peak:7.2f} GiB")

    columns = values[:, :LOOPED].toarray()
    start = now()
    for neuron in range(LOOPED):
        for label in range(len(LABELS)):
            rows = known[:, label]
            pearsonr(columns[rows, neuron], y[rows, label])
            roc_auc_score(y[rows, label], columns[rows, neuron])
    looped = (now()[1] - start[1]) * options.neurons / LOOPED
    print(f"  {'plain loop':<22} {looped:7.0f} s CPU, extrapolated from {LOOPED} neurons")
    print(f"ratio {looped / cpu['r, AUROC, intervals']:.0f} (plain loop / r, AUROC, intervals)")


if __name__ == "__main__":
    main()
