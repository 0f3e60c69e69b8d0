import numpy as np
import pytest
import torch

from medsae_ray.errors import InputError
from medsae_ray.sae.base import SAEConfig, check_width
from medsae_ray.sae.relu import ReLUSAE

CONVENTIONS = [(norm, reduction) for norm in ("unit", "weighted") for reduction in ("sum", "mean")]


def sae_of(norm="unit", reduction="sum", d=6, m=20, sparsity=0.1, seed=1, dtype=torch.float64):
    """An SAE away from its initialisation: random biases and, where they are free, decoder norms."""
    sae = ReLUSAE(SAEConfig(d, m, sparsity, norm, reduction), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_enc += 0.2 * torch.randn(m, generator=generator)
        sae.b_dec += 0.3 * torch.randn(d, generator=generator)
        if norm == "weighted":
            sae.W_dec *= torch.rand(m, 1, generator=generator) + 0.5
    return sae.to(dtype)


def batch(n=32, d=6, seed=2, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("norm", "reduction"), CONVENTIONS)
def test_loss_is_the_formula(norm, reduction):
    sae, x = sae_of(norm, reduction).requires_grad_(False), batch()
    W_enc, b_enc, W_dec, b_dec = (p.detach().numpy() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    z = np.maximum((x.numpy() - b_dec) @ W_enc + b_enc, 0)
    error = x.numpy() - (z @ W_dec + b_dec)
    weights = np.linalg.norm(W_dec, axis=1) if norm == "weighted" else 1
    reconstruction = np.mean(np.sum(error**2, 1)) / (1 if reduction == "sum" else 6)
    parts = sae.loss(x)
    assert float(parts.reconstruction) == pytest.approx(reconstruction, rel=1e-12)
    assert float(parts.sparsity) == pytest.approx(np.mean(np.sum(z * weights, 1)), rel=1e-12)
    assert float(parts.loss) == pytest.approx(reconstruction + 0.1 * float(parts.sparsity), rel=1e-12)
    np.testing.assert_allclose(sae.encode(x).detach().numpy(), z, atol=1e-12)


@pytest.mark.parametrize(("norm", "reduction"), CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_closed_form_gradients_equal_autograd(norm, reduction, dtype):
    sae, x = sae_of(norm, reduction, dtype=dtype), batch(dtype=dtype)
    expected = sae.loss(x, sparsity=0.07)
    names, parameters = zip(*sae.named_parameters(), strict=True)
    autograd = torch.autograd.grad(expected.loss, parameters)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, torch.nan)
    parts, fired = sae.write_gradients(x, 0.07, len(x))
    assert torch.equal(fired, (sae.encode(x) > 0).sum(0))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for name, parameter, reference in zip(names, parameters, autograd, strict=True):
        torch.testing.assert_close(
            parameter.grad, reference, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(torch.stack(parts), torch.stack(expected), rtol=tolerance, atol=tolerance)


def test_gradients_by_finite_differences():
    sae, x = sae_of("weighted", "mean"), batch()
    for parameter in sae.parameters():
        parameter.grad = torch.empty_like(parameter)
    sae.write_gradients(x, 0.07, len(x))
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-6 * direction
                values.append(float(sae.loss(x, sparsity=0.07).loss))
                parameter -= sign * 1e-6 * direction
        slope = (values[0] - values[1]) / 2e-6
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_a_decoder_row_of_norm_zero_has_finite_gradients():
    sae, x = sae_of("weighted"), batch()
    with torch.no_grad():
        sae.W_dec[3] = 0
    for parameter in sae.parameters():
        parameter.grad = torch.empty_like(parameter)
    sae.write_gradients(x, 0.07, len(x))
    assert all(bool(parameter.grad.isfinite().all()) for parameter in sae.parameters())


def test_constraint_leaves_unit_rows_and_tangent_gradients():
    sae = sae_of()
    with torch.no_grad():
        sae.W_dec *= 3.0
    sae.constrain()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20, dtype=torch.float64))
    gradient = batch(20)
    sae.W_dec.grad = gradient.clone()
    sae.constrain_gradients()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    assert along.abs().max() < 1e-14
    # Only the part along the row is taken away.
    removed = gradient - sae.W_dec.grad
    torch.testing.assert_close(removed, (gradient * sae.W_dec).sum(1, keepdim=True) * sae.W_dec)

    free = sae_of("weighted")
    before = free.W_dec.detach().clone()
    free.W_dec.grad = gradient.clone()
    free.constrain()
    free.constrain_gradients()
    assert torch.equal(free.W_dec, before)
    assert torch.equal(free.W_dec.grad, gradient)


def test_initialisation_is_seeded_unit_tied_and_near_the_identity():
    config, centre = SAEConfig(64, 1024), torch.linspace(-1, 1, 64)
    sae = ReLUSAE(config, centre=centre, seed=5)
    assert torch.equal(sae.W_enc, ReLUSAE(config, centre=centre, seed=5).W_enc)
    assert not torch.equal(sae.W_enc, ReLUSAE(config, centre=centre, seed=6).W_enc)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(1024))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T / 8)
    assert torch.equal(sae.b_dec, centre)
    assert not sae.b_enc.any()
    x = centre + torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    fve = 1 - (x - sae(x)).square().sum() / (x - centre).square().sum()
    assert fve > 0.8


def test_input_errors():
    for values in ({"embedding_dim": 0}, {"n_neurons": 0}, {"sparsity": -1e-9}, {"sparsity": float("nan")}):
        with pytest.raises(InputError):
            SAEConfig(**{"embedding_dim": 4, "n_neurons": 8, **values})
    sae = ReLUSAE(SAEConfig(4, 8))
    check_width(sae, 4)
    with pytest.raises(InputError, match="takes embeddings of 4 dimensions but these have 5"):
        check_width(sae, 5)
