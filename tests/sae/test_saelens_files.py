import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medsae_ray.errors import InputError
from medsae_ray.sae.normaliser import fit
from medsae_ray.sae.relu import ReLUSAE, SAEConfig
from medsae_ray.sae.saelens import CONFIG_FILE, WEIGHTS_FILE, export, load


@pytest.fixture(params=["unit", "dim"])
def exported(request, tmp_path):
    rng = np.random.default_rng(0)
    raw = (rng.normal(size=(50, 8)) * 0.05 + rng.normal(size=8)).astype(np.float32)
    normaliser = fit(raw, request.param)
    sae = ReLUSAE(SAEConfig(8, 24, 0.01), centre=torch.full((8,), 0.1), seed=3)
    with torch.no_grad():
        sae.b_enc += 0.1 * torch.randn(24, generator=torch.Generator().manual_seed(0))
    export(tmp_path / "sae", sae, normaliser, {"model_name": "phantom-encoder", "stand_in": True})
    return tmp_path / "sae", sae, normaliser, torch.from_numpy(raw)


def test_exported_sae_on_raw_equals_sae_on_normalised(exported):
    folder, sae, normaliser, raw = exported
    loaded, x = load(folder), normaliser.apply(raw)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(raw), sae.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loaded(raw), normaliser.invert(sae(x)), rtol=1e-5, atol=1e-5)
    assert (loaded.encode(raw) > 0).float().mean() > 0.1
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_cfg_records_the_conventions(exported):
    folder, _, normaliser, _ = exported
    cfg = json.loads((folder / CONFIG_FILE).read_text())
    expected = {
        "architecture": "standard",
        "d_in": 8,
        "d_sae": 24,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
    }
    assert {key: cfg[key] for key in expected} == expected
    metadata = cfg["metadata"]
    assert (metadata["model_name"], metadata["stand_in"]) == ("phantom-encoder", True)
    assert (metadata["sparsity"], metadata["decoder_norm"], metadata["reduction"]) == (0.01, "unit", "sum")
    assert metadata["normalisation"]["convention"] == normaliser.convention
    assert metadata["sae_lens_version"].startswith("6.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "jumprelu"}, "architecture is 'jumprelu', but only 'standard'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input is False"),
        ({"d_sae": "24"}, "d_sae is '24'"),
        ({"d_in": 9}, r"has shape \(.*8.*\), but cfg.json says \(.*9.*\)"),
    ],
)
def test_unsupported_cfg_names_the_key(exported, change, message):
    folder = exported[0]
    cfg = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(cfg | change))
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("b_enc"), "lacks b_enc"),
        (lambda w: w.update(threshold=torch.zeros(24)), "has an unexpected threshold"),
        (lambda w: w.update(W_enc=torch.zeros(24, 8)), r"W_enc has shape \(24, 8\), but"),
        (lambda w: w.update(b_dec=torch.full((8,), torch.nan)), "b_dec holds values that are not finite"),
    ],
)
def test_unusable_weights_name_the_key(exported, change, message):
    folder = exported[0]
    weights = load_file(folder / WEIGHTS_FILE)
    change(weights)
    save_file(weights, folder / WEIGHTS_FILE)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_files_that_are_missing_or_of_another_kind(exported, tmp_path):
    folder = exported[0]
    with pytest.raises(InputError, match=r"no readable cfg\.json"):
        load(tmp_path)
    torch.save({"W_enc": torch.zeros(8, 24)}, folder / WEIGHTS_FILE)
    with pytest.raises(InputError, match="not a safetensors file"):
        load(folder)
    (folder / CONFIG_FILE).write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        load(folder)
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load(folder)


def test_normaliser_of_another_width(exported, tmp_path):
    _, sae, _, raw = exported
    with pytest.raises(InputError, match="8 dimensions but these have 5"):
        export(tmp_path, sae, fit(raw[:, :5].numpy()), {})
