"""Each architecture's loss and gradients against its paper's formula, written here a second time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsae_ray.errors import InputError
from medsae_ray.sae.architectures import ARCHITECTURES, build
from medsae_ray.sae.base import SAEConfig
from medsae_ray.sae.evaluate import evaluate
from medsae_ray.sae.normaliser import fit
from medsae_ray.sae.sampling import global_batches, rank_slice
from medsae_ray.sae.step import TrainStep
from medsae_ray.sae.topk import smallest_selected
from medsae_ray.sae.workers import ALONE

D, M, N, LAMBDA = 6, 20, 32, 0.07

CASES = {
    "relu": ("relu", {}),
    "relu, mean": ("relu", {"reduction": "mean"}),
    "relu, weighted": ("relu", {"decoder_norm": "weighted"}),
    "gated": ("gated", {}),
    "gated, mean, weighted": ("gated", {"reduction": "mean", "decoder_norm": "weighted"}),
    "jumprelu": ("jumprelu", {"bandwidth": 0.4}),
    "jumprelu, mean, target": ("jumprelu", {"bandwidth": 0.4, "l0": 3, "reduction": "mean"}),
    "topk": ("topk", {"l0": 3}),
    "topk, auxk": ("topk", {"l0": 3, "auxk": 0.3, "reduction": "mean"}),
    "batchtopk": ("batchtopk", {"l0": 3}),
    "batchtopk, auxk": ("batchtopk", {"l0": 3, "auxk": 0.3}),
    "matryoshka": ("matryoshka", {"l0": 3}),
    "matryoshka, auxk": ("matryoshka", {"l0": 3, "auxk": 0.3, "reduction": "mean"}),
}
each_case = pytest.mark.parametrize("case", CASES)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def sae_of(architecture, d=D, m=M, seed=1, dtype=torch.float64, **values):
    """An SAE away from its initialisation: no parameter at 0, rows of free norm where they are free."""
    sae = build(architecture, SAEConfig(d, m, **values), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.2 * (noise.abs() if name == "threshold" else noise)
    sae.constrain()
    return sae.to(dtype)


def case_of(case):
    architecture, values = CASES[case]
    sae = sae_of(architecture, **values)
    if "auxk" in case:
        # More of them than k_aux = 3, and some with negative pre-activations only.
        sae.dead = torch.zeros(M, dtype=torch.bool)
        sae.dead[[0, 4, 5, 11, 19]] = True
        with torch.no_grad():
            sae.b_enc[[4, 19]] = -9
    return sae, batch()


def batch(n=N, d=D, seed=2, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients_of(sae, x, n, workers=ALONE):
    for parameter in sae.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    parts, fired = sae.write_gradients(x, LAMBDA, n, workers)
    return torch.stack(parts), fired, {name: p.grad for name, p in sae.named_parameters()}


# Formulas. Each takes weights w by name, embeddings x [n, d] and the SAE's config, and returns the sums over
# the embeddings of squared errors, sparsity terms and auxiliary squared errors, and the activations [n, m].


def by_relu(w, x, config, dead):
    z = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    weights = w["W_dec"].norm(dim=1) if config.decoder_norm == "weighted" else torch.ones(M)
    return (x - z @ w["W_dec"] - w["b_dec"]).pow(2).sum(), (z * weights).sum(), 0 * z.sum(), z


def by_gated(w, x, config, dead):
    """2404.16014, equations 5-8: W_mag = exp(r_mag) W_gate; x̂_frozen is a copy of the decoder, detached."""
    W_mag = w["W_enc"] * torch.exp(w["r_mag"])[None, :]
    gates = (x - w["b_dec"]) @ w["W_enc"] + w["b_gate"]
    magnitudes = torch.relu((x - w["b_dec"]) @ W_mag + w["b_mag"])
    z = torch.where(gates > 0, magnitudes, 0)
    frozen = {name: w[name].detach() for name in ("W_dec", "b_dec")}
    weights = frozen["W_dec"].norm(dim=1) if config.decoder_norm == "weighted" else torch.ones(M)
    penalty = (torch.relu(gates) * weights).sum()
    auxiliary = (x - torch.relu(gates) @ frozen["W_dec"] - frozen["b_dec"]).pow(2).sum()
    return (x - z @ w["W_dec"] - w["b_dec"]).pow(2).sum(), penalty, auxiliary, z


def auxk(w, pre, error, config, dead):
    """2406.04093, appendix A.2: the d/2 dead neurons of largest pre-activation reconstruct the error."""
    total = 0 * pre.sum()
    if dead is None:
        return total
    for i in range(len(pre)):
        ranked = sorted(dead.nonzero().flatten().tolist(), key=lambda j: -pre[i, j].item())
        rebuilt = sum(torch.relu(pre[i, j]) * w["W_dec"][j] for j in ranked[: D // 2])
        total = total + config.auxk * (error[i].detach() - rebuilt).pow(2).sum()
    return total


def by_topk(w, x, config, dead):
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    fires = torch.zeros_like(pre, dtype=torch.bool)
    for i in range(len(x)):
        fires[i, np.argsort(-pre[i].detach().numpy())[: config.l0]] = True
    z = torch.where(fires & (pre > 0), pre, 0)
    error = x - z @ w["W_dec"] - w["b_dec"]
    return error.pow(2).sum(), 0 * z.sum(), auxk(w, pre, error, config, dead), z


def by_batchtopk(w, x, config, dead, prefixes=(M,)):
    """2412.06410: the k · n largest of the batch; 2503.17547: the errors of all prefixes are added up."""
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    smallest = np.sort(pre.detach().numpy().ravel())[-config.l0 * len(x)]
    z = torch.where((pre >= smallest) & (pre > 0), pre, 0)
    squares = 0
    for width in prefixes:
        error = x - z[:, :width] @ w["W_dec"][:width] - w["b_dec"]
        squares = squares + error.pow(2).sum()
    return squares, 0 * z.sum(), auxk(w, pre, error, config, dead), z


def by_matryoshka(w, x, config, dead):
    return by_batchtopk(w, x, config, dead, prefixes=(1, 2, 5, 10, 20))


def differentiated(formula, w, x, config, dead):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in w.items()}
    squares, penalty, auxiliary, z = formula(leaves, x, config, dead)
    n = len(x)
    terms = n * (D if config.reduction == "mean" else 1)
    parts = [squares / terms, penalty / n, auxiliary / terms]
    loss = parts[0] + LAMBDA * parts[1] + parts[2]
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return torch.stack([loss, *parts]).detach(), z.detach(), dict(zip(leaves, gradients, strict=True))


def jumprelu_by_hand(w, x, config):
    """2407.14435, equations 11, 12 and 40, entry by entry: what plain autograd does not give."""
    w, x, n, width = {name: tensor.numpy() for name, tensor in w.items()}, x.numpy(), len(x), config.bandwidth
    terms = n * (D if config.reduction == "mean" else 1)
    z, squares, penalty = np.zeros((n, M)), 0.0, 0.0
    g = {name: np.zeros_like(array) for name, array in w.items()}
    for i in range(n):
        pre = [(x[i] - w["b_dec"]) @ w["W_enc"][:, j] + w["b_enc"][j] for j in range(M)]
        fires = [pre[j] > w["threshold"][j] for j in range(M)]
        z[i] = [pre[j] if fires[j] else 0 for j in range(M)]
        error = z[i] @ w["W_dec"] + w["b_dec"] - x[i]
        squares += error @ error
        if config.l0 is None:
            penalty += sum(fires)
            slope = LAMBDA / n
        else:
            penalty += (sum(fires) / config.l0 - 1) ** 2
            slope = LAMBDA / n * 2 * (sum(fires) / config.l0 - 1) / config.l0
        g["b_dec"] += 2 / terms * error
        for j in range(M):
            for_z = 2 / terms * (error @ w["W_dec"][j])
            g["W_dec"][j] += 2 / terms * z[i, j] * error
            if fires[j]:
                g["W_enc"][:, j] += for_z * (x[i] - w["b_dec"])
                g["b_enc"][j] += for_z
                g["b_dec"] -= for_z * w["W_enc"][:, j]
            kernel = -0.5 < (pre[j] - w["threshold"][j]) / width < 0.5
            g["threshold"][j] -= for_z * w["threshold"][j] / width * kernel + slope / width * kernel
    parts = [squares / terms, penalty / n, 0.0]
    loss = parts[0] + LAMBDA * parts[1]
    gradients = {name: torch.from_numpy(array) for name, array in g.items()}
    return torch.tensor([loss, *parts], dtype=torch.float64), torch.from_numpy(z), gradients


def reference(sae, x):
    w = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    if sae.architecture == "jumprelu":
        return jumprelu_by_hand(w, x, sae.config)
    formula = globals()[f"by_{sae.architecture}"]
    return differentiated(formula, w, x, sae.config, sae.dead)


@each_case
def test_gradients_are_the_papers(case):
    sae, x = case_of(case)
    expected_parts, expected_z, expected = reference(sae, x)
    parts, fired, gradients = gradients_of(sae, x, N)
    torch.testing.assert_close(parts, expected_parts, rtol=1e-10, atol=1e-12)
    assert torch.equal(fired, (expected_z > 0).sum(0))
    for name, gradient in gradients.items():
        assert expected[name].abs().max() > 1e-3, f"{name}: nothing to compare"
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert ("auxk" in case or sae.architecture == "gated") == bool(parts[3] > 1e-3)


@pytest.mark.parametrize(("n", "world"), [(32, 2), (32, 3), (2, 3)])
@each_case
def test_slices_add_up_to_the_whole_batch(on_workers, case, n, world):
    alone, x = case_of(case)
    parts, fired, gradients = gradients_of(alone, x[:n], n)

    def work(workers):
        sae = case_of(case)[0]
        mine = rank_slice(np.arange(n), workers.rank, world)
        return *gradients_of(sae, x[mine], n, workers), sae

    told = on_workers(world, work)
    torch.testing.assert_close(sum(share[0] for share in told), parts, rtol=1e-10, atol=1e-12)
    assert torch.equal(sum(share[1] for share in told), fired)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sum(share[2][name] for share in told), gradient, rtol=1e-9, atol=1e-11)
    for *_, sae in told:
        for name, buffer in alone.named_buffers():
            assert torch.equal(dict(sae.named_buffers())[name], buffer)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("relu, weighted", {"W_enc", "b_enc", "W_dec", "b_dec"}),
        # A frozen decoder, a detached error and a straight-through threshold have no such slope.
        ("gated", {"W_enc", "b_gate", "b_mag", "r_mag"}),
        ("jumprelu, mean, target", {"W_enc", "b_enc", "W_dec", "b_dec"}),
        ("topk", {"W_enc", "b_enc", "W_dec", "b_dec"}),
        ("batchtopk", {"W_enc", "b_enc", "W_dec", "b_dec"}),
        ("matryoshka", {"W_enc", "b_enc", "W_dec", "b_dec"}),
    ],
)
def test_gradients_by_finite_differences(case, names):
    sae, x = case_of(case)
    _, _, gradients = gradients_of(sae, x, N)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for name, parameter in sae.named_parameters():
        if name not in names:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * direction
                values.append(float(sae.loss(x, sparsity=LAMBDA).loss))
                parameter -= sign * 1e-6 * direction
        slope = (values[0] - values[1]) / 2e-6
        assert float((gradients[name] * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8)
        seen.add(name)
    assert seen == names


@each_case
def test_loss_is_differentiable_with_the_same_gradients(case):
    sae, x = case_of(case)
    _, _, expected = gradients_of(sae, x, N)
    loss = sae.loss(x, sparsity=LAMBDA).loss
    gradients = torch.autograd.grad(loss, list(sae.parameters()))
    for name, gradient in zip(expected, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11)


@each_architecture
def test_activations_and_reconstruction(architecture):
    sae, x = sae_of(architecture, l0=3).requires_grad_(False), batch()
    if architecture in ("batchtopk", "matryoshka"):
        sae.threshold.fill_(0.4)
    w = {name: tensor.numpy() for name, tensor in sae.state_dict().items()}
    shared = (x.numpy() - w["b_dec"]) @ w["W_enc"]
    if architecture == "gated":
        z = (shared + w["b_gate"] > 0) * np.maximum(shared * np.exp(w["r_mag"]) + w["b_mag"], 0)
    elif architecture == "relu":
        z = np.maximum(shared + w["b_enc"], 0)
    elif architecture == "topk":
        pre = shared + w["b_enc"]
        z = np.maximum(np.where(pre >= np.sort(pre, 1)[:, [-3]], pre, 0), 0)
    else:
        pre = shared + w["b_enc"]
        z = np.where(pre > w["threshold"], pre, 0)
    assert 0.05 < (z > 0).mean() < 0.95
    np.testing.assert_allclose(sae.encode(x).numpy(), z, atol=1e-12)
    np.testing.assert_allclose(sae(x).numpy(), z @ w["W_dec"] + w["b_dec"], atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if "topk" not in case and "matryoshka" not in case])
def test_evaluation_tells_the_training_loss_without_its_auxiliary_part(case):
    sae, x = case_of(case)
    with torch.no_grad():
        parts = sae.loss(x.float().double())
    figures = evaluate(sae.float(), x.float(), batch_size=9)
    assert figures.reconstruction == pytest.approx(float(parts.reconstruction), rel=1e-5)
    assert figures.sparsity == pytest.approx(float(parts.sparsity), rel=1e-5)
    assert figures.loss == pytest.approx(float(parts.loss - parts.auxiliary), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, M), shift=st.floats(-3, 3))
def test_topk_fires_k_neurons_or_all_positive_ones(seed, k, shift):
    sae, x = sae_of("topk", l0=k, seed=seed).requires_grad_(False), batch(seed=seed)
    sae.b_enc += shift
    positive = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc > 0).sum(1)
    assert torch.equal((sae.encode(x) > 0).sum(1), positive.clamp(max=k))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, M), shift=st.floats(-3, 3), rows=st.integers(1, 40))
def test_batchtopk_selects_the_largest_of_the_batch(seed, k, shift, rows):
    sae, x = sae_of("batchtopk", l0=k, seed=seed).requires_grad_(False), batch(rows, seed=seed)
    sae.b_enc += shift
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    z = sae.select(pre, rows, ALONE)
    n_selected = min(k * rows, int((pre > 0).sum()))
    assert int((z > 0).sum()) == n_selected
    largest = np.sort(pre.numpy().ravel())[::-1][:n_selected]
    np.testing.assert_array_equal(np.sort(z[z > 0].numpy())[::-1], largest)


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("n_selected", [1, 7, 40, 59, 60])
@pytest.mark.parametrize("shift", [0.0, 2.0, 9.0])
def test_smallest_selected_is_the_same_on_any_number_of_workers(on_workers, world, n_selected, shift):
    pre = batch(12, 5) + shift
    positive = np.sort(pre.numpy()[pre.numpy() > 0])[::-1]
    expected = positive[n_selected - 1] if len(positive) >= n_selected else 0.0
    assert float(smallest_selected(pre, n_selected, ALONE)) == expected

    def work(workers):
        # Worker 0 has few rows: one offer is shorter than what is selected.
        cuts = [0, 1, *np.linspace(1, 12, world).astype(int)[1:]]
        rows = pre[cuts[workers.rank] : cuts[workers.rank + 1]]
        return float(smallest_selected(rows, n_selected, workers))

    assert on_workers(world, work) == [expected] * world


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_inference_threshold_follows_the_smallest_selected(architecture):
    sae = sae_of(architecture, l0=3)
    smallest, expected = [], 0.0
    for step in range(130):
        x = batch(seed=step) * (1 + step / 50)
        pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach().numpy()
        smallest.append(np.sort(pre.ravel())[-3 * N])
        gradients_of(sae, x, N)
        expected = np.mean(smallest) if step < 100 else 0.99 * expected + 0.01 * smallest[-1]
        assert float(sae.threshold) == pytest.approx(expected, rel=1e-9)


def test_matryoshka_prefixes_double_up_to_all_neurons():
    assert build("matryoshka", SAEConfig(512, 8192)).widths == [512, 1024, 2048, 4096, 8192]
    assert build("matryoshka", SAEConfig(2, 3)).widths == [1, 2, 3]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_no_dead_neuron_or_no_weight_means_no_auxiliary_loss(architecture):
    for dead, weight in ((None, 0.3), (torch.zeros(M, dtype=torch.bool), 0.3), (torch.ones(M) > 0, 0.0)):
        sae = sae_of(architecture, l0=3, auxk=weight)
        sae.dead = dead
        assert float(sae.loss(batch()).auxiliary) == 0
        sae.dead = torch.ones(M) > 0
    assert float(sae_of(architecture, l0=3, auxk=0.3).loss(batch()).auxiliary) == 0


@each_architecture
def test_rows_stay_of_unit_norm_and_thresholds_at_0_or_above(architecture):
    sae = sae_of(architecture, sparsity=0.1, l0=3, bandwidth=2.0, dtype=torch.float32)
    train = TrainStep(sae, learning_rate=0.1)
    before = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    for step in range(20):
        train.step(batch(seed=step, dtype=torch.float32), N)
        torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(M))
        if architecture == "jumprelu":
            assert sae.threshold.min() >= 0
    for name, parameter in sae.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} is not trained"
    if architecture == "jumprelu":
        assert (sae.threshold == 0).any()


@pytest.mark.parametrize("architecture", ["gated", "jumprelu", "batchtopk", "matryoshka"])
def test_an_interrupted_training_goes_on_bit_for_bit(architecture):
    def new(seed):
        sae = build(architecture, SAEConfig(D, M, 0.05, l0=3, bandwidth=0.5), seed=seed)
        return TrainStep(sae, learning_rate=1e-2)

    whole, first = new(0), new(0)
    for step in range(6):
        whole.step(batch(seed=step, dtype=torch.float32), N)
        if step < 3:
            first.step(batch(seed=step, dtype=torch.float32), N)
    resumed = new(9)
    resumed.load_state_dict(first.state_dict())
    for step in range(3, 6):
        resumed.step(batch(seed=step, dtype=torch.float32), N)
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[name], tensor), name


def planted(n=3000, d=32, n_features=48, active=0.06):
    """Sparse non-negative mixtures of fixed unit directions, normalised."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(n_features, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    strength = rng.uniform(0.5, 1.5, (n, n_features)) * (rng.uniform(size=(n, n_features)) < active)
    x = (strength @ directions + 0.01 * rng.normal(size=(n, d))).astype(np.float32)
    return torch.from_numpy(fit(x).apply(x)), directions


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("gated", {"sparsity": 0.6}),
        ("jumprelu", {"sparsity": 0.01, "bandwidth": 0.05}),
        ("jumprelu", {"sparsity": 0.05, "bandwidth": 0.05, "l0": 4}),
        ("topk", {"l0": 4}),
        ("batchtopk", {"l0": 4}),
        ("matryoshka", {"l0": 4}),
    ],
)
def test_takes_sparse_data_apart(architecture, values):
    x, directions = planted()
    sae = build(architecture, SAEConfig(32, 96, **values))
    train = TrainStep(sae, learning_rate=1e-2)
    for epoch in range(20):
        for rows in global_batches(2500, 250, seed=0, epoch=epoch):
            train.step(x[rows], len(rows))
    figures = evaluate(sae, x[2500:])
    assert figures.fve > 0.8
    assert figures.l0 < 8
    if "l0" in values:
        assert figures.l0 == pytest.approx(values["l0"], rel=0.25)
    # Most of the planted directions have a neuron of nearly their direction.
    cosine = np.abs(directions @ sae.W_dec.detach().numpy().T).max(1)
    assert np.mean(cosine > 0.9) > (0.4 if architecture == "matryoshka" else 0.6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAEConfig(4, 8, l0=0), "l0 is 0"),
        (lambda: SAEConfig(4, 8, l0=9), "l0 is 9; of 8 neurons"),
        (lambda: SAEConfig(4, 8, sparsity=float("nan")), "sparsity weight λ is nan"),
        (lambda: SAEConfig(0, 8), "0 dimensions and 8 neurons"),
        (lambda: build("lasso", SAEConfig(4, 8)), r"fit\.architecture is 'lasso', but .* relu, gated"),
        *(
            (lambda a=a: build(a, SAEConfig(4, 8, decoder_norm="weighted")), f"{a} has no L1 penalty")
            for a in ("jumprelu", "topk", "batchtopk", "matryoshka")
        ),
    ],
)
def test_what_cannot_be_built_is_said_in_one_sentence(make, message):
    with pytest.raises(InputError, match=message) as error:
        make()
    text = str(error.value)
    assert text.endswith(".")
    assert ". " not in text
    assert "\n" not in text


def test_k_without_a_setting_is_32_or_all_neurons():
    assert SAEConfig(4, 8).k == 8
    assert SAEConfig(4, 64).k == 32
    assert SAEConfig(4, 64, l0=5).k == 5
