import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medsae_ray.errors import InputError
from medsae_ray.sae.architectures import build
from medsae_ray.sae.base import SAEConfig
from medsae_ray.sae.normaliser import fit
from medsae_ray.sae.saelens import CONFIG_FILE, FORMAT_VERSION, WEIGHTS_FILE, export, load

SAELENS_NAMES = {
    "relu": "standard",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
}
each_architecture = pytest.mark.parametrize("architecture", SAELENS_NAMES)


def exported(folder, architecture="relu", convention="unit", **values):
    """An SAE away from its initialisation, exported; with its normaliser and raw embeddings [50, 8]."""
    rng = np.random.default_rng(0)
    raw = (rng.normal(size=(50, 8)) * 0.05 + rng.normal(size=8)).astype(np.float32)
    normaliser = fit(raw, convention)
    config = SAEConfig(8, 24, **{"sparsity": 0.01, "l0": 5} | values)
    sae = build(architecture, config, centre=torch.full((8,), 0.1), seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name not in ("W_dec", "b_dec"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.1 * (noise.abs() if name == "threshold" else noise)
        if architecture in ("batchtopk", "matryoshka"):
            sae.threshold.fill_(0.15)
    export(folder, sae, normaliser, {"model_name": "phantom-encoder", "stand_in": True})
    return sae.requires_grad_(False), normaliser, torch.from_numpy(raw)


def cfg_of(folder):
    return json.loads((folder / CONFIG_FILE).read_text())


@each_architecture
@pytest.mark.parametrize("convention", ["unit", "dim"])
def test_exported_sae_on_raw_equals_sae_on_normalised(tmp_path, architecture, convention):
    sae, normaliser, raw = exported(tmp_path, architecture, convention)
    loaded, x = load(tmp_path), normaliser.apply(raw)
    z = sae.encode(x)
    torch.testing.assert_close(loaded.encode(raw), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(raw), normaliser.invert(sae(x)), rtol=1e-5, atol=1e-5)
    assert 0.1 < (z > 0).float().mean() < 0.9
    assert loaded.saelens_name == SAELENS_NAMES[architecture]
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@each_architecture
def test_a_loaded_sae_exported_again_is_the_same(tmp_path, architecture):
    _, _, raw = exported(tmp_path / "first", architecture)
    loaded = load(tmp_path / "first")
    identity = fit(np.vstack([np.eye(8), -np.eye(8)]).astype(np.float32))
    assert identity.scale == 1
    export(tmp_path / "second", loaded, identity, {})
    again = load(tmp_path / "second")
    assert type(again) is type(loaded)
    assert torch.equal(again.encode(raw), loaded.encode(raw))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@each_architecture
def test_files_hold_what_saelens_expects_and_how_it_was_trained(tmp_path, architecture):
    sae, normaliser, _ = exported(tmp_path, architecture, "dim", reduction="mean")
    cfg = cfg_of(tmp_path)
    expected = {
        "architecture": SAELENS_NAMES[architecture],
        "d_in": 8,
        "d_sae": 24,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if architecture == "topk":
        expected |= {"k": 5, "rescale_acts_by_decoder_norm": False}
    assert {key: value for key, value in cfg.items() if key != "metadata"} == expected
    ranked = architecture in ("topk", "batchtopk", "matryoshka")
    assert cfg["metadata"] == {
        "model_name": "phantom-encoder",
        "stand_in": True,
        "sae_lens_version": FORMAT_VERSION,
        "training_architecture": architecture,
        "sparsity": None if ranked else 0.01,
        "l0": 5,
        "decoder_norm": "unit",
        "reduction": "mean",
        "normalisation": {"convention": "dim", "k": normaliser.scale, "folded_in": True},
    }
    weights = load_file(tmp_path / WEIGHTS_FILE)
    names = {"W_enc", "W_dec", "b_dec"}
    names |= {"b_gate", "b_mag", "r_mag"} if architecture == "gated" else {"b_enc"}
    names |= {"threshold"} if SAELENS_NAMES[architecture] == "jumprelu" else set()
    assert weights.keys() == names
    if "threshold" in weights:
        # A threshold a neuron, in the units of the pre-activations, which folding leaves as they are.
        assert torch.equal(weights["threshold"], sae.threshold.expand(24))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_k_of_topk_is_written_where_none_was_set(tmp_path):
    exported(tmp_path, "topk", l0=None)
    assert cfg_of(tmp_path)["k"] == 24
    assert cfg_of(tmp_path)["metadata"]["l0"] == 24
    assert load(tmp_path).config.k == 24


def test_a_threshold_below_0_counts_as_0(tmp_path):
    sae, normaliser, raw = exported(tmp_path, "jumprelu")
    weights = load_file(tmp_path / WEIGHTS_FILE)
    weights["threshold"][:12] = -0.05
    save_file(weights, tmp_path / WEIGHTS_FILE)
    z = load(tmp_path).encode(raw)
    assert z.min() >= 0
    pre = (normaliser.apply(raw) - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(z[:, :12], torch.relu(pre[:, :12]), rtol=1e-5, atol=1e-5)


def assert_one_sentence(error):
    text = str(error.value)
    assert text.endswith(".")
    assert ". " not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        (
            "relu",
            {"architecture": "temporal"},
            "architecture is 'temporal', but only standard, gated, jumprelu",
        ),
        ("relu", {"architecture": None}, "architecture is None, but only standard"),
        ("relu", {"architecture": ["standard"]}, r"architecture is \['standard'\], but only standard"),
        ("relu", {"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ("gated", {"apply_b_dec_to_input": False}, "apply_b_dec_to_input is False"),
        ("gated", {"d_sae": "24"}, "d_sae is '24'"),
        ("gated", {"d_in": 0}, "d_in is 0; it must be a whole number above 0"),
        ("jumprelu", {"d_in": 9}, r"has shape \(.*8.*\), but cfg.json says \(.*9.*\)"),
        ("jumprelu", {"architecture": "standard"}, "has an unexpected threshold; it needs exactly W_dec"),
        ("relu", {"architecture": "jumprelu"}, "lacks threshold; it needs exactly"),
        ("relu", {"architecture": "gated"}, "has an unexpected b_enc; it needs exactly"),
        ("relu", {"architecture": "topk"}, "rescale_acts_by_decoder_norm is None, but only False"),
        ("topk", {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm is True"),
        ("topk", {"k": None}, "k is None; it must be a whole number"),
        ("topk", {"k": 2.5}, r"k is 2\.5; it must be a whole number"),
        ("topk", {"k": 25}, r"k is 25, but there are only 24 neurons \(d_sae\)"),
    ],
)
def test_unsupported_cfg_names_the_key(tmp_path, architecture, change, message):
    exported(tmp_path, architecture)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(cfg_of(tmp_path) | change))
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path)
    assert_one_sentence(error)


def test_a_key_of_another_architecture_changes_nothing(tmp_path):
    _, _, raw = exported(tmp_path, "jumprelu")
    before = load(tmp_path).encode(raw)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(cfg_of(tmp_path) | {"k": 999}))
    assert torch.equal(load(tmp_path).encode(raw), before)


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("relu", lambda w: w.pop("b_enc"), "lacks b_enc"),
        ("relu", lambda w: w.update(threshold=torch.zeros(24)), "has an unexpected threshold"),
        ("topk", lambda w: w.update(W_enc=torch.zeros(24, 8)), r"W_enc has shape \(24, 8\), but"),
        ("topk", lambda w: w.update(b_dec=torch.full((8,), torch.nan)), "b_dec holds values that are not"),
        ("gated", lambda w: w.pop("r_mag"), "lacks r_mag"),
        ("gated", lambda w: w.update(b_enc=torch.zeros(24)), "has an unexpected b_enc"),
        ("gated", lambda w: w.update(r_mag=torch.full((24,), torch.inf)), "r_mag holds values that are not"),
        ("jumprelu", lambda w: w.pop("threshold"), "lacks threshold"),
        ("batchtopk", lambda w: w.update(threshold=torch.zeros(())), r"threshold has shape \(\), but"),
    ],
)
def test_unusable_weights_name_the_key(tmp_path, architecture, change, message):
    exported(tmp_path, architecture)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    change(weights)
    save_file(weights, tmp_path / WEIGHTS_FILE)
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path)
    assert_one_sentence(error)


def test_files_that_are_missing_or_of_another_kind(tmp_path):
    folder = tmp_path / "sae"
    exported(folder)
    with pytest.raises(InputError, match=r"no readable cfg\.json"):
        load(tmp_path)
    torch.save({"W_enc": torch.zeros(8, 24)}, folder / WEIGHTS_FILE)
    with pytest.raises(InputError, match="not a safetensors file"):
        load(folder)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(InputError, match=r"no readable sae_weights\.safetensors"):
        load(folder)
    for content, message in ((b"[]", "not a JSON object"), (b"{", "not JSON"), (b"\xff", "not JSON")):
        (folder / WEIGHTS_FILE).touch()
        (folder / CONFIG_FILE).write_bytes(content)
        with pytest.raises(InputError, match=message):
            load(folder)


def test_normaliser_of_another_width(tmp_path):
    sae, _, raw = exported(tmp_path / "sae")
    with pytest.raises(InputError, match="8 dimensions but these have 5"):
        export(tmp_path, sae, fit(raw[:, :5].numpy()), {})
