"""`medsae weights`: the report on a weight file."""

import hashlib
from pathlib import Path

import pytest

from medsae_ray.encoders.weights import check, describe
from medsae_ray.errors import InputError


def test_report_counts_what_the_file_holds(checkpoint_file: Path) -> None:
    report = check(checkpoint_file)
    # torchvision documents 25,557,032 parameters for ResNet-50, of which 2,049,000 are its 1000-way head.
    assert report.n_parameters == 25_557_032 - 2_049_000 + 2048 * 512
    assert (report.n_read, report.n_skipped, report.embedding_dim) == (319, 5, 512)
    assert report.sha256 == hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()
    assert report.sha256 in str(report)


def test_only_encoders_with_weight_files_are_checked(checkpoint_file: Path) -> None:
    with pytest.raises(InputError, match="stand-in"):
        check(checkpoint_file, "stand-in")


def test_describe_names_the_source_and_the_terms() -> None:
    text = describe()
    for word in ("github.com/RyanWangZf/MedCLIP", "medclip_resnet_weight.txt", "pytorch_model.bin", "MIT"):
        assert word in text
