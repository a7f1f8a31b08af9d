"""What this machine has, for people who ask why something does not run."""

from __future__ import annotations

import os
from typing import Any

import torch

from polyrank.errors import InputError
from polyrank.ledger import versions
from polyrank.models.frozen import bf16_is_fast
from polyrank.models.load import PACKAGED, packaged_model, pick_device


def examine() -> dict[str, Any]:
    """Findings by name: versions, devices, memory, the packaged model."""
    found = versions()
    packages = found.pop("packages")
    try:
        model = str(packaged_model())
    except InputError as error:
        model = error.allowed
    return {
        **found,
        **packages,
        "cpu cores": os.cpu_count(),
        "device auto": str(pick_device("auto")),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "no",
        "mps": torch.backends.mps.is_available(),
        "bf16 on cpu": bf16_is_fast(),
        f"model {PACKAGED}": model,
    }
