"""Whole federated runs, start-up included: polyrank against peers on the same work.

    python -m benchmarks.peers --data FOLDER --out DATED.json

20 clients, 10 a round, 5 rounds of 10 local steps of batch 8 on MiniLM-L6, LoRA of rank 8 on query, key and
value, plain SGD, fp32, one thread, one worker. Every run is a process of its own, the sides take turns, and
ratios are taken pair by pair. Every side must end in the same adapter before a number is printed. Making the
token ids is on nobody's account, nor is evaluation. With --out, every finished pair is written beside that
file as it ends, and pairs that are there already are not run again.

This process imports no torch: a page that it shared with a side would count for half in that side's PSS.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.watch import watch

ROOT = Path(__file__).parents[1]
ROUNDS, COHORT, STEPS = 5, 10, 10
TOLERANCE = 1e-3
OURS = "polyrank"
SIDES = {  # module, and the packages that it needs besides polyrank's own
    OURS: ("polyrank_side", ()),
    "peft_loop": ("peft_loop", ()),
    "hf_trainer": ("hf_trainer", ("accelerate",)),
    "flower": ("flower_sim", ("flwr", "ray")),
}
MEASURES = ("cpu_s", "wall_s", "peak_pss_bytes")
State = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Variant:
    """One piece of work.

    Args:
        top: blocks with an adapter, counted from the output.
        ag_news: real texts; otherwise random ids, 64 of them in every text.
        pad_to: tokens that the peers pad to; None pads to the longest text of the batch.
    """

    title: str
    top: int
    ag_news: bool
    pad_to: int | None


VARIANTS = {
    "full": Variant("64 full tokens, all blocks", 6, False, 64),
    "ag_news": Variant("AG News, peers pad to 128, all blocks", 6, True, 128),
    "ag_news_longest": Variant("AG News, peers pad to a batch's longest, all blocks", 6, True, None),
    "top": Variant("64 full tokens, adapters in the top block alone", 1, False, 64),
}


@dataclass(frozen=True)
class Run:
    """What one whole run of one side took.

    Args:
        start_s: seconds from the launch until the first client begins to train.
        difference: from polyrank's result in the same pair; see `largest_difference`.
    """

    variant: str
    side: str
    pair: int
    start_s: float
    wall_s: float
    cpu_s: float
    peak_pss_bytes: int
    difference: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["full", "ag_news", "top"])
    parser.add_argument("--data", type=Path, default=None, help="folder that holds ag_news/")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    sides = list(present(SIDES))
    kept = None if given.out is None else given.out.with_suffix(".runs.jsonl")
    runs = read_runs(kept)
    for name in given.variants:
        missing = set(range(given.pairs)) - {run.pair for run in runs if run.variant == name}
        if not missing:
            continue
        if VARIANTS[name].ag_news and given.data is None:
            tell(f"{name}: skipped, name the folder that holds ag_news/ with --data")
            continue
        with tempfile.TemporaryDirectory() as folder:
            make_work(name, Path(folder), given.data)
            for pair in missing:
                runs += keep(run_pair(name, pair, sides, Path(folder)), kept)
    print(table(runs))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(results(runs), indent=2) + "\n")


def read_runs(path: Path | None) -> list[Run]:
    """The runs of earlier calls."""
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    return [Run(**json.loads(line)) for line in lines]


def keep(runs: Sequence[Run], path: Path | None) -> Sequence[Run]:
    """Add the runs of one pair to a file, if there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(asdict(run)) + "\n" for run in runs)
    return runs


def present(sides: Mapping[str, tuple[str, Sequence[str]]]) -> Iterable[str]:
    """The sides whose packages are installed; one line for each of the others."""
    for side, (_, packages) in sides.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            tell(f"{side}: skipped, needs {' and '.join(missing)}, which `make bench` installs")
        else:
            yield side


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def make_work(variant: str, folder: Path, data: Path | None) -> None:
    """Have the work of a variant written into a folder, by a process that may import torch."""
    command = [sys.executable, "-m", "benchmarks.plan", variant, str(folder)]
    command += ["--data", str(data.resolve())] if data is not None else []
    subprocess.run(command, env=environment(), check=True)


# --- running -------------------------------------------------------------------------------------


def run_pair(variant: str, pair: int, sides: Sequence[str], folder: Path) -> list[Run]:
    """One run of each side, polyrank first; stops where a side fails or ends in another adapter."""
    runs, reference, start = [], None, start_in(folder)
    for side in sides:
        tell(f"{variant}, pair {pair + 1}: {side}")
        with tempfile.TemporaryDirectory() as out:
            run, final = run_side(variant, side, pair, folder, Path(out))
        reference = reference or final
        apart = largest_difference(final, reference, start)
        if apart > TOLERANCE:
            sys.exit(f"{side} ends in another adapter than {OURS}: {apart:.1e} of the largest change apart")
        runs.append(Run(**run, difference=apart))
    return runs


