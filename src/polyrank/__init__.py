"""polyrank: fine-tune one language model across many devices with low-rank adapters of unequal rank."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyrank.config import Config, load_config
    from polyrank.errors import InputError, RunError
    from polyrank.experiment import Result, run
    from polyrank.restart import resume

# transformers imports torchao wherever it is installed, and that tells on stderr of GPU kernels it lacks.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["Config", "InputError", "Result", "RunError", "__version__", "load_config", "resume", "run"]

_HOME = {
    "Config": "config",
    "load_config": "config",
    "InputError": "errors",
    "RunError": "errors",
    "Result": "experiment",
    "run": "experiment",
    "resume": "restart",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import polyrank` and `polyrank --help` stay light."""
    if name not in _HOME:
        raise AttributeError(f"module 'polyrank' has no attribute {name!r}")
    return getattr(importlib.import_module(f"polyrank.{_HOME[name]}"), name)
