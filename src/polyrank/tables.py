"""Reading the tables that people write: TOML files, and pydantic's complaints as one clear line."""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from polyrank.durable import kind_at
from polyrank.errors import InputError, choices, first_line


def read_toml(path: Path, key: str = "CONFIG") -> Mapping[str, Any]:
    """Raises: InputError when there is no such file, or it is not TOML."""
    if kind_at(path) != "file":
        raise InputError(key, str(path), "cannot be read: no such file")
    if path.suffix != ".toml":
        allowed = "must be a .toml file; texts are named by --set data.source=FILE"
        raise InputError(key, str(path), allowed)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(key, str(path), f"cannot be read ({type(error).__name__})") from error
    except (ValueError, RecursionError) as error:  # also numbers and nesting past what Python reads
        raise InputError(key, str(path), f"is not valid TOML ({first_line(error)})") from error


def as_input_error(error: ValidationError, root: type[BaseModel]) -> InputError:
    """The first complaint of pydantic as one line.

    Args:
        root: the table that was read.
    """
    first = error.errors()[0]
    if isinstance(inner := first.get("ctx", {}).get("error"), InputError):
        return inner
    keys, model = _walk(first["loc"], root)
    key, value = ".".join(keys), first["input"]
    match first["type"]:
        case "extra_forbidden":
            fields = model.model_fields if model is not None else ()
            name = str(first["loc"][-1])
            return InputError(key or name, value, f"unknown key; {choices(name, fields)}")
        case "literal_error":
            return InputError(key, value, f"must be {first['ctx']['expected']}")
        case "union_tag_invalid":
            tags = first["ctx"]["expected_tags"].replace("'", "").split(", ")
            tag = first["ctx"]["tag"]
            return InputError(f"{key}.kind", tag, choices(tag, tags))
        case "missing":
            return InputError(key, None, "must be given")
        case "model_type" | "dict_type" | "model_attributes_type":
            return InputError(key, value, "must be a table of keys")
        case _:
            message = first["msg"].removeprefix("Value error, ")
            return InputError(key or "config", value, message.replace("Input should be", "must be"))


def _walk(loc: Sequence[int | str], root: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The user's dotted key of an error, without union tags, and the table it stands in."""
    keys: list[str] = []
    model: type[BaseModel] | None = root
    options: list[type[BaseModel]] = []
    for part in loc:
        by_kind = {option.model_fields["kind"].default: option for option in options}
        if part in by_kind:
            model, options = by_kind[str(part)], []
            continue
        if not isinstance(part, int) and ("[" in part or part in ("str", "tuple")):
            continue
        keys.append(str(part))
        field = model.model_fields.get(str(part)) if model is not None else None
        if field is None:
            continue
        tables = _tables(field.annotation)
        if len(tables) == 1:
            model = tables[0]
        options = [table for table in tables if "kind" in table.model_fields]
    return keys, model


def _tables(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return [table for part in typing.get_args(annotation) for table in _tables(part)]
    return []
