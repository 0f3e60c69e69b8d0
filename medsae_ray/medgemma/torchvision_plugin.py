"""vLLM's Gemma 3 without torchvision: its image processor by PIL instead.

vLLM loads this by the entry point `vllm.general_plugins` in each of its processes, the API server's included.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

MODULE = "transformers.models.gemma3.image_processing_gemma3"
"""The module vLLM's Gemma 3 takes its image processor from; it imports torchvision."""


class _PilProcessor(ModuleType):
    """Stands in `sys.modules` for `MODULE`; transformers is first loaded when somebody asks for the class."""

    def __getattr__(self, name: str) -> Any:
        if name != "Gemma3ImageProcessor":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        return Gemma3ImageProcessorPil


def install() -> None:
    """Let `Gemma3ImageProcessor` be the PIL one in this process, where torchvision cannot be imported.

    That is where it is absent, or a build that does not fit PyTorch (pip's choice beside a CPU build of it).
    A build that fails is hidden from this process as a whole, because transformers would import it wherever
    it is found. Where torchvision imports, nothing is changed. May be called again, and before anything else.
    """
    if MODULE in sys.modules or _importable():
        return
    sys.modules[MODULE] = _PilProcessor(MODULE)


def _importable() -> bool:
    """Whether torchvision imports; one that fails leaves no modules behind, and None in its place."""
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision.transforms.v2.functional")
    except Exception:  # a misfitting build fails as RuntimeError, OSError, AttributeError, …
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # Python's own mark of "not importable"
        if loaded := sys.modules.get("transformers.utils.import_utils"):
            loaded.is_torchvision_available.cache_clear()
        return False
    return True
