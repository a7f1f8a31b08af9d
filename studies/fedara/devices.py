"""What finished runs would have taken on one kind of device: simulated seconds and joules of a whole run.

    python -m studies.fedara.devices --out OUT [--seeds 0 1 2]

Every client is such a device on WiFi. "Without module pruning" is the same run with its slots masked
instead of gone: it trains as long as fixed-rank SVD adapters of the same seed, and sends what FedARA sends.
Prints a table of the methods whose run folders are in OUT.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from polyrank.clock import FleetTable
from polyrank.device import packaged
from polyrank.replay import replay
from studies.fedara.arms import SMALL, TUNED_ON, arms

DEVICES = ("jetson-agx-orin", "jetson-orin-nano", "raspberry-pi-5")
FULL, OURS = "fedsvd", "fedara-4"
Rows = Sequence[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of the study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    data, partition = TUNED_ON
    runs = {
        (name, seed): given.out / data / partition / name / str(seed)
        for name in arms(SMALL[data].rounds)
        for seed in given.seeds
    }
    missing = {name for (name, _), run in runs.items() if not (run / "summary.json").exists()}
    names = [name for name in arms(SMALL[data].rounds) if name not in missing]
    print("| method | " + " | ".join(f"{device}: s, kJ" for device in DEVICES) + " |")
    print("|---" * (len(DEVICES) + 1) + "|")
    found: dict[str, list[str]] = {name: [] for name in [*names, f"{OURS}, without module pruning"]}
    for device in DEVICES:
        rows = {key: priced(run, device) for key, run in runs.items() if key[0] in names}
        for name in names:
            found[name].append(told([rows[name, seed] for seed in given.seeds]))
        watts = packaged().devices[device].modes[0].compute_w
        if not {OURS, FULL} & missing:
            masked = [unpruned(rows[OURS, seed], rows[FULL, seed], watts) for seed in given.seeds]
            found[f"{OURS}, without module pruning"].append(told(masked))
    for name, cells in found.items():
        if cells:
            print(f"| {name} | " + " | ".join(cells) + " |")


def priced(run: Path, device: str) -> Rows:
    """The sessions of a run, as they would have been on a fleet of one kind of device."""
    with TemporaryDirectory() as folder:
        fleet = Path(folder) / "fleet.toml"
        fleet.write_text(f'fleet = {{ members = [{{ device = "{device}" }}] }}\n')
        return replay(run, FleetTable(name=str(fleet)))


def unpruned(ours: Rows, full: Rows, compute_w: float) -> Rows:
    """Our sessions with the computing of the full ones."""
    mixed = []
    for row, other in zip(ours, full, strict=True):
        own, all_slots = row["simulated"], other["simulated"]
        assert (row["round"], row["client"]) == (other["round"], other["client"])
        longer_s = all_slots["compute_s"] - own["compute_s"]
        spent = {"total_s": own["total_s"] + longer_s, "energy_j": own["energy_j"] + compute_w * longer_s}
        mixed.append({**row, "simulated": {**own, **spent}})
    return mixed


def told(runs: Sequence[Rows]) -> str:
    """Seconds of a run, each round as long as its slowest client, and joules of all; means over seeds."""
    seconds = [
        sum(
            max(row["simulated"]["total_s"] for row in rows)
            for _, rows in groupby(run, lambda row: row["round"])
        )
        for run in runs
    ]
    joules = [sum(row["simulated"]["energy_j"] for row in run) for run in runs]
    return f"{mean(seconds):.0f}, {mean(joules) / 1e3:.2f}"


if __name__ == "__main__":
    main()
