"""The run folder: who may write it, and the rows that a run leaves in it.

    config.json      the resolved config          rounds.jsonl    one row per round
    versions.json    python, packages, commit     clients.jsonl   one row per client and round
    partition.json   sizes and label counts       summary.json    the result in one table
    state.safetensors, adapter/, report.html
    until it is finished: checkpoints/ (commit.py) and journal/ (received.py)

Measured seconds end in ``wall_s``; what is simulated for a fleet of devices has columns of its own
(``simulated_s``, ``waiting_s``, ``energy_j``, ``peak_memory_bytes``, ``late``, and the table ``simulated`` of
a client). Everything but wall_s in rounds.jsonl is the same for the same config and seed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyrank import durable
from polyrank.clock import Priced
from polyrank.data.partition import ClientRows, label_counts
from polyrank.data.texts import Corpus
from polyrank.engine.base import Client
from polyrank.errors import InputError
from polyrank.messages import ClientScores
from polyrank.round import RoundRecord

LEDGERS = ("rounds.jsonl", "clients.jsonl", "slots.jsonl")
"""The files that grow by some rows every round."""
_TRACKED = (
    "polyrank",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "datasets",
    "flwr-datasets",
    "tokenizers",
    "numpy",
    "pydantic",
)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """An existing folder that belongs to one run.

    Args:
        lock: the right to write it, where this process has it.
    """

    path: Path
    lock: durable.Lock | None = None

    def write(self, name: str, content: Any) -> None:
        """A JSON file, readable by people; the old one or the new one, never a part.

        Raises: RunError when the disk does not take it.
        """
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        with durable.disk_errors(self.path / name):
            durable.replace(self.path / name, f"{text}\n".encode())

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """One JSON row per line.

        Raises: RunError when the disk does not take them.
        """
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        with durable.disk_errors(self.path / name):
            durable.append(self.path / name, text.encode())

    def release(self) -> None:
        """Let others write it."""
        if self.lock is not None:
            self.lock.release()

    def read(self, name: str) -> Any:
        """Raises: InputError when the file is not there or is not JSON."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            allowed = f"is not a finished run folder ({name}: {type(error).__name__})"
            raise InputError("RUN", str(self.path), allowed) from error

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        """All rows of a .jsonl file, but for one that is just being written; none when there is no file."""
        if not (self.path / name).exists():
            return []
        data = (self.path / name).read_bytes()
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def refuse_existing(out: Path | None) -> None:
    """Raises: InputError when ``out`` exists; asked before the work as well as after it."""
    if out is not None and (durable.kind_at(out) != "nothing" or os.path.islink(out)):
        raise InputError("--out", str(out), "exists already; name a new folder, nothing was overwritten")


def create_run_folder(out: Path | None, stem: str) -> RunFolder:
    """A new folder: ``out``, or the first free ``runs/STEM-N``.

    Raises: InputError when ``out`` exists already; nothing in it is touched.
    """
    if out is not None:
        refuse_existing(out)
        try:
            durable.make_folder(out)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError("--out", str(out), f"cannot be made ({why})") from error
        return RunFolder(out, durable.lock(out))
    number = 1
    while True:
        path = Path("runs") / f"{stem}-{number}"
        try:
            durable.make_folder(path)
        except FileExistsError:
            number += 1
        except OSError as error:
            allowed = f"cannot be made ({error.strerror}); name another"
            raise InputError("--out", str(path), allowed) from error
        else:
            return RunFolder(path, durable.lock(path))


def versions() -> dict[str, Any]:
    """What a result depends on besides the config: python, packages, machine, commit."""
    packages = {}
    for name in _TRACKED:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "packages": packages,
        "commit": source_commit(),
    }


