"""Ray Train's PyTorch backend, without a process group where there is one worker and nothing to reduce.

The group's store looks up the name of its own address, a question to the machine's name server that a
laptop's run has no reason to ask.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class WorkersTorchConfig(TorchConfig):
    """`TorchConfig` that connects the workers only if there are several."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _WorkersTorchBackend


class _WorkersTorchBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) > 1:
            super().on_start(worker_group, backend_config)
