"""Checkpoints shared by the tests of the vision-language model."""

from pathlib import Path

import pytest
from layout import write_medgemma_layout


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight checkpoint in the layout of google/medgemma-4b-it; copy it before changing anything."""
    return write_medgemma_layout(tmp_path_factory.mktemp("layout") / "medgemma-4b-it")
