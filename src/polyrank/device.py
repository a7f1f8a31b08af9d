"""Hardware: what a device computes, holds and draws, over which link it talks, and who has which.

The figures stand in devices.toml, each with its source; a file of the same form adds the user's own.
A population is dealt out over a fleet once per run; a device's power mode is drawn anew every so many
rounds, and the speed of its link in every round. All draws depend on seed, client and round alone.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError

from polyrank.errors import InputError, choices
from polyrank.schema import Schema
from polyrank.seed import seed_for
from polyrank.tables import read_toml

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Range = tuple[Positive, Positive]
T = TypeVar("T")


class Mode(Schema):
    """A power mode: the share of the full clock, and the power drawn while computing."""

    name: str
    speed: Share
    compute_w: Positive


class Device(Schema):
    """A kind of device.

    ``peak_gflop_per_s`` is float32; ``achieved_share`` of it, ``launch_s`` per operation and
    ``usable_share`` of the memory are estimates unless the profile was calibrated.
    """

    title: str
    source: Annotated[str, Field(min_length=1)]
    peak_gflop_per_s: Positive
    achieved_share: Share
    bandwidth_gb_per_s: Positive
    launch_s: Annotated[float, Field(ge=0)]
    memory_gb: Positive
    usable_share: Share
    cuda: bool = False
    """Whether weights of 4 bits run there."""
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)]

    @property
    def usable_bytes(self) -> int:
        """Memory that a session may take."""
        return int(self.memory_gb * self.usable_share * 1e9)


class Link(Schema):
    """A kind of network: the ends between which a round's speed is drawn."""

    title: str
    source: Annotated[str, Field(min_length=1)]
    down_mbit_per_s: Range
    up_mbit_per_s: Range
    latency_s: Annotated[float, Field(ge=0)] = 0.0
    radio_w: Annotated[float, Field(ge=0)]


class Member(Schema):
    """So many parts of a fleet are devices of this kind on links of this kind."""

    device: str
    count: Annotated[int, Field(ge=1)] = 1
    link: str = "wifi"


class Fleet(Schema):
    """A mix of devices; ``modes_every`` rounds the power modes are redrawn, 0 keeps the first mode."""

    title: str = ""
    modes_every: Annotated[int, Field(ge=0)] = 0
    members: Annotated[tuple[Member, ...], Field(min_length=1)]


class Catalogue(Schema):
    """Everything known by name."""

    devices: dict[str, Device] = Field(default_factory=dict)
    links: dict[str, Link] = Field(default_factory=dict)
    fleets: dict[str, Fleet] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setup:
    """One client's device as it is in one round.

    Args:
        flop_per_s: that matrix products reach in this mode.
        bytes_per_s: of the device's memory.
        launch_s: lost per operation in this mode.
        usable_bytes: memory that a session may take.
    """

    device: str
    mode: str
    flop_per_s: float
    bytes_per_s: float
    launch_s: float
    usable_bytes: int
    compute_w: float
    down_bit_per_s: float
    up_bit_per_s: float
    latency_s: float
    radio_w: float


@dataclass(frozen=True)
class Roster:
    """Which client has which device, and how it is in each round.

    Args:
        owned: device name, device and link of each client.
    """

    owned: Mapping[str, tuple[str, Device, Link]]
    modes_every: int
    seed: int

    def device_of(self, client: str) -> str:
        """Name of a client's kind of device."""
        return self.owned[client][0]

    def setup(self, client: str, round_: int) -> Setup:
        """A client's device in a round, in the mode and at the speed drawn for it."""
        name, device, link = self.owned[client]
        mode = device.modes[0]
        if self.modes_every:
            era = round_ // self.modes_every
            mode = random.Random(seed_for(self.seed, "mode", client, era)).choice(device.modes)
        draw = random.Random(seed_for(self.seed, "link", client, round_))
        down, up = (draw.uniform(*ends) * 1e6 for ends in (link.down_mbit_per_s, link.up_mbit_per_s))
        return Setup(
            name,
            mode.name,
            device.peak_gflop_per_s * 1e9 * device.achieved_share * mode.speed,
            device.bandwidth_gb_per_s * 1e9 * mode.speed,
            device.launch_s / mode.speed,
            device.usable_bytes,
            mode.compute_w,
            down,
            up,
            link.latency_s,
            link.radio_w,
        )


def deal(name: str, population: Sequence[str], seed: int) -> Roster:
    """Deal the devices of a fleet out over a population, in the fleet's proportions.

    Args:
        name: of a packaged fleet, or the path of a TOML file with the tables ``fleet`` and, if it
            needs its own, ``devices`` and ``links``.

    Raises: InputError when the fleet, one of its devices or a link is unknown.
    """
    known, fleet = find_fleet(name)
    shuffled = list(population)
    random.Random(seed_for(seed, "fleet")).shuffle(shuffled)
    total, taken = sum(member.count for member in fleet.members), 0
    owned = {}
    for member in fleet.members:
        first, taken = round(taken * len(shuffled) / total), taken + member.count
        device = _named("fleet.members.device", member.device, known.devices)
        link = _named("fleet.members.link", member.link, known.links)
        for client in shuffled[first : round(taken * len(shuffled) / total)]:
            owned[client] = (member.device, device, link)
    return Roster({client: owned[client] for client in population}, fleet.modes_every, seed)


def find_fleet(name: str) -> tuple[Catalogue, Fleet]:
    """What is known by name, with the user's own laid over it, and the fleet.

    Raises: InputError when there is no such fleet or its file is not one.
    """
    known = packaged()
    if not name.endswith(".toml"):
        return known, _named("fleet.name", name, known.fleets)
    tables = dict(read_toml(Path(name), "fleet.name"))
    try:
        fleet = Fleet.model_validate(tables.pop("fleet", {}))
        own = Catalogue.model_validate(tables)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError("fleet.name", name, f"in that file, {place}: {first['msg']}") from error
    merged = Catalogue(devices=known.devices | own.devices, links=known.links | own.links)
    return merged, fleet


@cache
def packaged() -> Catalogue:
    """The devices, links and fleets that come with the package."""
    text = resources.files("polyrank").joinpath("devices.toml").read_text(encoding="utf-8")
    return Catalogue.model_validate(tomllib.loads(text))


def _named(key: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise InputError(key, name, choices(name, known))
    return known[name]