def source_commit() -> str | None:
    """The git commit polyrank runs from, with ``+changes`` where files differ; None outside git."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", "ledger.py"):
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def partition_table(corpus: Corpus, clients: Sequence[ClientRows]) -> dict[str, Any]:
    """Sizes and label counts of every client and of the test texts."""
    count = len(corpus.label_names)
    return {
        "labels": list(corpus.label_names),
        "clients": [
            {
                "client": client.client,
                "num_train": len(client.train),
                "num_holdout": len(client.holdout),
                "label_counts": label_counts(corpus.train, client.train, count),
            }
            for client in clients
        ],
        "num_test": len(corpus.test),
        "test_label_counts": label_counts(corpus.test, range(len(corpus.test)), count),
    }


def site_table(corpus: Corpus, sites: Sequence[Client]) -> dict[str, Any]:
    """`partition_table` of real sites, which say how many texts they have and no more."""
    here = partition_table(corpus, [])
    rows = [
        {"client": site.id, "num_train": site.num_examples, "num_holdout": None, "label_counts": None}
        for site in sites
    ]
    return {**here, "clients": rows}


def round_row(record: RoundRecord, scores: Mapping[str, float] | None) -> dict[str, Any]:
    """One line of rounds.jsonl; test scores only in rounds that were scored."""
    replies = record.replies
    row: dict[str, Any] = {
        "round": record.round,
        "cohort": len({reply.client for reply in replies if reply.counts}),
        "failed": sum(reply.learned is None for reply in replies),
        "reasons": dict(sorted(Counter(reply.reason for reply in replies if reply.reason).items())),
        "attempts": 1 + max((reply.attempt for reply in replies), default=0),
        "learning_rate": record.learning_rate,
        "steps": sum(int(r.learned.metrics["steps"]) for r in replies if r.learned is not None),
        "bytes_down": sum(reply.bytes_down for reply in replies),
        "bytes_up": sum(reply.bytes_up for reply in replies),
        "client_wall_s": sum(reply.wall_s for reply in replies),
        "active_slots": sum(record.active.values()),
    }
    if not record.private:
        row |= {"train_loss": record.train_loss, "aggregation_error": record.aggregation_error}
    if record.budget is not None:
        row["planned_slots"] = record.budget
    if record.simulated_s is not None:
        row |= _simulated_round(record, record.simulated_s)
    return row | dict(record.notes) | {f"test_{name}": value for name, value in (scores or {}).items()}


def _simulated_round(record: RoundRecord, end_s: float) -> dict[str, Any]:
    """Simulated time, mean waiting, joules of all, and the most memory of one device."""
    priced = [reply.priced for reply in record.replies if reply.priced is not None]
    waits = [max(0.0, end_s - one.cost.total_s) for one in priced]
    return {
        "simulated_s": end_s,
        "waiting_s": sum(waits) / max(1, len(waits)),
        "energy_j": sum(one.cost.energy_j for one in priced),
        "peak_memory_bytes": max((one.cost.memory_bytes for one in priced), default=0),
        "over_memory": sum(not one.fits for one in priced),
        "late": sum(one.cost.total_s > end_s for one in priced),
    }


def simulated_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all rounds: seconds, mean waiting, joules, the most memory, sessions that were late or over it."""
    return {
        "simulated_s": sum(row["simulated_s"] for row in rows),
        "waiting_s": sum(row["waiting_s"] for row in rows) / len(rows),
        "energy_j": sum(row["energy_j"] for row in rows),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
        "late": sum(row["late"] for row in rows),
        "over_memory": sum(row["over_memory"] for row in rows),
    }


def slot_row(record: RoundRecord) -> dict[str, Any]:
    """One line of slots.jsonl: the active slots of each module when the round began."""
    return {"round": record.round, "slots": dict(record.active)}


def client_rows(record: RoundRecord) -> list[dict[str, Any]]:
    """The lines of clients.jsonl of one round."""
    return [
        {
            "round": record.round,
            "client": reply.client,
            "aggregated": reply.counts,
            "slots": reply.slots,
            "num_examples": reply.learned.num_examples if reply.learned else None,
            "metrics": dict(reply.learned.metrics) if reply.learned and not record.private else None,
            "bytes_down": reply.bytes_down,
            "bytes_up": reply.bytes_up,
            "attempt": reply.attempt,
            "reason": reply.reason,
            "error": reply.error,
            "wall_s": reply.wall_s,
        }
        | ({} if reply.priced is None else {"simulated": simulated_row(reply.priced, record.simulated_s)})
        for reply in record.replies
    ]


def simulated_row(priced: Priced, end_s: float | None) -> dict[str, Any]:
    """What a client's session cost on its simulated device."""
    spent = priced.cost
    return {
        "device": priced.device,
        "mode": priced.mode,
        "depth": priced.depth,
        "ranks": list(priced.ranks),
        "stored_blocks": priced.stored,
        "down_s": spent.down_s,
        "compute_s": spent.compute_s,
        "up_s": spent.up_s,
        "total_s": spent.total_s,
        "waiting_s": None if end_s is None else max(0.0, end_s - spent.total_s),
        "late": end_s is not None and spent.total_s > end_s,
        "energy_j": spent.energy_j,
        "memory_bytes": spent.memory_bytes,
        "limit_bytes": priced.limit_bytes,
    }


def score_rows(scores: Sequence[ClientScores]) -> list[dict[str, Any]]:
    """The lines of client_scores.jsonl."""
    return [
        {"client": s.client, "num_examples": s.num_examples, **s.metrics}
        for s in sorted(scores, key=lambda s: s.client)
    ]
