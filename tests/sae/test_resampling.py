import copy

import numpy as np
import pytest
import torch
from scipy import stats

from medsae_ray.sae.architectures import ARCHITECTURES, build
from medsae_ray.sae.base import SAEConfig
from medsae_ray.sae.evaluate import evaluate
from medsae_ray.sae.normaliser import fit
from medsae_ray.sae.resampling import restart_dead_neurons
from medsae_ray.sae.sampling import global_batches, rank_slice
from medsae_ray.sae.step import Schedule, TrainStep

D, M = 6, 20
DEAD = torch.tensor([3, 7, 11, 12])
LIVING = torch.tensor([j for j in range(M) if j not in DEAD.tolist()])
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def batch(n=64, d=D, seed=2):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def trained(architecture="relu", n_steps=3):
    """A step whose optimiser has moments for every parameter."""
    train = TrainStep(build(architecture, SAEConfig(D, M, 0.05, l0=3), seed=1), learning_rate=1e-2)
    for seed in range(n_steps):
        train.step(batch(seed=seed), 64)
    with torch.no_grad():
        # What a neuron that has lain dead for long may look like.
        for name, parameter in train.sae.named_parameters():
            if name not in ("W_dec", "W_enc", "b_dec"):
                parameter[DEAD] = 7.0 if name == "threshold" else -7.0
    return train


def state_of(train):
    return copy.deepcopy((train.sae.state_dict(), train.optimiser.state_dict()["state"]))


def restart(train, x, seed=(0, 0), dead=DEAD):
    restart_dead_neurons(train.sae, train.optimiser, dead, x, seed)


