"""Seeds as a stable hash of a path, so that every engine and every order of work draws the same numbers."""

from __future__ import annotations

import hashlib
import json


def seed_for(root: int, *path: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. ``seed_for(0, "train", round, client)``.

    Equal arguments give equal seeds on every machine; any other path gives an unrelated one.
    """
    name = json.dumps([root, *path]).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
