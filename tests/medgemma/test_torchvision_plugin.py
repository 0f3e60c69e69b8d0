"""The plug-in that lets vLLM's Gemma 3 do without torchvision, in processes of their own."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from medsae_ray.medgemma import torchvision_plugin

REPORT = """
import importlib.util, sys
from medsae_ray.medgemma.torchvision_plugin import MODULE, install
{before}
install()
install()
print(MODULE in sys.modules, "transformers" in sys.modules, "vllm" in sys.modules)
print(*sorted(name for name in sys.modules if name.startswith("torchvision")))
print(sys.modules.get("torchvision"), importlib.util.find_spec("torchvision") is not None)
{after}
"""


def report(path: Path | None = None, before: str = "", after: str = "") -> list[str]:
    """Lines printed by a new process after `install()`, with the packages in `path` importable."""
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    code += REPORT.format(before=before, after=after)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A torchvision that fails half-way through its import, as one for another build of PyTorch does."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "extension.py").touch()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "from torchvision import extension\nraise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    return tmp_path


@pytest.fixture
def working(tmp_path: Path) -> Path:
    """A torchvision that can be imported (empty modules)."""
    for folder in ("torchvision", "torchvision/transforms", "torchvision/transforms/v2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "torchvision" / "transforms" / "v2" / "functional.py").touch()
    return tmp_path


PIL_CLASS = f"from {torchvision_plugin.MODULE} import Gemma3ImageProcessor as G; print(G.__name__)"
AVAILABLE = "import transformers.utils as u; print(u.is_torchvision_available())"


def test_the_pil_processor_stands_in_where_torchvision_is_absent() -> None:
    lines = report(after=PIL_CLASS)
    if lines[2] != "None False":
        pytest.skip("torchvision is installed here")
    assert lines == ["True False False", "", "None False", "Gemma3ImageProcessorPil"]


def test_a_broken_torchvision_is_hidden_from_transformers(broken: Path) -> None:
    lines = report(broken, before=AVAILABLE, after=f"{AVAILABLE}\n{PIL_CLASS}")
    # The one module left is None in the place of torchvision: neither found nor imported again.
    assert lines == [
        "True",
        "True True False",
        "torchvision",
        "None False",
        "False",
        "Gemma3ImageProcessorPil",
    ]


def test_a_working_torchvision_is_left_alone(working: Path) -> None:
    lines = report(working)
    assert lines[0] == "False False False"
    assert "torchvision.transforms.v2.functional" in lines[1].split()
    assert lines[2].endswith("True")


def test_vllm_finds_the_plug_in() -> None:
    found = {
        point.name: point.load()
        for point in entry_points(group="vllm.general_plugins")
        if point.name.startswith("medsae")
    }
    assert found == {"medsae_torchvision": torchvision_plugin.install}
