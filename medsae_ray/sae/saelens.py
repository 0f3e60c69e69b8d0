"""SAELens' file format, version 6: `cfg.json` + `sae_weights.safetensors`.

The normalisation is folded into the weights, so that the SAE takes raw embeddings: with x' = k (x − μ),
the pre-activation is (x − b_dec/k − μ) k W_enc + b_enc and x̂ = z W_dec/k + (b_dec/k + μ).

Architectures go by SAELens's names. BatchTopK and Matryoshka have no inference class there: they are
`jumprelu` with their threshold, and `metadata.training_architecture` says what they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from medsae_ray.errors import InputError
from medsae_ray.sae.base import SAEConfig, SparseAutoencoder, check_width
from medsae_ray.sae.gated import GatedSAE
from medsae_ray.sae.jumprelu import JumpReLUSAE
from medsae_ray.sae.normaliser import Normaliser
from medsae_ray.sae.relu import ReLUSAE
from medsae_ray.sae.topk import TopKSAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
FORMAT_VERSION = "6.54.12"
"""The SAELens release whose reader the tests use; SAELens takes a file without it for one older than 6.0."""

_REQUIRED = {"apply_b_dec_to_input": True, "normalize_activations": "none"}
_READERS: dict[str, type[SparseAutoencoder]] = {
    kind.saelens_name: kind for kind in (ReLUSAE, GatedSAE, JumpReLUSAE, TopKSAE)
}


def export(folder: Path, sae: SparseAutoencoder, normaliser: Normaliser, metadata: dict[str, Any]) -> None:
    """Write both files into a local `folder`; see `export_files`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in export_files(sae, normaliser, metadata).items():
        (folder / name).write_bytes(content)


def export_files(
    sae: SparseAutoencoder, normaliser: Normaliser, metadata: dict[str, Any]
) -> dict[str, bytes]:
    """File name → content. `metadata` is free JSON (encoder, stand-in, …); the conventions are added."""
    check_width(sae, normaliser.embedding_dim)
    config, k = sae.config, normaliser.scale
    mean = torch.tensor(normaliser.mean, dtype=torch.float64)
    weights = sae.export()
    folded = {
        **weights,
        "W_enc": weights["W_enc"] * k,
        "W_dec": weights["W_dec"] / k,
        "b_dec": weights["b_dec"] / k + mean,
    }
    cfg = {
        "architecture": sae.saelens_name,
        **_REQUIRED,
        **sae.describe(),
        "d_in": config.embedding_dim,
        "d_sae": config.n_neurons,
        "dtype": "float32",
        "device": "cpu",
        "reshape_activations": "none",
        "metadata": {
            **metadata,
            "sae_lens_version": FORMAT_VERSION,
            "training_architecture": sae.architecture,
            "sparsity": config.sparsity if sae.has_sparsity else None,
            "l0": config.l0 if sae.has_sparsity else config.k,
            "decoder_norm": config.decoder_norm,
            "reduction": config.reduction,
            "normalisation": {"convention": normaliser.convention, "k": k, "folded_in": True},
        },
    }
    return {
        CONFIG_FILE: (json.dumps(cfg, indent=1) + "\n").encode(),
        WEIGHTS_FILE: save_tensors({name: tensor.float().contiguous() for name, tensor in folded.items()}),
    }


def load(folder: Path) -> SparseAutoencoder:
    """Read an SAE that takes RAW embeddings from a local folder; see `load_files`. InputError if unusable."""
    contents = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            contents.append((folder / name).read_bytes())
        except OSError as error:
            raise InputError(
                f"{folder} has no readable {name}; give a folder in SAELens v6 format."
            ) from error
    return load_files(contents[0], contents[1], source=str(folder))


def load_files(cfg_json: bytes, weights: bytes, source: str = "the SAE") -> SparseAutoencoder:
    """A frozen SAE from the two files' contents, for RAW embeddings.

    Strict: InputError naming the key for another architecture, an unsupported setting, or a missing,
    unexpected, misshapen or non-finite weight.
    """
    cfg = _read_cfg(cfg_json, f"{source}/{CONFIG_FILE}")
    where = f"{source}/{WEIGHTS_FILE}"
    try:
        tensors = load_tensors(weights)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{where} is not a safetensors file ({error}); export the SAE again.") from error

    sae = _READERS[cfg["architecture"]](
        SAEConfig(
            embedding_dim=cfg["d_in"],
            n_neurons=cfg["d_sae"],
            # A folded decoder has rows of norm 1/k: nothing may renormalise them.
            decoder_norm="weighted",
            sparsity=0.0,
            l0=cfg.get("k") if cfg["architecture"] == TopKSAE.saelens_name else None,
        )
    )
    expected = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    for name in sorted(expected.keys() ^ tensors.keys()):
        verb = "lacks" if name in expected else "has an unexpected"
        raise InputError(f"{where} {verb} {name}; it needs exactly {', '.join(sorted(expected))}.")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise InputError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, but {CONFIG_FILE} says {expected[name]}."
            )
        if not torch.isfinite(tensor).all():
            raise InputError(f"{where}: {name} holds values that are not finite; export the SAE again.")
    sae.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    # SAELens may save a threshold that its last step took below 0; it counts as 0 there.
    sae.constrain()
    return sae.requires_grad_(False).eval()


def _read_cfg(cfg_json: bytes, where: str) -> dict[str, Any]:
    try:
        cfg = json.loads(cfg_json)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); export the SAE again.") from error
    if not isinstance(cfg, dict):
        raise InputError(f"{where} is not a JSON object; export the SAE again.")
    if cfg.get("architecture") not in list(_READERS):
        raise InputError(
            f"{where}: architecture is {cfg.get('architecture')!r}, but only {', '.join(_READERS)} are "
            "supported."
        )
    is_topk = cfg["architecture"] == TopKSAE.saelens_name
    needed = _REQUIRED | ({"rescale_acts_by_decoder_norm": False} if is_topk else {})
    for key, value in needed.items():
        if cfg.get(key) != value:
            raise InputError(f"{where}: {key} is {cfg.get(key)!r}, but only {value!r} is supported.")
    for key in ("d_in", "d_sae", "k") if is_topk else ("d_in", "d_sae"):
        if not isinstance(cfg.get(key), int) or cfg[key] < 1:
            raise InputError(f"{where}: {key} is {cfg.get(key)!r}; it must be a whole number above 0.")
    if is_topk and cfg["k"] > cfg["d_sae"]:
        raise InputError(f"{where}: k is {cfg['k']}, but there are only {cfg['d_sae']} neurons (d_sae).")
    return cfg
