"""The Ray that the stages run on: an embedded local one, or the cluster of a submitted job."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from medsae_ray.config import RaySettings
from medsae_ray.errors import InputError

WORKER_ENVIRONMENT = (
    "RAY_USAGE_STATS_ENABLED",
    "VLLM_NO_USAGE_STATS",
    "VLLM_LOGGING_LEVEL",
    "DO_NOT_TRACK",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_TELEMETRY",
)


def in_submitted_job() -> bool:
    """Whether this process is the driver of a `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def on_cluster() -> bool:
    """Whether there is a cluster to connect to: in its submitted job, or where `RAY_ADDRESS` names one."""
    # An http address is the dashboard's, for `ray job submit` from this shell: no driver connects to it.
    address = os.environ.get("RAY_ADDRESS", "")
    return in_submitted_job() or (address != "" and not address.startswith("http"))


def refuse_relative(key: str, path: str | None, or_uri: str = ", or a URI such as s3://bucket/run") -> None:
    """Raises InputError for a relative path in a submitted job, where it would be lost."""
    if in_submitted_job() and path is not None and "://" not in path and not os.path.isabs(path):
        raise InputError(
            f"Setting {key} is the relative path {path!r}, which in a submitted job would lie in Ray's "
            "temporary copy of the working directory and be lost: give an absolute path that all nodes "
            f"share{or_uri}."
        )


def start_ray(settings: RaySettings) -> None:
    """Connect to the cluster this driver belongs to, or start an embedded local Ray; nothing if it runs.

    Stages call this once they know that there is something to do.
    """
    if not on_cluster():
        # As on macOS and Windows, Ray then stays on 127.0.0.1. Else it listens on the machine's outward
        # address, which it finds with a socket to a public name server. Read when Ray is imported.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if not ray.is_initialized():
        shared: dict[str, Any] = {
            "runtime_env": {
                "env_vars": {name: os.environ[name] for name in WORKER_ENVIRONMENT},
                "worker_process_setup_hook": "medsae_ray.cluster.quieten_worker",
            },
            "logging_level": logging.WARNING,
        }
        if on_cluster():
            ray.init(**shared)
        else:
            _start_embedded(settings, shared)
    data = ray.data.DataContext.get_current()
    _quieten_driver()
    # It tells of memory that was never asked for, in a page every half minute.
    data.issue_detectors_config.detectors = []
    data.enable_progress_bars = settings.progress
    data.enable_operator_progress_bars = settings.progress and sys.stdout.isatty()
    # The newer reader takes seconds to list one file, and its listing thread ends with a traceback.
    data.use_datasource_v2 = False
    # A PIL image or other Python object in a column would silently be pickled.
    data.enable_fallback_to_arrow_object_ext_type = False


def _start_embedded(settings: RaySettings, shared: dict[str, Any]) -> None:
    import ray
    from ray._private import services

    start_api_server = services.start_api_server
    # Without a dashboard the API server has one task left: to report that usage statistics are off, for
    # which it asks the cloud's metadata service where it is. (None, None) is what a failed start gives.
    services.start_api_server = lambda *_, **__: (None, None)
    try:
        ray.init(
            address="local",
            num_cpus=settings.cpus or max(4, os.cpu_count() or 1),
            object_store_memory=int(settings.object_store_gib * 2**30),
            include_dashboard=False,
            **shared,
        )
    finally:
        services.start_api_server = start_api_server


def require_resources(key: str, wanted: dict[str, float]) -> None:
    """Raises InputError where an embedded Ray can never give what `key` asks for: it would wait for ever.

    A cluster is not asked: it may grow.
    """
    import ray

    if on_cluster():
        return
    have = ray.cluster_resources()
    for kind, amount in wanted.items():
        if amount > have.get(kind, 0):
            raise InputError(
                f"Setting {key} asks for {amount:g} {kind} in all, but this Ray has "
                f"{have.get(kind, 0):g}: lower it, or raise ray.cpus."
            )


def stop_ray() -> None:
    """Leave the cluster, or end the embedded Ray; nothing if none was started."""
    import ray

    ray.shutdown()


def _quieten_driver() -> None:
    """Execution plans stay in Ray's log files."""
    _quieten_engines()
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler) and handler.level == logging.INFO:
            handler.setLevel(logging.WARNING)


def _quieten_engines() -> None:
    logging.getLogger("ray.llm").setLevel(logging.WARNING)
    # Before vLLM is imported and takes VLLM_LOGGING_LEVEL itself: it warns while it is being imported.
    logging.getLogger("vllm").setLevel(logging.ERROR)


def quieten_worker() -> None:
    """Runs in every Ray worker: its download warnings quote the URI, whose folders name the patient.

    Nothing is lost with them: the row is quarantined with its reason.
    """
    _quieten_engines()
    for module in ("plan_download_op", "_obstore_download"):
        logging.getLogger(f"ray.data._internal.planner.{module}").setLevel(logging.CRITICAL)
