"""An SAE's figures and the interval of its entropy, against one-liners of NumPy and scikit-learn."""

import json
import warnings
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score

from medsae_ray.experiments.measured import entropy_interval, measure_sae
from medsae_ray.measure import Activations, entropy_means, measure_units, neurons_table
from medsae_ray.sae.base import SAEConfig
from medsae_ray.sae.relu import ReLUSAE
from medsae_ray.stages.splits import Split
from medsae_ray.statistics import clustered_delong


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ids_of(n: int) -> pa.Array:
    return pa.array([f"made-{i:016x}" for i in range(n)])


class Made(NamedTuple):
    z: np.ndarray
    y: np.ndarray
    known: np.ndarray
    patients: np.ndarray


def made(rng: np.random.Generator, n_patients: int = 100, images: int = 3, neurons: int = 8) -> Made:
    """Labels and neurons of which the patient decides two thirds of the variance."""
    patients = np.repeat(np.arange(n_patients), images)

    def drawn(columns: int) -> np.ndarray:
        of_patient = rng.standard_normal((n_patients, columns))[patients]
        return 0.8 * of_patient + 0.6 * rng.standard_normal((len(patients), columns))

    latent = drawn(14)
    loadings = np.random.default_rng(1).standard_normal((14, neurons)) / 2
    z = np.maximum(latent @ loadings + drawn(neurons) - 1, 0).astype(np.float32)
    return Made(z, (latent > 0.8).astype(np.float64), np.ones(latent.shape, bool), patients)


def awkward(seed: int) -> Made:
    """With dead, rare and constant neurons, unknown labels and labels of one class."""
    rng = np.random.default_rng(seed)
    z, y, known, patients = made(rng, 60)
    known = rng.random(y.shape) < 0.8
    z[:, 0], z[:, 1] = 0, 0.1
    z[:, 2] = np.where(np.arange(len(z)) < 4, 1.7, 0)
    y[:, 1], y[:, 2], known[:, 3] = 0, 1, False
    return Made(z, y, known, patients)


def mean_entropy(z: np.ndarray, y: np.ndarray, known: np.ndarray) -> float:
    """Neuron by neuron; what is constant has no r."""
    entropies = []
    for neuron in z.T.astype(np.float64):
        pairs = [(neuron[k], label[k]) for label, k in zip(y.T, known.T, strict=True)]
        pairs = [(a, b) for a, b in pairs if len(set(a)) > 1 and len(set(b)) > 1]
        if pairs:
            r = np.abs([np.corrcoef(a, b)[0, 1] for a, b in pairs])
            p = r / r.sum()
            entropies.append(-(p * np.log(p)).sum())
    return float(np.mean(entropies))


def interval(data: Made, **changed) -> tuple[float, float]:
    told = {"min_firing": 5, "resamples": 20, "seed": 0} | changed
    return entropy_interval(csr_array(data.z), data.y, data.known, data.patients, **told)


