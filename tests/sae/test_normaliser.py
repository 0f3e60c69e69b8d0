import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsae_ray.errors import InputError
from medsae_ray.sae.normaliser import Normaliser, NormaliserSums, fit


def embeddings(n=300, d=12, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) * rng.uniform(0.1, 3, d) + rng.normal(size=d) * 5).astype(dtype)


@pytest.mark.parametrize(("convention", "target"), [("unit", 1.0), ("dim", 12.0)])
def test_mean_and_mean_squared_norm(convention, target):
    x = embeddings()
    y = fit(x, convention, batch_size=77).apply(x.astype(np.float64))
    assert np.abs(y.mean(0)).max() < 1e-12
    assert np.square(y).sum(1).mean() == pytest.approx(target, rel=1e-12)


def test_apply_and_invert_keep_kind_and_dtype():
    x = embeddings()
    normaliser = fit(x)
    for given_x in (x, x.astype(np.float64), torch.from_numpy(x)):
        y = normaliser.apply(given_x)
        assert type(y) is type(given_x)
        assert y.dtype == given_x.dtype
        np.testing.assert_allclose(
            np.asarray(normaliser.invert(y)), np.asarray(given_x), rtol=1e-5, atol=1e-5
        )


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=6), order=st.randoms(), offset=st.sampled_from([0.0, 1e4]))
def test_any_split_and_order_of_merging_gives_the_same(cuts, order, offset):
    x = embeddings(dtype=np.float64) + offset
    parts = []
    for rows in np.split(x, sorted(cuts)):
        sums = NormaliserSums()
        sums.update(rows)
        parts.append(sums)
    order.shuffle(parts)
    merged = NormaliserSums()
    for part in parts:
        merged.merge(part)
    ours = merged.finish("dim")
    np.testing.assert_allclose(ours.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    assert ours.scale == pytest.approx(np.sqrt(12 / x.var(0).sum()), rel=1e-10)
    assert ours.n == 300


def test_json_is_exact():
    normaliser = fit(embeddings(), "dim")
    again = Normaliser.from_json(normaliser.to_json())
    assert np.array_equal(again.mean, normaliser.mean)
    assert (again.scale, again.convention, again.n) == (normaliser.scale, "dim", 300)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"mu": [0.0], "k": 1.0, "n": 3}',
        '{"mu": [0.0], "k": 1.0, "n": 3, "convention": "other"}',
        '{"mu": [0.0], "k": -1.0, "n": 3, "convention": "unit"}',
        '{"mu": [NaN], "k": 1.0, "n": 3, "convention": "unit"}',
        '{"mu": "x", "k": 1.0, "n": 3, "convention": "unit"}',
    ],
)
def test_unusable_json_names_its_source(text):
    with pytest.raises(InputError, match=r"run/normaliser\.json"):
        Normaliser.from_json(text, "run/normaliser.json")


def test_unusable_embeddings_are_counted():
    x = embeddings()
    x[3, 2], x[7] = np.nan, np.inf
    with pytest.raises(InputError, match="2 of 300"):
        fit(x, batch_size=5)
    with pytest.raises(InputError, match="The 40 training embeddings have no variance"):
        fit(np.full((40, 6), 0.1, np.float32))
    with pytest.raises(InputError, match="The 0 training embeddings"):
        fit(np.zeros((0, 6), np.float32))
    with pytest.raises(InputError, match="7 dimensions but the normaliser was fitted on 12"):
        fit(embeddings()).apply(np.zeros((2, 7), np.float32))
