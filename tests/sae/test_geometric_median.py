import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from medsae_ray.sae.geometric_median import geometric_median


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_general_minimiser(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 4)) + 20 * (rng.uniform(size=(60, 1)) < 0.2)
    ours = geometric_median(torch.from_numpy(x), tolerance=1e-10, max_iterations=5000, batch_size=17).numpy()

    def distance(point):
        return np.linalg.norm(x - point, axis=1).sum()

    best = minimize(distance, x.mean(0), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(ours, best.x, atol=1e-5)
    assert distance(ours) <= best.fun + 1e-9


def test_resists_outliers():
    x = torch.cat([torch.randn(99, 3), torch.full((1, 3), 1e6)])
    assert geometric_median(x).norm() < 1
    assert x.mean(0).norm() > 1e4


def test_start_on_a_data_point():
    # The mean is itself a row here, once a wrong point to stay on and once the right one.
    line = torch.tensor([[0.0], [0.0], [0.0], [4.0], [16.0]])
    assert line.mean() == 4
    assert geometric_median(line, tolerance=1e-12, max_iterations=2000).item() == pytest.approx(0, abs=1e-3)
    cross = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert torch.equal(geometric_median(cross), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(geometric_median(torch.ones(4, 2)), torch.ones(2, dtype=torch.float64))
