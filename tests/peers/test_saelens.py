"""SAELens reads what we export, we read what it saves, and its training classes give the same losses.

Runs in an environment of its own (`make peers`), without Ray.
"""

import importlib
import importlib.metadata
import os
import pkgutil

import numpy as np
import pytest
import torch

import medsae_ray.sae
from medsae_ray.sae.architectures import ARCHITECTURES, build
from medsae_ray.sae.base import SAEConfig
from medsae_ray.sae.normaliser import fit
from medsae_ray.sae.saelens import FORMAT_VERSION, export, load

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}
sae_lens = pytest.importorskip("sae_lens", reason="SAELens has an environment of its own: make peers")

from sae_lens.saes.sae import TrainStepInput  # noqa: E402

D, M, N, K, LAMBDA, ALPHA = 64, 512, 200, 20, 0.03, 0.25

TRAINING = {
    "relu": "StandardTrainingSAE",
    "gated": "GatedTrainingSAE",
    "jumprelu": "JumpReLUTrainingSAE",
    "topk": "TopKTrainingSAE",
    "batchtopk": "BatchTopKTrainingSAE",
    "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
}
INFERENCE = {
    "relu": "StandardSAE",
    "gated": "GatedSAE",
    "jumprelu": "JumpReLUSAE",
    "topk": "TopKSAE",
    "batchtopk": "JumpReLUSAE",
    "matryoshka": "JumpReLUSAE",
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def perturb(sae):
    """Away from the initialisation, so that no bias, threshold or norm could be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter += noise.abs() if name == "threshold" else noise
    return sae


def sae_of(architecture, **values):
    config = SAEConfig(D, M, **{"sparsity": 0.01, "l0": K} | values)
    sae = perturb(build(architecture, config, centre=torch.full((D,), 0.02), seed=3))
    sae.constrain()
    return sae


def raw_embeddings():
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(N, D)) * 0.3 + rng.normal(size=D)
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def normalised():
    raw = raw_embeddings()
    return torch.from_numpy(fit(raw).apply(raw))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_version():
    assert importlib.metadata.version("sae-lens") == FORMAT_VERSION == "6.54.12"


def test_every_module_of_the_sae_imports_here():
    names = [module.name for module in pkgutil.iter_modules(medsae_ray.sae.__path__)]
    assert {"saelens", "training", "resampling"} <= set(names)
    for name in names:
        importlib.import_module(f"medsae_ray.sae.{name}")


@pytest.mark.parametrize(
    ("architecture", "decoder_norm"),
    [
        *((architecture, "unit") for architecture in ARCHITECTURES),
        ("relu", "weighted"),
        ("gated", "weighted"),
    ],
)
@pytest.mark.parametrize("convention", ["unit", "dim"])
def test_same_activations_and_reconstruction_of_raw_embeddings(
    tmp_path, architecture, decoder_norm, convention
):
    raw = raw_embeddings()
    normaliser, x = fit(raw, convention), torch.from_numpy(raw)
    sae = sae_of(architecture, decoder_norm=decoder_norm)
    if architecture in ("batchtopk", "matryoshka"):
        sae.threshold.fill_(0.3)
    export(tmp_path, sae, normaliser, {"model_name": "phantom-encoder", "hook_name": "embedding"})

    peer = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        z = sae.encode(normaliser.apply(x))
        close(peer.encode(x), z)
        close(peer(x), normaliser.invert(sae.decode(z)))
    assert 0.02 < float((z > 0).float().mean()) < 0.9
    assert type(peer).__name__ == INFERENCE[architecture]
    assert peer.cfg.metadata["model_name"] == "phantom-encoder"
    assert peer.cfg.metadata["training_architecture"] == architecture
    assert peer.cfg.metadata["sparsity"] == (0.01 if sae.has_sparsity else None)


def peer_of(sae, **values):
    """SAELens's training class with the weights of `sae`."""
    kind = getattr(sae_lens, TRAINING[sae.architecture])
    config = getattr(sae_lens, TRAINING[sae.architecture] + "Config")
    peer = kind(config(d_in=D, d_sae=M, **values))
    peer.load_state_dict({**peer.state_dict(), **dict(sae.named_parameters())})
    return peer


def both_losses(sae, peer, x, coefficients):
    """Ours and SAELens's losses of x as one batch, and the gradients of both by parameter."""
    for parameter in sae.parameters():
        parameter.grad = torch.empty_like(parameter)
    parts, fired = sae.write_gradients(x, LAMBDA, len(x))
    told = peer.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients=coefficients,
            dead_neuron_mask=sae.dead,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    told.loss.backward()
    assert torch.equal(fired, (told.feature_acts > 0).sum(0))
    gradients = {name: (p.grad, peer.get_parameter(name).grad) for name, p in sae.named_parameters()}
    return parts, told, gradients


def same_gradients(gradients, *names):
    for name in names or gradients:
        ours, theirs = gradients[name]
        assert ours.abs().max() > 1e-4, f"{name}: nothing to compare"
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("decoder_norm", ["unit", "weighted"])
def test_loss_of_the_standard_sae(decoder_norm):
    sae = sae_of("relu", decoder_norm=decoder_norm)
    parts, told, gradients = both_losses(sae, peer_of(sae), normalised(), {"l1": LAMBDA})
    close(parts.loss, told.loss)
    close(parts.reconstruction, told.losses["mse_loss"])
    close(LAMBDA * parts.sparsity, told.losses["l1_loss"])
    # SAELens weights by the norm in any case: of unit rows that is 1, but has a gradient.
    same_gradients(gradients, *(() if decoder_norm == "weighted" else ("W_enc", "b_enc", "b_dec")))


@pytest.mark.parametrize("decoder_norm", ["unit", "weighted"])
def test_loss_of_the_gated_sae(decoder_norm):
    sae = sae_of("gated", decoder_norm=decoder_norm)
    parts, told, gradients = both_losses(sae, peer_of(sae), normalised(), {"l1": LAMBDA})
    close(parts.loss, told.loss)
    close(parts.reconstruction, told.losses["mse_loss"])
    close(LAMBDA * parts.sparsity, told.losses["l1_loss"])
    close(parts.auxiliary, told.losses["auxiliary_reconstruction_loss"])
    # SAELens does not freeze the decoder in the auxiliary loss: equal values, other gradients for it alone.
    same_gradients(gradients, "W_enc", "b_gate", "b_mag", "r_mag")


@pytest.mark.parametrize("target", [None, K])
def test_loss_of_the_jumprelu_sae(target):
    sae = sae_of("jumprelu", l0=target, bandwidth=0.1)
    mode = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": target} if target else {}
    # Its quadratic loss is 2/l0 · (L0 − l0)², which is 2 l0 times the paper's (L0/l0 − 1)².
    weight = LAMBDA / (2 * target) if target else LAMBDA
    peer = peer_of(sae, jumprelu_bandwidth=0.1, **mode)
    parts, told, gradients = both_losses(sae, peer, normalised(), {"l0": weight})
    close(parts.loss, told.loss)
    close(parts.reconstruction, told.losses["mse_loss"])
    close(LAMBDA * parts.sparsity, told.losses["l0_loss"])
    same_gradients(gradients)


def with_dead(sae, n_dead):
    sae.dead = torch.zeros(M, dtype=torch.bool)
    sae.dead[torch.randperm(M, generator=torch.Generator().manual_seed(1))[:n_dead]] = True
    with torch.no_grad():
        # SAELens lets the k_aux dead neurons count where they are negative, Gao et al.'s code does not: the
        # same only where all are positive. At the same time they must be too small to be selected.
        sae.W_enc[:, sae.dead] *= 0.01
        sae.b_enc[sae.dead] = 0.1


@pytest.mark.parametrize("n_dead", [0, 10, 100])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_loss_of_the_topk_saes(architecture, n_dead):
    sae, x = sae_of(architecture, auxk=ALPHA), normalised()
    with_dead(sae, n_dead)
    # SAELens scales the auxiliary loss by n_dead / k_aux where that is below 1.
    scale = min(1, max(n_dead, 1) / (D // 2))
    values = {"k": K, "rescale_acts_by_decoder_norm": False, "aux_loss_coefficient": ALPHA / scale}
    if architecture == "matryoshka":
        values["matryoshka_widths"] = sae.widths
    if architecture != "topk":
        # So that its threshold is that of this batch, as ours is after the first.
        values["topk_threshold_lr"] = 1.0
    parts, told, gradients = both_losses(sae, peer_of(sae, **values), x, {})
    assert not told.feature_acts[:, sae.dead].any()
    close(parts.loss, told.loss)
    reconstruction = sum(loss for name, loss in told.losses.items() if "mse_loss" in name)
    assert len(told.losses) == (6 if architecture == "matryoshka" else 2)
    close(parts.reconstruction, reconstruction)
    close(parts.auxiliary, told.losses["auxiliary_reconstruction_loss"])
    assert bool(parts.auxiliary > 0) == (n_dead > 0)
    same_gradients(gradients)
    if architecture != "topk":
        close(sae.threshold, told.metrics["topk_threshold"].float())


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu", "topk"])
def test_we_read_what_it_saves(tmp_path, architecture):
    kind = getattr(sae_lens, INFERENCE[architecture])
    config = getattr(sae_lens, INFERENCE[architecture] + "Config")
    peer = perturb(kind(config(D, M, **({"k": K} if architecture == "topk" else {}))))
    peer.save_model(tmp_path)
    same_as_loaded(peer, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("relu", {}),
        ("gated", {}),
        ("jumprelu", {}),
        ("topk", {"k": K, "rescale_acts_by_decoder_norm": False}),
        ("batchtopk", {"k": K, "rescale_acts_by_decoder_norm": False}),
        ("batchtopk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("matryoshka", {"k": K, "rescale_acts_by_decoder_norm": False, "matryoshka_widths": [32, 128, M]}),
    ],
)
def test_we_read_what_it_has_trained(tmp_path, architecture, values):
    kind = getattr(sae_lens, TRAINING[architecture])
    config = getattr(sae_lens, TRAINING[architecture] + "Config")
    peer = kind(config(d_in=D, d_sae=M, **values))
    adam = torch.optim.Adam(peer.parameters(), lr=1e-2)
    x = normalised()
    for step in range(5):
        given = TrainStepInput(x, dict.fromkeys(("l1", "l0"), LAMBDA), None, step, False)
        adam.zero_grad()
        peer.training_forward_pass(given).loss.backward()
        adam.step()
    peer.save_inference_model(tmp_path)
    same_as_loaded(sae_lens.SAE.load_from_disk(tmp_path), tmp_path)


def same_as_loaded(peer, folder):
    sae, x = load(folder), normalised()
    assert sae.saelens_name == peer.cfg.architecture()
    with torch.no_grad():
        z = peer.encode(x)
        assert 0.01 < float((z > 0).float().mean()) < 0.9
        close(sae.encode(x), z)
        close(sae(x), peer(x))
