"""Ninerank trains click-through-rate and ranking models on CPU, NVIDIA GPU and Ascend NPU, and serves them.

Importing it loads nothing heavy: the public names below load their modules when they are first asked for.
"""

import os as _os
import sys as _sys
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ninerank.config import Config as Config
    from ninerank.device import Device as Device
    from ninerank.errors import NinerankError as NinerankError
    from ninerank.features.batch import Batch as Batch

__version__ = "0.1.0"

_PUBLIC = {
    "Batch": "ninerank.features.batch",
    "Config": "ninerank.config",
    "Device": "ninerank.device",
    "NinerankError": "ninerank.errors",
}

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604 - the keys are names

# With torch_npu installed and CANN missing, `import torch` itself fails while it loads backends on its own accord.
# `ninerank.device` imports torch_npu when an NPU is asked for, so torch need not; whoever set the variable keeps it.
if "torch" not in _sys.modules and _find_spec("torch_npu") is not None:
    _os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        value = getattr(_import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ninerank' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
