"""A fit without Ray: interrupted anywhere it goes on bit for bit; its history and its choice."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsae_ray.config import FitSettings
from medsae_ray.sae.architectures import ARCHITECTURES
from medsae_ray.sae.sampling import global_batches
from medsae_ray.sae.step import TrainStep
from medsae_ray.sae.training import Fitting, Validation, held_batches, judge, new_sae, schedule_of

DIM, N_TRAIN, N_VALID = 12, 170, 60


def chosen_settings(architecture, **changed):
    """24 steps in 6 epochs, with every care for dead neurons on."""
    chosen = FitSettings(
        architecture=architecture,
        expansion=4,
        sparsity=0.5,
        l0=None if ARCHITECTURES[architecture].has_sparsity else 3,
        bandwidth=0.1,
        dead_after=0.5,
        resample_every=1.0,
        learning_rate=2e-2,
        batch_size=48,
        epochs=6,
        evaluate_every=2,
        min_firing=2,
        seed=3,
        checkpoint_every=1,
    )
    return replace(chosen, **changed)


def embeddings(n, seed):
    x = np.random.default_rng(seed).standard_t(4, (n, DIM)).astype(np.float32)
    return torch.from_numpy(x / np.sqrt((x**2).sum(1).mean()))


TRAIN, CENTRE = embeddings(N_TRAIN, 0), torch.full((DIM,), 0.05)
VALID = Validation(
    embeddings(N_VALID, 1),
    torch.from_numpy((np.random.default_rng(2).uniform(size=(N_VALID, 3)) < 0.4).astype(float)),
    torch.from_numpy(np.random.default_rng(3).uniform(size=(N_VALID, 3)) < 0.9),
)


def fitting_of(chosen):
    return Fitting(chosen, n_train=N_TRAIN, embedding_dim=DIM, centre=CENTRE)


def go_on(fitting):
    return fitting.run(held_batches(TRAIN, fitting.settings), VALID)


def finished(chosen):
    """An undisturbed fit, and whether it had evaluated each time it stopped."""
    fitting = fitting_of(chosen)
    return fitting, list(go_on(fitting))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def assert_identical(ours, reference):
    assert without_seconds(ours.history) == without_seconds(reference.history)
    mine, theirs = ours.step.state_dict(), reference.step.state_dict()
    for name, tensor in theirs["sae"].items():
        assert torch.equal(mine["sae"][name], tensor), name
    for key, moments in theirs["optimiser"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(mine["optimiser"]["state"][key][name], tensor), name
    assert torch.equal(mine["silent_steps"], theirs["silent_steps"])
    assert ours.best[:2] == reference.best[:2]
    for name, tensor in reference.best.weights.items():
        assert torch.equal(ours.best.weights[name], tensor), name
    np.testing.assert_array_equal(ours.density, reference.density)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_interrupted_anywhere_it_goes_on_bit_for_bit(architecture):
    whole, stops = finished(chosen_settings(architecture))
    assert stops.count(True) == 3
    assert stops.count(False) == 24

    @settings(max_examples=5, deadline=None)
    @given(st.sets(st.integers(1, len(stops)), min_size=1, max_size=4))
    def interrupted(stops_at):
        fitting, reached = fitting_of(whole.settings), 0
        for at in sorted(stops_at):
            running = go_on(fitting)
            for _ in range(at - reached):
                next(running)
            # One step more is lost with the process.
            state, reached = through_a_file(fitting.state_dict()), at
            next(running, None)
            fitting = fitting_of(whole.settings)
            fitting.load_state_dict(state)
        list(go_on(fitting))
        if fitting.density is None:
            # It was interrupted after its last evaluation.
            assert max(stops_at) == len(stops)
            fitting.density = whole.density
        assert_identical(fitting, whole)

    interrupted()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_these_settings_restart_neurons_and_need_auxk(architecture):
    whole, _ = finished(chosen_settings(architecture))
    plain, _ = finished(chosen_settings(architecture, resample_every=0.0))
    assert not torch.equal(whole.sae.W_dec, plain.sae.W_dec)
    if not whole.sae.has_sparsity:
        assert sum(row.get("auxiliary", 0) for row in whole.history) > 0


@pytest.mark.parametrize("every", [0, 4, 7])
def test_checkpoints_between_evaluations_change_nothing(every):
    whole, _ = finished(chosen_settings("batchtopk"))
    other, stops = finished(chosen_settings("batchtopk", checkpoint_every=every))
    assert stops.count(True) == 3
    assert stops.count(False) == (24 // every if every else 0)
    assert_identical(other, whole)


@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk"])
def test_training_rows_are_those_of_a_plain_loop_of_steps(architecture):
    chosen = chosen_settings(architecture)
    fitting, _ = finished(chosen)
    sae = new_sae(chosen, DIM, CENTRE)
    step = TrainStep(
        sae, learning_rate=chosen.learning_rate, schedule=schedule_of(chosen, N_TRAIN), seed=chosen.seed
    )
    parts, fired, n = [], torch.zeros(4 * DIM), 0
    rows = iter(row for row in fitting.history if row["split"] == "train")
    for epoch in range(chosen.epochs):
        for batch in global_batches(N_TRAIN, chosen.batch_size, chosen.seed, epoch):
            parts.append(torch.stack(step.step(TRAIN[batch], len(batch))))
            fired, n = fired + step.fired, n + len(batch)
        if epoch % 2 == 1:
            row, means = next(rows), torch.stack(parts).mean(0)
            assert (row["epoch"], row["step"]) == (epoch + 1, 4 * (epoch + 1))
            told = [row[name] for name in ("loss", "reconstruction", "sparsity", "auxiliary")]
            np.testing.assert_allclose(told, means, rtol=1e-5)
            assert row["l0"] == pytest.approx(float(fired.sum()) / n, rel=1e-6)
            assert row["dead"] == pytest.approx(float((fired == 0).sum()) / (4 * DIM), rel=1e-6)
            parts, fired, n = [], torch.zeros(4 * DIM), 0
    assert next(rows, None) is None
    if architecture == "topk":
        assert fitting.history[0]["l0"] == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_best_sae_is_that_of_the_lowest_selection_score(architecture):
    fitting, _ = finished(chosen_settings(architecture, learning_rate=0.05, fve_floor=0.3))
    rows = [row for row in fitting.history if row["split"] == "valid"]
    lowest = min(rows, key=lambda row: row["selection"])
    assert fitting.best.epoch == lowest["epoch"]
    judged, density = judge(fitting.best_sae(), VALID, fitting.settings)
    assert judged == {name: lowest[name] for name in judged}
    assert density.shape == (4 * DIM,)


def test_shares_and_epochs_become_steps():
    chosen = chosen_settings(
        "relu", epochs=50, sparsity_warmup=0.1, learning_rate_warmup=0.05, learning_rate_decay=0.25,
        dead_after=2.0, resample_every=0.5,
    )  # fmt: skip
    schedule = schedule_of(chosen, N_TRAIN)
    assert schedule.n_steps == 200
    assert (schedule.sparsity_warmup, schedule.warmup, schedule.decay) == (20, 10, 50)
    assert (schedule.dead_after, schedule.resample_every) == (8, 2)
