import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsae_ray.errors import InputError
from medsae_ray.sae.base import SAEConfig
from medsae_ray.sae.evaluate import evaluate
from medsae_ray.sae.geometric_median import geometric_median
from medsae_ray.sae.normaliser import fit
from medsae_ray.sae.relu import ReLUSAE
from medsae_ray.sae.sampling import global_batches, rank_slice
from medsae_ray.sae.step import Schedule, TrainStep
from medsae_ray.sae.workers import Workers


def sparse_data(n=2000, d=32, n_features=48, active=0.06, seed=0):
    """Sparse non-negative mixtures of fixed unit directions: what an SAE should take apart."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(n_features, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    strength = rng.uniform(0.5, 1.5, (n, n_features)) * (rng.uniform(size=(n, n_features)) < active)
    x = (strength @ directions + 0.01 * rng.normal(size=(n, d)) + 0.3).astype(np.float32)
    return torch.from_numpy(fit(x).apply(x)), directions


def train_step(norm="unit", sparsity=1e-2, warmup=20, d=32, m=128, seed=0):
    sae = ReLUSAE(SAEConfig(d, m, sparsity, norm), seed=seed)
    return TrainStep(sae, learning_rate=2e-3, schedule=Schedule(sparsity_warmup=warmup))


@pytest.mark.parametrize("norm", ["unit", "weighted"])
def test_equals_autograd_with_torch_adam(norm):
    x, _ = sparse_data(256)
    train = train_step(norm)
    plain = ReLUSAE(train.sae.config)
    adam = torch.optim.Adam(plain.parameters(), lr=2e-3, fused=False, foreach=False)
    for step in range(30):
        parts = train.step(x, len(x))
        adam.zero_grad()
        expected = plain.loss(x, sparsity=1e-2 * min(1, (step + 1) / 20))
        expected.loss.backward()
        if norm == "unit":
            rows = plain.W_dec.detach()
            plain.W_dec.grad -= (plain.W_dec.grad * rows).sum(1, keepdim=True) * rows
        adam.step()
        if norm == "unit":
            plain.W_dec.data /= plain.W_dec.data.norm(dim=1, keepdim=True)
        torch.testing.assert_close(parts.loss, expected.loss.detach(), rtol=1e-5, atol=1e-6)
    for ours, reference in zip(train.sae.parameters(), plain.parameters(), strict=True):
        # Adam divides small gradients by their own size, which magnifies rounding.
        torch.testing.assert_close(ours, reference, rtol=0, atol=5e-4)


@pytest.mark.parametrize("world", [2, 3])
def test_workers_with_slices_give_the_loss_curve_of_one(world):
    x, _ = sparse_data(1000)
    batches = [batch for epoch in range(7) for batch in global_batches(1000, 70, seed=3, epoch=epoch)][:100]
    shares = [torch.empty(0)] * world
    barrier = threading.Barrier(world)

    def work(rank):
        class Threads(Workers):
            def sum(self, tensor):
                shares[rank] = tensor.clone()
                barrier.wait(60)
                tensor.copy_(torch.stack(shares).sum(0))
                barrier.wait(60)

        workers, train = Threads(), train_step()
        workers.rank, workers.world = rank, world
        curve = [
            torch.stack(train.step(x[rank_slice(batch, rank, world)], len(batch), workers))
            for batch in batches
        ]
        return torch.stack(curve), train

    alone = train_step()
    expected = torch.stack([torch.stack(alone.step(x[batch], len(batch))) for batch in batches])
    with ThreadPoolExecutor(world) as pool:
        curves, trains = zip(*pool.map(work, range(world)), strict=True)
    assert expected.shape == (100, 4)
    for curve, train in zip(curves, trains, strict=True):
        torch.testing.assert_close(curve, expected, rtol=1e-4, atol=1e-6)
        for ours, first in zip(train.sae.parameters(), trains[0].sae.parameters(), strict=True):
            assert torch.equal(ours, first)


def test_an_empty_slice_contributes_nothing():
    x, _ = sparse_data(8)
    shares: list[torch.Tensor] = []

    class Kept(Workers):
        def sum(self, tensor):
            shares.append(tensor.clone())

    train_step().step(x[:0], 8, Kept())
    assert not shares[0].any()


def test_resuming_is_bit_identical(tmp_path):
    x, _ = sparse_data(500)
    batches = list(global_batches(500, 64, seed=0, epoch=0))
    whole = train_step()
    for batch in batches:
        whole.step(x[batch], len(batch))

    first = train_step()
    for batch in batches[:4]:
        first.step(x[batch], len(batch))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = train_step(seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.n_steps == 4
    for batch in batches[4:]:
        resumed.step(x[batch], len(batch))
    for ours, reference in zip(resumed.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(ours, reference)


def test_a_loaded_state_is_a_copy():
    x, _ = sparse_data(64)
    source, target = train_step(), train_step()
    source.step(x, 64)
    target.load_state_dict(source.state_dict())
    before = copy.deepcopy(source.state_dict())
    target.step(x, 64)
    for key, moments in before["optimiser"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(source.state_dict()["optimiser"]["state"][key][name], tensor)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 40), n_steps=st.integers(1, 5))
def test_rows_stay_of_unit_norm(seed, rows, n_steps):
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))
    train = train_step(seed=seed)
    for _ in range(n_steps):
        train.step(x, rows)
    torch.testing.assert_close(train.sae.W_dec.detach().norm(dim=1), torch.ones(128))


def test_sparsity_warms_up_linearly():
    train, seen = train_step(sparsity=0.4, warmup=4), []
    for _ in range(6):
        seen.append(train.sparsity)
        train.step(torch.ones(2, 32), 2)
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert train_step(sparsity=0.4, warmup=0).sparsity == 0.4


def test_learning_rate_must_be_positive():
    with pytest.raises(InputError, match="learning rate"):
        TrainStep(ReLUSAE(SAEConfig(4, 8)), learning_rate=0.0)


def test_takes_sparse_data_apart():
    x, directions = sparse_data(4000)
    sae = ReLUSAE(SAEConfig(32, 128, 0.15), centre=geometric_median(x[:3500]))
    train = TrainStep(sae, learning_rate=2e-3, schedule=Schedule(sparsity_warmup=50))
    for epoch in range(60):
        for batch in global_batches(3500, 256, seed=0, epoch=epoch):
            train.step(x[batch], len(batch))
    figures = evaluate(sae, x[3500:])
    assert figures.fve > 0.9
    assert figures.l0 < 15
    # Most of the planted directions have a neuron of nearly their direction.
    cosine = np.abs(directions @ sae.W_dec.detach().numpy().T).max(1)
    assert np.mean(cosine > 0.95) > 0.8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_on_the_gpu_equals_one_on_the_cpu():
    x, _ = sparse_data(256)
    losses = []
    for device in ("cpu", "cuda"):
        step = train_step()
        moved = TrainStep(step.sae.to(device), learning_rate=1e-3, schedule=Schedule(sparsity_warmup=20))
        losses.append([float(moved.step(x.to(device), len(x)).loss) for _ in range(5)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