# ---------------------------------------------------------------------------------------------- interval


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("min_firing", [2, 5, 40])
def test_with_one_patient_the_interval_is_the_figure_of_the_neurons_table(seed: int, min_firing: int) -> None:
    # The one patient is drawn once in every resample: each image has weight 1.
    data = awkward(seed)._replace(patients=np.zeros(180, int))
    units = measure_units(Activations(ids_of(180), csr_array(data.z)), *data[1:], permutations=0)
    living = entropy_means(neurons_table(units, units), min_firing=min_firing).living
    assert living.n_units >= 3
    low, high = interval(data, min_firing=min_firing, resamples=2)
    assert low == pytest.approx(living.entropy, abs=1e-9)
    assert high == pytest.approx(living.entropy, abs=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_interval_is_that_of_repeated_images(seed: int) -> None:
    data = awkward(seed)
    rng, drawn = np.random.default_rng(7), []
    kept = data.z[:, (data.z > 0).sum(0) >= 5]
    for _ in range(6):
        times = rng.multinomial(60, np.full(60, 1 / 60))
        rows = np.concatenate([np.repeat(np.flatnonzero(data.patients == p), t) for p, t in enumerate(times)])
        drawn.append(mean_entropy(kept[rows], data.y[rows], data.known[rows]))
    shift = np.mean(drawn) - mean_entropy(kept, data.y, data.known)
    expected = np.quantile(drawn, [0.025, 0.975]) - shift
    np.testing.assert_allclose(interval(data, resamples=6, seed=7), expected, rtol=0, atol=1e-9)


def test_the_names_of_patients_and_the_order_of_images_decide_nothing() -> None:
    data = made(np.random.default_rng(0))
    order = np.random.default_rng(1).permutation(len(data.z))
    other = Made(*(part[order] for part in data))._replace(patients=data.patients[order] * 7 - 30)
    np.testing.assert_allclose(interval(other), interval(data), rtol=0, atol=1e-9)


def test_the_scale_of_a_neuron_decides_nothing() -> None:
    data = made(np.random.default_rng(0))
    small = data._replace(z=data.z * np.float32(2.0**-40))
    np.testing.assert_allclose(interval(small), interval(data), rtol=0, atol=1e-9)


def test_a_seed_gives_the_same_interval_again() -> None:
    data = made(np.random.default_rng(0))
    assert interval(data, seed=3) == interval(data, seed=3)
    assert interval(data, seed=3) != interval(data, seed=4)


def test_it_covers_the_expected_figure() -> None:
    """100 data sets of 300 images of 100 patients."""
    sets = [made(np.random.default_rng([2, i])) for i in range(100)]
    by_patient = np.array([interval(data, resamples=40) for data in sets])
    more = [made(np.random.default_rng([3, i])) for i in range(100)]
    expected = np.mean([mean_of_all(data) for data in sets + more])
    covered = np.mean((by_patient[:, 0] <= expected) & (expected <= by_patient[:, 1]))
    assert 0.85 <= covered <= 0.99
    own = np.array([mean_of_all(data) for data in sets])
    assert ((by_patient[:, 0] < own) & (own < by_patient[:, 1])).all(), "each figure is in its interval"


def test_a_patients_copies_of_an_image_add_nothing() -> None:
    data = made(np.random.default_rng(0), 80, images=1)
    copies = Made(*(np.repeat(part, 3, axis=0) for part in data))
    np.testing.assert_allclose(interval(copies, min_firing=15), interval(data), rtol=0, atol=1e-9)


def mean_of_all(data: Made) -> float:
    z = data.z.astype(np.float64)
    r = np.abs(np.corrcoef(z.T, data.y.T)[: z.shape[1], z.shape[1] :])
    p = r / r.sum(axis=1, keepdims=True)
    return float(-(p * np.log(p)).sum(axis=1).mean())


def test_without_a_neuron_or_a_label_there_is_no_interval() -> None:
    data = made(np.random.default_rng(0), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for nothing in (
            interval(data, min_firing=61),
            interval(data._replace(z=np.zeros_like(data.z)), min_firing=0),
            interval(data._replace(y=np.ones_like(data.y))),
            interval(data._replace(known=np.zeros_like(data.known))),
        ):
            assert np.isnan(nothing).all()


def test_a_resample_without_any_entropy_is_left_out() -> None:
    # Of the patients one alone has positives: a third of the resamples draw none.
    rng = np.random.default_rng(0)
    z = rng.exponential(size=(40, 3)).astype(np.float32)
    y = np.zeros((40, 14))
    y[:4] = rng.random((4, 14)) < 0.5
    low, high = interval(Made(z, y, np.ones(y.shape, bool), np.arange(40) // 4))
    assert 0 < low < high


# ------------------------------------------------------------------------------------------- measure_sae


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    """Raw embeddings off the origin, of which the first directions tell the labels."""
    rng = np.random.default_rng(0)
    found = {}
    for name, n in (("train", 150), ("valid", 300), ("test", 330)):
        patients = rng.integers(0, n // 2, n)
        x = (rng.standard_normal((n, 16)) + 3).astype(np.float32)
        noise, threshold = np.repeat([0.1, 1.5], 7), np.tile(np.linspace(0.3, 1.9, 7), 2)
        y = (x[:, :14] - 3 + noise * rng.standard_normal((n, 14)) > threshold).astype(float)
        found[name] = Split(ids_of(n), x, y, rng.random((n, 14)) < 0.9, patients)
    return found


@pytest.fixture(scope="module")
def sae() -> ReLUSAE:
    """A neuron for each direction of the labels and some others; of these some dead, some rare."""
    made = ReLUSAE(SAEConfig(16, 40, 0.1), centre=torch.full((16,), 3.0), seed=1)
    with torch.no_grad():
        made.W_dec[:14] = torch.eye(16)[:14]
        made.W_enc[:, :14] = torch.eye(16)[:, :14]
        made.b_enc[:14] = -0.5
        made.b_enc[30:35] = -2.0
        made.b_enc[35:] = -100
    return made


def test_an_sae_is_measured_as_one_liners_measure_it(sae: ReLUSAE, splits: dict[str, Split]) -> None:
    measured = measure_sae(sae, splits, min_firing=10, min_positives=30, permutations=5, resamples=20, seed=4)
    with torch.no_grad():
        z = {name: sae.encode(torch.from_numpy(split.x)).numpy() for name, split in splits.items()}
        rebuilt = sae(torch.from_numpy(splits["test"].x)).double().numpy()
    test, x = splits["test"], splits["test"].x.astype(np.float64)
    fve = 1 - ((x - rebuilt) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert measured.fve == pytest.approx(fve, abs=1e-5)
    assert measured.l0 == pytest.approx((z["test"] > 0).sum(1).mean())
    assert measured.dead == np.mean((z["test"] > 0).sum(0) == 0)
    assert measured.dead_train == np.mean((z["train"] > 0).sum(0) == 0)
    assert measured.dead_train != measured.dead, "the fixture tells the splits apart"
    living = (z["test"] > 0).sum(0) >= 10
    assert measured.n_living == living.sum()
    assert living.sum() < (z["test"] > 0).any(0).sum()
    figure = mean_entropy(z["test"][:, living], test.y, test.known)
    assert measured.entropy == pytest.approx(figure, abs=1e-6)
    assert measured.entropy_low < figure < measured.entropy_high
    assert figure + 0.1 < measured.entropy_floor < np.log(14)
    expected = entropy_interval(csr_array(z["test"]), *test[2:], min_firing=10, resamples=20, seed=4)
    np.testing.assert_allclose((measured.entropy_low, measured.entropy_high), expected, atol=1e-5)

    areas, lows, positives = [], [], []
    valid = splits["valid"]
    fires = (z["valid"] > 0).sum(0) >= 10
    for label in range(14):
        rows = valid.known[:, label]
        r = [
            np.corrcoef(z["valid"][rows, i], valid.y[rows, label])[0, 1] if fires[i] else -1
            for i in range(40)
        ]
        score, rows = z["test"][:, int(np.argmax(r))], test.known[:, label]
        areas.append(roc_auc_score(test.y[rows, label], score[rows]))
        lows.append(clustered_delong(score[rows], test.y[rows, label] == 1, test.patients[rows]).low)
        positives.append(test.y[rows, label].sum())
    enough, above = np.array(positives) >= 30, np.array(areas) > 0.8
    separated = enough & above & (np.array(lows) > 0.7)
    assert measured.best_auroc == pytest.approx(np.mean(areas), abs=1e-6)
    assert measured.n_labels == enough.sum()
    assert measured.labels_separated == separated.sum()
    assert measured.share_separated == pytest.approx(separated.sum() / enough.sum())
    assert measured.share_above == pytest.approx((enough & above).sum() / enough.sum())
    assert 0 < (enough & above).sum() < enough.sum() < 14, "the fixture has labels of each kind"
    assert json.loads(json.dumps(asdict(measured))) == asdict(measured), "the experiments keep it as JSON"


def test_an_sae_without_a_firing_neuron_has_no_entropy(sae: ReLUSAE, splits: dict[str, Split]) -> None:
    silent = ReLUSAE(sae.config, centre=torch.full((16,), 3.0))
    with torch.no_grad():
        silent.b_enc -= 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = asdict(measure_sae(silent, splits, min_firing=10, min_positives=500, permutations=2))
    assert (row["dead"], row["dead_train"], row["l0"], row["n_living"]) == (1, 1, 0, 0)
    assert row["fve"] < 0.01
    assert (row["labels_separated"], row["n_labels"]) == (0, 0)
    undefined = ("entropy", "entropy_low", "entropy_high", "entropy_floor", "best_auroc", "share_separated")
    assert np.isnan([row[name] for name in (*undefined, "share_above")]).all()
