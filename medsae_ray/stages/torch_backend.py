"""Ray Train's PyTorch trainer, without what a run on one machine has no use for."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from medsae_ray.cluster import on_cluster


class Trainer(TorchTrainer):
    """`TorchTrainer`; on an embedded Ray it runs no cleaner of placement groups.

    The cleaner frees what a dead controller leaves in a cluster. An embedded Ray ends with its driver, and
    has no API server to ask every second whether the controller lives.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        if on_cluster():
            return callbacks
        return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]


class WorkersTorchConfig(TorchConfig):
    """`TorchConfig` that connects the workers only if there are several.

    The process group's store looks up the name of its own address, a question to the machine's name server
    that one worker, with nothing to reduce, has no reason to ask.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _WorkersTorchBackend


class _WorkersTorchBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) > 1:
            super().on_start(worker_group, backend_config)
