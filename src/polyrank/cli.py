"""The command line. Heavy imports stand inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import polyrank
from polyrank.errors import InputError, RunError, printable

if TYPE_CHECKING:
    pass

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune one language model across many devices with low-rank adapters of unequal rank.",
)


@app.callback(invoke_without_command=True)
def front(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Fine-tune one language model across many devices with low-rank adapters of unequal rank."""
    if version:
        typer.echo(polyrank.__version__)
        raise typer.Exit


ConfigArgument = Annotated[Path | None, typer.Argument(help="A TOML file; none for the quick start.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Lay key=value over the config, e.g. rounds=20.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
UnfinishedArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that stopped.")]
RunArgument = Annotated[Path, typer.Argument(help="The folder of a finished run.")]


@app.command()
def run(
    config: ConfigArgument = None,
    settings: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for the run.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune across devices and leave a run folder with adapter and report."""
    from polyrank.assemble import prepare
    from polyrank.config import load_config
    from polyrank.experiment import conduct, open_folder
    from polyrank.ledger import refuse_existing

    refuse_existing(out)
    resolved = load_config(config, settings or [])
    if resolved.engine.kind == "flare":
        from polyrank.cli_network import run_remote

        _go_through(*run_remote(resolved, out), resolved.task, as_json)
        return
    if not as_json:
        typer.echo(f"{resolved.method} on {resolved.data.source}, model {resolved.model.name}: preparing")
        if resolved.robust is not None:
            typer.echo(resolved.robust.limits())
    experiment = prepare(resolved)
    folder = open_folder(experiment, out)
    rounds = experiment.federation.rounds
    _go_through(conduct(experiment, folder), folder.path, rounds, resolved.task, as_json)


@app.command()
def resume(run_folder: UnfinishedArgument, as_json: JsonOption = False) -> None:
    """Go on with a run that stopped, to the same result as if it had not."""
    from polyrank.experiment import conduct
    from polyrank.measures import judged
    from polyrank.restart import reopen, restore

    if (remote := _remote_rows(run_folder)) is not None:
        _go_through(*remote, as_json)
        return
    reopened = reopen(run_folder)
    for line in reopened.complaints:
        typer.echo(f"polyrank: {line}; the one before it is taken", err=True)
    if reopened.summary is not None:
        if as_json:
            _print_json({"run": str(run_folder), **reopened.summary})
        else:
            lead, _ = judged(reopened.summary)
            typer.echo(f"{run_folder} is finished: {lead.title} {reopened.summary[lead.on_test]:.3f}")
        return
    experiment, manifest = restore(reopened)
    rounds, task = experiment.federation.rounds, experiment.config.task
    if not as_json:
        typer.echo(f"{run_folder}: {experiment.start.round} of {rounds} rounds are done")
    _go_through(conduct(experiment, reopened.folder, manifest), run_folder, rounds, task, as_json)


def _remote_rows(path: Path) -> tuple[Iterator[dict[str, Any]], Path, int, str] | None:
    """The rows of an unfinished run over a network, or None where clients are simulated."""
    from polyrank import durable
    from polyrank.export import read_config
    from polyrank.ledger import RunFolder

    if durable.kind_at(path / "config.json") != "file" or (path / "summary.json").exists():
        return None
    config = read_config(RunFolder(path))
    if config.engine.kind != "flare":
        return None
    from polyrank.cli_network import resume_remote

    return *resume_remote(config, path), config.task


def _go_through(rows: Iterator[dict[str, Any]], path: Path, rounds: int, task: str, as_json: bool) -> None:
    """Show a run's rows as they come, and its result."""
    from polyrank.measures import told
    from polyrank.progress import show

    summary: dict[str, Any] = {}
    try:
        for row in rows if as_json else show(rows, rounds, task):
            summary = row
    except KeyboardInterrupt:
        typer.echo(f"polyrank: stopped; `polyrank resume {path}` goes on from its last round", err=True)
        sys.exit(130)
    if as_json:
        _print_json({"run": str(path), **summary})
        return
    typer.echo(f"{told(summary)} in {summary['wall_s']:.0f} s")
    typer.echo(f"report   {path / 'report.html'}")
    typer.echo(f"adapter  {path / 'adapter'}")


@app.command()
def plan(
    config: ConfigArgument = None,
    settings: SetOption = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="What a language model takes, from its config alone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say, before any training, what each class of devices would do, what it costs, and why."""
    from polyrank.config import load_config
    from polyrank.memory import memory_lines, plan_memory
    from polyrank.plan import make_plan, plan_lines

    resolved = load_config(config, settings or [])
    content = plan_memory(resolved) if memory else make_plan(resolved)
    if as_json:
        _print_json(content)
        return
    for line in memory_lines(content) if memory else plan_lines(content):
        typer.echo(line)


@app.command()
def compare(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME_OR_CONFIG...", help="Recipes and TOML files; the first leads."),
    ],
    seeds: Annotated[int, typer.Option(help="Run every arm on the seeds 0 to N-1.")] = 3,
    settings: SetOption = None,
    target: Annotated[
        float | None, typer.Option(help="Tell what it took to this test accuracy (or perplexity).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder, or one to finish.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run several methods or configs over the same seeds and write one comparison."""
    import polyrank.compare as comparison

    arms = comparison.read_arms(names, settings or [])
    folder = out or comparison.free_folder()
    rows = comparison.compare(arms, range(seeds), folder, target)
    cells, task = comparison.cell_names(arms, range(seeds)), next(iter(arms.values())).task
    failed = [
        row for row in (rows if as_json else comparison.show_cells(rows, cells, task)) if "error" in row
    ]
    told = "; ".join(f"{row['label']}-{row['seed']}: {row['error']}" for row in failed)
    if len(failed) == len(cells):
        raise RunError(f"every cell failed ({told})")
    content = comparison.write_comparison(folder, target)
    if as_json:
        _print_json({"comparison": str(folder), **content})
    else:
        for line in comparison.result_lines(content):
            typer.echo(line)
        typer.echo(f"table    {folder / 'compare.md'}")
        typer.echo(f"page     {folder / 'compare.html'}")
    if failed:
        raise RunError(f"{len(failed)} of {len(cells)} cells failed and are left out ({told})")


@app.command()
def export(
    run_folder: RunArgument,
    merge: Annotated[bool, typer.Option("--merge", help="A plain model with the adapter folded in.")] = False,
    uniform: Annotated[
        bool, typer.Option("--uniform-rank", help="Zero slots up to one rank, as serving engines want.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="New folder; RUN/merged or RUN/exported.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a run's adapter for PEFT, or a plain transformers model with --merge."""
    from polyrank.export import export_run

    target = out or run_folder / ("merged" if merge else "exported")
    path = export_run(run_folder, target, merged=merge, uniform=uniform)
    if as_json:
        _print_json({"path": str(path), "merged": merge})
    else:
        typer.echo(str(path))


@app.command()
def generate(
    run_folder: RunArgument,
    prompt: Annotated[list[str], typer.Option(help="What to say to the model; may be given again.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where a response is cut.")] = 128,
    as_json: JsonOption = False,
) -> None:
    """Let a run's language model respond, for a first look."""
    from polyrank.speak import speak

    said = speak(run_folder, prompt, max_new_tokens)
    if as_json:
        _print_json([{"prompt": asked, "response": text} for asked, text in zip(prompt, said, strict=True)])
        return
    for text in said:
        typer.echo(text)


@app.command()
def report(run_folder: RunArgument) -> None:
    """Make a run's report.html anew from its folder."""
    from polyrank.ledger import RunFolder
    from polyrank.report import write_report

    write_report(RunFolder(run_folder))
    typer.echo(str(run_folder / "report.html"))


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the named methods: paper, what travels, exactness, needs."""
    from polyrank.recipes import recipes

    cards = {name: card.model_dump() for name, card in recipes().items()}
    if as_json:
        _print_json(cards)
        return
    for name, card in cards.items():
        typer.secho(name, bold=True)
        _print_fields({key: card[key] for key in ("title", "paper", "travels", "exactness", "needs")})


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="A model's folder or hub id; the packaged one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has, and which fast paths a model takes or why it does not."""
    from polyrank.doctor import examine

    findings = examine(model)
    if as_json:
        _print_json(findings)
    else:
        _print_fields({name: str(value) for name, value in findings.items()})


devices = typer.Typer(no_args_is_help=True, help="Simulated devices: list, calibrate, price finished runs.")
app.add_typer(devices, name="device")


@devices.command("list")
def list_devices(as_json: JsonOption = False) -> None:
    """The packaged devices, links and fleets with their sources."""
    from polyrank.device import packaged

    content = packaged().model_dump(mode="json")
    if as_json:
        _print_json(content)
        return
    for kind, entries in content.items():
        for name, entry in entries.items():
            typer.secho(f"{kind.removesuffix('s')} {name}", bold=True)
            _print_fields({key: str(value) for key, value in entry.items()})


@devices.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="A new TOML file for the profile.")] = Path("this-device.toml"),
    watts: Annotated[float, typer.Option(help="Power drawn while computing; it is not measured.")] = 65.0,
    name: Annotated[str, typer.Option(help="Name of the device in the file.")] = "this-device",
) -> None:
    """Measure training steps on this machine and write a fleet file with its profile."""
    from polyrank.calibrate import calibrate_here, profile_toml

    if out.exists():
        raise InputError("--out", str(out), "exists already; name a new file, nothing was overwritten")
    device = calibrate_here(watts)
    out.write_text(profile_toml(name, device), encoding="utf-8")
    typer.echo(f"{device.source}\n{out}: use it as fleet.name, or copy its table into a fleet of yours")


@devices.command()
def price(
    run_folder: RunArgument,
    fleet: Annotated[str, typer.Option(help="A packaged fleet or a TOML file.")] = "edge3",
    as_json: JsonOption = False,
) -> None:
    """Say what a finished run would have taken on a fleet, by kind of device."""
    from polyrank.clock import FleetTable
    from polyrank.replay import by_device, replay

    rows = replay(run_folder, FleetTable(name=fleet))
    content = by_device(rows)
    if as_json:
        _print_json({"run": str(run_folder), "fleet": fleet, "devices": content, "sessions": rows})
        return
    for device, entry in content.items():
        typer.secho(device, bold=True)
        _print_fields({key: f"{value:.4g}" for key, value in entry.items()})


def _add_network_commands() -> None:
    from polyrank.cli_network import join, provision, serve, status

    for command in (provision, serve, join, status):
        app.command()(command)


_add_network_commands()


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def _print_fields(fields: Mapping[str, str]) -> None:
    """One field per line, its text wrapped to the terminal."""
    width = max(len(name) for name in fields) + 2
    columns = shutil.get_terminal_size((100, 24)).columns
    for name, text in fields.items():
        lead = f"  {name:<{width}}"
        wrapped = textwrap.fill(
            text,
            max(columns, 60),
            initial_indent=lead,
            subsequent_indent=" " * len(lead),
            break_long_words=False,
            break_on_hyphens=False,
        )
        typer.echo(wrapped)


def main() -> None:
    """Exit code 2 for bad input and 1 for a run that could not go on, each with one clear line."""
    code = 0
    try:
        code = app(standalone_mode=False) or 0
    except InputError as error:
        code = _complain(str(error), 2)
    except typer.BadParameter.__mro__[1] as error:  # type: ignore[misc]  # any misuse of the command line
        code = _complain(printable(f"{error.format_message()} (see polyrank --help)", 1000), 2)
    except RunError as error:
        code = _complain(str(error), 1)
    except (typer.Abort, KeyboardInterrupt):
        code = _complain("stopped", 130)
    sys.exit(code)


def _complain(line: str, code: int) -> int:
    print(f"polyrank: {line}", file=sys.stderr)
    return code