def start_in(folder: Path) -> State:
    """The start that every side was given."""
    tensors = load_file(folder / "work.safetensors")
    return {n.removeprefix("start/"): array for n, array in tensors.items() if n.startswith("start/")}


def run_side(variant: str, side: str, pair: int, folder: Path, out: Path) -> tuple[dict[str, Any], State]:
    """What one process of a side took, and what it trained."""
    log = out / "log"
    command = [sys.executable, "-m", f"benchmarks.sides.{SIDES[side][0]}", str(folder), str(out)]
    status, used = watch(command, environment(), log)
    if status != 0 or not (out / "final.safetensors").exists():
        sys.exit(f"{side} failed with status {status}:\n{log.read_text()[-3000:]}")
    start_s = float((out / "first_session").read_text()) - used.started
    numbers = {name: value for name, value in asdict(used).items() if name != "started"}
    run = {"variant": variant, "side": side, "pair": pair, "start_s": start_s, **numbers}
    return run, load_file(out / "final.safetensors")


def environment() -> dict[str, str]:
    """What every side runs under: one thread, no network, nothing reported to anybody."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_TELEMETRY_ENABLED": "0",
    }


# --- comparing -----------------------------------------------------------------------------------


def largest_difference(final: State, reference: State, start: State) -> float:
    """Largest difference of a weight over the largest change of its kind (A, B or head) in training.

    Taken by change, as A moves so little that by weight a side that never trains it would pass.
    """
    if set(final) != set(reference):
        return float("inf")
    worst = 0.0
    for kind in {kind_of(name) for name in reference}:
        names = [name for name in reference if kind_of(name) == kind]
        apart = max(float(np.abs(final[name] - reference[name]).max()) for name in names)
        moved = max(float(np.abs(reference[name] - start[name]).max()) for name in names)
        worst = max(worst, apart / moved if moved > 0 else float("inf"))
    return worst


def kind_of(name: str) -> str:
    return "head" if name.startswith("head/") else name.rpartition("/")[2]


def rows_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Medians of each side on each variant."""
    rows = []
    for variant, side in dict.fromkeys((run.variant, run.side) for run in runs):
        own = [run for run in runs if (run.variant, run.side) == (variant, side)]
        row = {name: median([getattr(run, name) for run in own]) for name in ("start_s", *MEASURES)}
        row |= {"steps_per_cpu_s": ROUNDS * COHORT * STEPS / row["cpu_s"]}
        row |= {"difference": max(run.difference for run in own), "pairs": len(own)}
        rows.append({"variant": variant, "side": side, **row})
    return rows


def ratios_of(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Peer over polyrank by variant, peer and measure: median, least and most over the pairs."""
    ours = {(run.variant, run.pair): run for run in runs if run.side == OURS}
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for variant, side in dict.fromkeys((run.variant, run.side) for run in runs if run.side != OURS):
        own = [run for run in runs if (run.variant, run.side) == (variant, side)]
        for name in MEASURES:
            each = [getattr(run, name) / getattr(ours[variant, run.pair], name) for run in own]
            spread = {"median": median(each), "least": min(each), "most": max(each)}
            found.setdefault(variant, {}).setdefault(side, {})[name] = spread
    return found


def table(runs: Sequence[Run]) -> str:
    """A markdown table: medians of each side, and its ratios to polyrank."""
    ratios = ratios_of(runs)
    lines = [
        "| work | side | CPU-s | ratio | wall s | ratio | peak PSS MiB | ratio "
        "| start s | steps per CPU-s | difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows_of(runs):
        own = ratios.get(row["variant"], {}).get(row["side"], {})
        values = {
            "cpu_s": row["cpu_s"],
            "wall_s": row["wall_s"],
            "peak_pss_bytes": row["peak_pss_bytes"] / 2**20,
        }
        cells = [VARIANTS[row["variant"]].title, row["side"]]
        for name, value in values.items():
            cells += [f"{value:.0f}", spread_text(own.get(name))]
        cells += [f"{row['start_s']:.1f}", f"{row['steps_per_cpu_s']:.1f}", f"{row['difference']:.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread_text(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return "1"
    return f"{spread['median']:.2f} ({spread['least']:.2f} to {spread['most']:.2f})"


def results(runs: Sequence[Run]) -> dict[str, Any]:
    """What goes into the JSON file; asked for when all sides have ended, as it imports torch."""
    from polyrank.ledger import versions

    return {
        "date": str(datetime.date.today()),
        "versions": {**versions(), "peers": peer_versions()},
        "machine": machine(),
        "rows": rows_of(runs),
        "ratios": ratios_of(runs),
        "runs": [asdict(run) for run in runs],
    }


def peer_versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in ("accelerate", "flwr", "ray") if name in installed}


def machine() -> dict[str, Any]:
    """The processor and the number of its cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.processor(), "cores": len(os.sched_getaffinity(0))}


if __name__ == "__main__":
    main()
