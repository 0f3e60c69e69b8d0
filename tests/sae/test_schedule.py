import pytest
import torch

from medsae_ray.sae.base import SAEConfig
from medsae_ray.sae.relu import ReLUSAE
from medsae_ray.sae.step import Schedule, TrainStep
from medsae_ray.sae.topk import TopKSAE


def test_nothing_changes_by_default():
    schedule = Schedule()
    for step in (0, 1, 10**6):
        assert (schedule.sparsity_share(step), schedule.rate_share(step)) == (1.0, 1.0)
        assert not schedule.resamples(step)


def test_sparsity_rises_linearly_and_stays():
    schedule = Schedule(sparsity_warmup=4)
    assert [schedule.sparsity_share(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_learning_rate_rises_stays_and_falls():
    schedule = Schedule(n_steps=10, warmup=2, decay=4)
    expected = [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [schedule.rate_share(step) for step in range(10)] == expected
    # Steps past the end, should there be any, still learn.
    assert schedule.rate_share(10) == schedule.rate_share(50) == 0.25


def test_warm_up_and_decay_may_meet():
    schedule = Schedule(n_steps=4, warmup=2, decay=2)
    assert [schedule.rate_share(step) for step in range(4)] == [0.5, 1, 1, 0.5]


@pytest.mark.parametrize(
    ("every", "n_steps", "expected"), [(3, 20, [3, 6, 9]), (5, 20, [5, 10]), (0, 20, []), (11, 20, [])]
)
def test_dead_neurons_restart_up_to_half_of_the_training(every, n_steps, expected):
    schedule = Schedule(n_steps=n_steps, resample_every=every)
    assert [step for step in range(n_steps + 1) if schedule.resamples(step)] == expected


def test_the_optimiser_gets_the_rate_and_the_loss_its_sparsity():
    sae = ReLUSAE(SAEConfig(4, 8, sparsity=0.4))
    schedule = Schedule(n_steps=6, sparsity_warmup=3, warmup=2, decay=2)
    train = TrainStep(sae, learning_rate=0.01, schedule=schedule)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    rates, weights = [], []
    for _ in range(6):
        before = sae.b_dec.detach().clone()
        parts = train.step(x, 16)
        rates.append(train.optimiser.param_groups[0]["lr"])
        weights.append(float((parts.loss - parts.reconstruction) / parts.sparsity))
        # Adam moves a parameter by about the rate at first.
        if len(rates) == 1:
            torch.testing.assert_close((sae.b_dec - before).abs().detach(), torch.full((4,), 0.005))
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01, 0.005])
    assert weights == pytest.approx([0.4 / 3, 0.8 / 3, 0.4, 0.4, 0.4, 0.4], rel=1e-4)


@pytest.mark.parametrize("dead_after", [0, 1, 3])
def test_a_neuron_is_dead_after_so_many_silent_steps(dead_after):
    sae = TopKSAE(SAEConfig(4, 8, l0=8, auxk=0.0))
    train = TrainStep(sae, learning_rate=1e-9, schedule=Schedule(dead_after=dead_after))
    with torch.no_grad():
        sae.b_enc.fill_(9)
        sae.b_enc[2] = -99
    seen = []
    for step in range(6):
        if step == 4:
            with torch.no_grad():
                sae.b_enc[2] = 9
        train.step(torch.zeros(3, 4), 3)
        seen.append(None if sae.dead is None else sae.dead.nonzero().flatten().tolist())
    # The mask of a step is what the steps before it say: firing again at step 4 tells from step 5 on.
    expected = {0: [None] * 6, 1: [[]] + [[2]] * 4 + [[]], 3: [[], [], [], [2], [2], []]}
    assert seen == expected[dead_after]


def test_a_neuron_that_fires_on_another_worker_is_not_dead(on_workers):
    def work(workers):
        sae = TopKSAE(SAEConfig(2, 2, l0=1))
        train = TrainStep(sae, learning_rate=1e-9, schedule=Schedule(dead_after=1))
        with torch.no_grad():
            sae.W_enc.copy_(torch.eye(2))
        # Each worker's slice fires a neuron of its own.
        for _ in range(2):
            train.step(torch.eye(2)[[workers.rank]], 2, workers)
        return sae.dead.tolist()

    assert on_workers(2, work) == [[False, False]] * 2
