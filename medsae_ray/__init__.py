"""MedSAE on Ray: what a chest-radiograph model has learned, dissected by a sparse autoencoder."""

import os

# Set before Ray, transformers or vLLM are imported anywhere, in workers too: nothing reports usage, and
# nothing is fetched from a hub unless the user says otherwise.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # An engine's start is else a page of warnings about what it does without.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
}.items():
    os.environ.setdefault(_name, _value)

__version__ = "0.1.0"
