"""SAELens reads what we export. Runs in an environment of its own (`make peers`), without Ray."""

import importlib.metadata
import os

import numpy as np
import pytest
import torch

from medsae_ray.sae.normaliser import fit
from medsae_ray.sae.relu import ReLUSAE, SAEConfig
from medsae_ray.sae.saelens import export

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}
sae_lens = pytest.importorskip("sae_lens", reason="SAELens has an environment of its own: make peers")


def test_version():
    assert importlib.metadata.version("sae-lens").startswith("6.54.")


@pytest.mark.parametrize("decoder_norm", ["unit", "weighted"])
@pytest.mark.parametrize("convention", ["unit", "dim"])
def test_same_activations_and_reconstruction_of_raw_embeddings(tmp_path, convention, decoder_norm):
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(200, 64)) * 0.3 + rng.normal(size=64)
    raw = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)
    normaliser = fit(raw, convention)
    sae = ReLUSAE(SAEConfig(64, 512, 0.01, decoder_norm), centre=torch.full((64,), 0.02), seed=3)
    with torch.no_grad():
        sae.b_enc += 0.05 * torch.randn(512, generator=torch.Generator().manual_seed(0))
    export(tmp_path, sae, normaliser, {"model_name": "phantom-encoder", "hook_name": "embedding"})

    peer = sae_lens.SAE.load_from_disk(tmp_path)
    x = torch.from_numpy(raw)
    with torch.no_grad():
        z = sae.encode(normaliser.apply(x))
        torch.testing.assert_close(peer.encode(x), z, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(peer(x), normaliser.invert(sae.decode(z)), rtol=1e-4, atol=1e-4)
    assert 0.1 < float((z > 0).float().mean()) < 0.9
    assert type(peer).__name__ == "StandardSAE"
    assert peer.cfg.metadata["model_name"] == "phantom-encoder"
    assert peer.cfg.metadata["sparsity"] == 0.01
