import io

import pytest
import torch
from test_step import sparse_data

from medsae_ray.config import FitSettings
from medsae_ray.errors import InputError
from medsae_ray.sae.stack import Stack, pays
from medsae_ray.sae.training import Fitting, Validation, held_batches

LAMBDAS = (0.0, 0.01, 0.03, 0.1, 0.2, 0.4)
SMALL = FitSettings(
    expansion=4,
    batch_size=64,
    epochs=6,
    evaluate_every=2,
    learning_rate=2e-3,
    resample_every=1,
    dead_after=0.4,
)


def data():
    x, _ = sparse_data(600)
    y = (x[500:, :5] > 0).double()
    return x[:500], Validation(x[500:], y, torch.ones_like(y, dtype=torch.bool))


def fittings(**changes):
    values = {**vars(SMALL), **changes}
    return [
        Fitting(FitSettings(**{**values, "sparsity": sparsity}), n_train=500, embedding_dim=32)
        for sparsity in LAMBDAS
    ]


def without_seconds(history):
    return [{k: v for k, v in row.items() if k not in ("seconds", "split")} for row in history]


@pytest.mark.parametrize("norm", ["unit", "weighted"])
def test_a_path_trained_together_has_the_weights_of_one_by_one(norm):
    train, valid = data()
    alone, together = fittings(decoder_norm=norm), fittings(decoder_norm=norm)
    for fitting in alone:
        assert list(fitting.run(held_batches(train, fitting.settings), valid)) == [True] * 3
    stack = Stack(together)
    assert list(stack.run(held_batches(train, together[0].settings), valid)) == [True] * 3
    for one, other in zip(alone, together, strict=True):
        for name, parameter in one.sae.named_parameters():
            torch.testing.assert_close(getattr(other.sae, name), parameter, rtol=0, atol=1e-4)
        assert torch.equal(one.step.silent_steps, other.step.silent_steps)
        for mine, theirs in zip(without_seconds(one.history), without_seconds(other.history), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5, nan_ok=True)
    assert len({tuple(f.history[-1].items()) for f in together}) == len(LAMBDAS)


def test_resuming_a_stack_is_exact():
    train, valid = data()
    whole, first, resumed = (Stack(fittings(checkpoint_every=5)) for _ in range(3))
    for _ in whole.run(held_batches(train, whole.fittings[0].settings), valid):
        pass
    stops = first.run(held_batches(train, first.fittings[0].settings), valid)
    assert [next(stops) for _ in range(3)] == [False, False, False]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    # The slices are saved by themselves: six SAEs with two moments each, and the losses.
    assert file.tell() < 1.2 * 6 * 3 * sum(p.nbytes for p in whole.fittings[0].sae.parameters())
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in resumed.run(held_batches(train, resumed.fittings[0].settings), valid):
        pass
    for one, other in zip(whole.fittings, resumed.fittings, strict=True):
        assert without_seconds(one.history) == without_seconds(other.history)
        for mine, theirs in zip(one.sae.parameters(), other.sae.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_only_a_path_of_relu_saes_stacks():
    with pytest.raises(InputError, match=r"λ alone train together: set sweep\.together"):
        Stack([*fittings(), *fittings(learning_rate=1e-3)])
    with pytest.raises(InputError, match=r"λ alone"):
        Stack(fittings(architecture="topk"))


def test_pays_tries_both():
    assert pays(fittings(), 64) in (True, False)
