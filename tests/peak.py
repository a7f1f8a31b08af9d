"""The most memory that some work takes, of this process alone and from now on."""

from __future__ import annotations

import re
from pathlib import Path

STATUS = Path("/proc/self/status")


class Peak:
    """Forgets the peak so far when it is made; ``ru_maxrss`` cannot, so that an old peak hides all below."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.before_kib = _kib()

    def grown_kib(self) -> int:
        """How far the peak has gone past where it stood."""
        return _kib() - self.before_kib


def _kib() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1])
