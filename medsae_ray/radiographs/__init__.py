"""Data sets of chest radiographs, each read into the one schema `tables.RADIOGRAPHS`."""

from __future__ import annotations

from medsae_ray.errors import InputError
from medsae_ray.radiographs.chexpert import read_chexpert
from medsae_ray.radiographs.folder import read_folder
from medsae_ray.radiographs.nih import read_nih
from medsae_ray.radiographs.schema import Boxes, Radiographs

__all__ = ["DATASETS", "Boxes", "Radiographs", "read_radiographs"]

DATASETS = ("chexpert", "nih", "folder", "phantom")


def read_radiographs(
    dataset: str,
    root: str,
    *,
    table: str | None = None,
    split: str = "patient",
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Radiographs:
    """Read the tables of a data set; the images themselves are not opened, nor looked for one by one.

    `dataset`: "chexpert", "nih", "folder" (a folder with a CSV), or "phantom" (laid out like CheXpert).
    `root`: its folder, a local path or a URI. `table`: another name of the CSV, for nih and folder.
    `split`: "patient" or "official", and `fractions` (train, valid, test) with `seed`: see the readers.

    Raises InputError for a setting or a table that cannot be used.
    """
    if dataset not in DATASETS:
        raise InputError(f"radiographs.dataset is {dataset!r}: it must be one of {', '.join(DATASETS)}")
    if split not in ("patient", "official"):
        raise InputError(f"radiographs.split is {split!r}: it must be patient or official")
    if dataset == "nih":
        return read_nih(root, table=table, split=split, fractions=fractions, seed=seed)
    elif dataset == "folder":
        return read_folder(root, table=table, split=split, fractions=fractions, seed=seed)
    elif table is not None:
        raise InputError(f"radiographs.table is {table!r}: {dataset} has tables of fixed names, leave it out")
    else:
        return read_chexpert(root, dataset=dataset, split=split, fractions=fractions, seed=seed)
