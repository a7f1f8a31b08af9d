"""Named methods: each TOML file sets form, policy and rule of one published method."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any

from polyrank.errors import InputError, choices
from polyrank.schema import Schema


class Recipe(Schema):
    """A published method as a config fragment, with the card that `polyrank methods` prints."""

    title: str
    paper: str
    travels: str
    exactness: str
    needs: str
    config: dict[str, Any]


@cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name, sorted."""
    folder = resources.files(__package__)
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {
        file.name.removesuffix(".toml"): Recipe.model_validate(tomllib.loads(file.read_text()))
        for file in files
    }


def recipe(name: object) -> Recipe:
    """Raises: InputError when there is no recipe of that name."""
    if not isinstance(name, str) or name not in recipes():
        raise InputError("method", name, choices(name, recipes()))
    return recipes()[name]
