"""FedARA (arXiv 2501.14406) against its baselines, on MiniLM: accuracy, bytes, time, energy.

    python -m studies.fedara.run --data DATA --out OUT

100 clients, 10 a round, 12 slots on every linear map, shrunk to 4 or to 2. The learning rate of each
method is the best of a grid on texts that no test uses. Finished cells are recorded beside this file
and not run again, so that the study may be stopped at any time. Writes tables.md into OUT. ``--full`` is the
size for a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from studies.fedara.arms import FULL, SMALL, TUNED_ON, Given, Setting, arms, config, rates_of, switches
from studies.fedara.tables import tables
from studies.records import recorded

TUNING_SEEDS = 1_000, 1_001, 1_002


def main() -> None:
    given = arguments()
    settings = FULL if given.full else SMALL
    rates = tune(given, settings)
    cells = dict(planned(given.data, settings, rates))
    if given.only:
        cells = {name: cell for name, cell in cells.items() if name.startswith(tuple(given.only))}
    lines = tables(recorded(cells, given.out, given.workers, records_of(given)), rates)
    (given.out / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77/, ag_news/, ...")
    parser.add_argument("--out", type=Path, required=True, help="folder for run folders and tables")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="100 rounds and 5 seeds everywhere")
    parser.add_argument("--only", nargs="+", help="cells whose names begin so, e.g. banking77/dirichlet-0.1")
    return parser.parse_args()


def records_of(given: argparse.Namespace) -> Path:
    """Where finished cells are recorded."""
    return Path(__file__).with_name("records-full.jsonl" if given.full else "records.jsonl")


def tune(given: argparse.Namespace, settings: Mapping[str, Setting]) -> dict[str, dict[float, float]]:
    """Accuracy of every method at every rate, on a fifth of the train texts that is kept for this alone.

    All rates meet one seed, the best two of each method then the others: a rate may be the best of one
    seed and let the model collapse in the next. Means are over the seeds that a rate was tried with.
    """
    names = [arm for arm in arms(settings[TUNED_ON[0]].rounds) if arm != "fedara-2"]
    first, *others = TUNING_SEEDS
    table = tried(given, settings, {arm: rates_of(arm) for arm in names}, [first])
    again = {arm: sorted(found, key=lambda rate: -found[rate])[:2] for arm, found in table.items()}
    for arm, means in tried(given, settings, again, others).items():
        for rate, value in means.items():
            table[arm][rate] = (table[arm][rate] + len(others) * value) / len(TUNING_SEEDS)
    return table | {"fedara-2": table["fedara-4"]}


def tried(
    given: argparse.Namespace,
    settings: Mapping[str, Setting],
    rates: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
) -> dict[str, dict[float, float]]:
    """Mean accuracy over some seeds, by method and rate."""
    data, partition = TUNED_ON
    setting, source = settings[data], given.data / data / "train.parquet"
    chosen = arms(setting.rounds)
    cells = {
        f"tuning/{arm}/{rate:g}/{seed}": config(source, data, partition, seed, chosen[arm], rate, setting)
        for seed in seeds
        for arm, own in rates.items()
        for rate in own
    }
    found = recorded(cells, given.out, given.workers, records_of(given))
    return {
        arm: {rate: mean(found[f"tuning/{arm}/{rate:g}/{seed}"].accuracy for seed in seeds) for rate in own}
        for arm, own in rates.items()
    }


def best(rates: Mapping[float, float]) -> float:
    """The rate of the highest accuracy; the smaller one of equals."""
    return max(sorted(rates), key=lambda rate: rates[rate])


def planned(
    data: Path, settings: Mapping[str, Setting], rates: Mapping[str, Mapping[float, float]]
) -> Iterable[tuple[str, Given]]:
    """Every cell by ``data/partition/arm/seed``, what matters most first."""
    for name, setting in settings.items():
        for partition in setting.partitions:
            chosen = arms(setting.rounds)
            if (name, partition) == TUNED_ON:
                chosen |= switches()
            for seed in range(setting.seeds):
                for arm, one in chosen.items():
                    if arm in switches() and seed >= 3:
                        continue
                    like = "fedit" if arm == "without-SVD-form" else "fedara-4"
                    rate = best(rates.get(arm, rates[like]))
                    yield (
                        f"{name}/{partition}/{arm}/{seed}",
                        config(data / name, name, partition, seed, one, rate, setting),
                    )


if __name__ == "__main__":
    main()
