"""A Ray Data write that a killed driver resumes: rows already on disk are not computed again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medsae_ray.run import Staging

if TYPE_CHECKING:
    import ray.data


def write_resumable(dataset: ray.data.Dataset, staging: Staging, id_column: str) -> None:
    """Execute `dataset` into the Parquet files of `staging`'s `_rows`, under Ray Data's id checkpoint.

    The plan must start at a read, keep `id_column` unique and end here; what one block writes is the unit
    that is kept or lost. Ray commits a block's ids in two phases around its file, so after any number of
    kills every id is written once.
    """
    from ray.data import SaveMode
    from ray.data.checkpoint import CheckpointConfig

    context = dataset.context
    context.checkpoint_config = CheckpointConfig(
        id_column=id_column,
        checkpoint_path=staging.path("_ids"),
        override_filesystem=staging.filesystem,
        delete_checkpoint_on_success=False,
    )
    try:
        dataset.write_parquet(staging.path("_rows"), filesystem=staging.filesystem, mode=SaveMode.APPEND)
    finally:
        # Left in place it would silently filter every later read in this process.
        context.checkpoint_config = None