@each_architecture
def test_what_a_restarted_neuron_is(architecture):
    train, x = trained(architecture), batch()
    before, _ = state_of(train)
    restart(train, x)
    sae = train.sae
    rows = sae.W_dec[DEAD].detach()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    centred = x - before["b_dec"]
    cosine = rows @ (centred / centred.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(cosine.max(1).values, torch.ones(4))
    norm = before["W_enc"][:, LIVING].norm(dim=0).mean()
    torch.testing.assert_close(sae.W_enc[:, DEAD].detach(), 0.2 * norm * rows.T)
    for name, parameter in sae.named_parameters():
        if name not in ("W_dec", "W_enc", "b_dec"):
            # A threshold of 0 would let the kernel see half of what it should.
            expected = torch.full((4,), 1e-3 if name == "threshold" else 0.0)
            assert torch.equal(parameter[DEAD], expected), name


@each_architecture
def test_living_neurons_and_their_moments_are_untouched(architecture):
    train = trained(architecture)
    weights, moments = state_of(train)
    restart(train, batch())
    for number, (name, parameter) in enumerate(train.sae.named_parameters()):
        state = train.optimiser.state[parameter]
        axis = 1 if name == "W_enc" else 0
        assert torch.equal(state["step"], moments[number]["step"])
        for kind in ("exp_avg", "exp_avg_sq"):
            assert moments[number][kind].any(), "nothing to compare"
            if name == "b_dec":
                assert torch.equal(state[kind], moments[number][kind])
                continue
            assert not state[kind].index_select(axis, DEAD).any()
            kept = moments[number][kind].index_select(axis, LIVING)
            assert torch.equal(state[kind].index_select(axis, LIVING), kept)
        if name == "b_dec":
            assert torch.equal(parameter, weights[name])
        else:
            kept = weights[name].index_select(axis, LIVING)
            assert torch.equal(parameter.index_select(axis, LIVING), kept)


def test_embeddings_are_drawn_by_their_squared_loss():
    train, x = trained(), batch(8)
    x *= (torch.linspace(1, 2, 8) / x.norm(dim=1))[:, None]
    with torch.no_grad():
        losses = (train.sae(x) - x).double().square().sum(1).numpy()
        directions = x - train.sae.b_dec
    directions /= directions.norm(dim=1, keepdim=True)
    counts = np.zeros(8)
    for seed in range(2000):
        again = copy.deepcopy(train)
        restart(again, x, seed=(5, seed), dead=DEAD[:1])
        drawn = (again.sae.W_dec[DEAD[:1]] @ directions.T).argmax(1)
        counts += np.bincount(drawn.numpy(), minlength=8)
    expected = losses**2 / np.sum(losses**2) * counts.sum()
    assert expected.min() > 5
    assert stats.chisquare(counts, expected).pvalue > 0.001
    # The test can tell it from a draw by the loss itself.
    by_loss = losses / losses.sum() * counts.sum()
    assert stats.chisquare(counts, by_loss).pvalue < 1e-9


def test_an_embedding_far_off_is_drawn_first():
    train, x = trained(), batch(50)
    x[17] *= 100
    restart(train, x, dead=DEAD[:1])
    with torch.no_grad():
        direction = x[17] - train.sae.b_dec
        torch.testing.assert_close(train.sae.W_dec[DEAD[0]], direction / direction.norm())


@pytest.mark.parametrize("dead", [torch.arange(0), torch.arange(M)], ids=["none", "all"])
def test_nothing_happens_with_no_neuron_dead_or_all(dead):
    train = trained()
    before = state_of(train)
    restart(train, batch(), dead=dead)
    torch.testing.assert_close(state_of(train), before, rtol=0, atol=0)


def test_nothing_happens_where_the_loss_is_0_or_not_finite():
    for value in (None, float("nan")):
        train = trained()
        x = batch(4)
        if value is None:
            with torch.no_grad():
                x = train.sae.b_dec.detach().expand(4, D).clone()
                train.sae.b_enc.fill_(-9)
        else:
            x[1, 2] = value
        before = state_of(train)
        restart(train, x)
        torch.testing.assert_close(state_of(train), before, rtol=0, atol=0)


def doomed(schedule, seed=0, d=D, m=M, sparsity=0.05, share=0.6, learning_rate=1e-2):
    """A ReLU SAE of which the first neurons can never fire again: no gradient reaches them."""
    sae = build("relu", SAEConfig(d, m, sparsity), seed=seed)
    with torch.no_grad():
        sae.b_enc[: int(share * m)] = -50
    return TrainStep(sae, learning_rate=learning_rate, schedule=schedule, seed=3)


@pytest.mark.parametrize("world", [2, 3])
def test_every_worker_restarts_the_same_neurons_alike(on_workers, world):
    schedule, x = Schedule(n_steps=20, dead_after=2, resample_every=4), batch(40)

    def work(workers):
        train = doomed(schedule)
        mine = rank_slice(np.arange(40), workers.rank, world)
        restarted = []
        for _ in range(8):
            rows = train.sae.W_dec.detach().clone()
            train.step(x[mine], 40, workers)
            moved = (train.sae.W_dec - rows).norm(dim=1) > 0.3
            restarted.append(moved.nonzero().flatten().tolist())
        return restarted, train

    told = on_workers(world, work)
    alone = doomed(schedule)
    for _ in range(8):
        alone.step(x, 40)
    assert [steps != [] for steps in told[0][0]] == [False] * 3 + [True] + [False] * 4
    assert set(range(12)) <= set(told[0][0][3])
    for restarted, train in told:
        assert restarted == told[0][0]
        for name, tensor in train.sae.state_dict().items():
            assert torch.equal(tensor, told[0][1].sae.state_dict()[name])
            torch.testing.assert_close(tensor, alone.sae.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_lowers_the_dead_share_at_equal_fve():
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(48, 32))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    strength = rng.uniform(0.5, 1.5, (2500, 48)) * (rng.uniform(size=(2500, 48)) < 0.06)
    x = (strength @ directions + 0.01 * rng.normal(size=(2500, 32))).astype(np.float32)
    x = torch.from_numpy(fit(x).apply(x))
    figures = []
    for every in (0, 40):
        schedule = Schedule(n_steps=400, dead_after=8, resample_every=every)
        train = doomed(schedule, d=32, m=96, sparsity=0.15, share=0.7, learning_rate=5e-3)
        for epoch in range(50):
            for rows in global_batches(2000, 250, seed=0, epoch=epoch):
                train.step(x[rows], len(rows))
        figures.append(evaluate(train.sae, x[2000:]))
    without, with_resampling = figures
    assert without.dead >= 0.68
    assert with_resampling.dead < 0.2
    assert with_resampling.fve > without.fve - 0.01


def test_no_two_neurons_start_equal():
    train = trained()
    x = batch(3)
    dead = torch.arange(10)
    anew = restart_dead_neurons(train.sae, train.optimiser, dead, x, (0, 0))
    assert torch.equal(anew, dead)
    rows = train.sae.W_dec[anew].detach()
    assert (rows @ rows.T - torch.eye(10)).max() < 0.99999
    # Each embedding as it is once, and seven in between.
    directions = x - train.sae.b_dec.detach()
    cosine = rows @ (directions / directions.norm(dim=1, keepdim=True)).T
    exact = cosine.max(1).values > 1 - 1e-6
    assert exact.sum() == len(set(cosine[exact].argmax(1).tolist())) == 3
