"""The base of every table a user can write in a config file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """A closed, frozen record: an unknown key is an error, and a value never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
