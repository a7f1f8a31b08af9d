"""The commands for real sites: provision, serve, join, status. They need the extra ``flare``."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyrank.errors import InputError, first_line

if TYPE_CHECKING:
    from polyrank.config import Config

MOST_BYTES = 2**30
"""Of an answer; NVFLARE_STREAMING_MAX_BLOB_SIZE changes it. A site takes in what its table has memory for."""
KitArgument = Annotated[Path, typer.Argument(metavar="KIT", help="A start-up kit's folder.")]


def provision(
    project: Annotated[str, typer.Argument(help="Name of the federation.")],
    server: Annotated[str, typer.Option(help="Host name by which sites reach the server.")],
    site: Annotated[list[str], typer.Option(help="Name of a site; once for each.")],
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="The one port that the server listens on.")
    ] = 8002,
    out: Annotated[Path | None, typer.Option(help="A new folder; else named as the project.")] = None,
) -> None:
    """Make start-up kits with certificates: one for the server, one per site, one to start runs."""
    _need_flare()
    from polyrank.provision import provision as make_kits

    for kit in make_kits(project, server, site, out or Path(project), port):
        typer.echo(str(kit))
    typer.echo("each site gets its own folder and no other; `private` stays with you")


def serve(kit: KitArgument) -> None:
    """Run the server of a federation until it is stopped."""
    _need_flare()
    settings = _kit_file(kit, "fed_server.json")
    _become("server", kit, "", settings, MOST_BYTES)


def join(
    kit: KitArgument,
    data: Annotated[Path, typer.Option(help="The site's own TOML: data, model, limits.")],
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps; over the TOML's.")] = None,
) -> None:
    """Take part as a site until stopped; connects again whenever the server was away."""
    _need_flare()
    settings = _kit_file(kit, "fed_client.json")
    from polyrank.kit import check_kit

    check_kit(kit, settings)
    from polyrank.network import DEVICE_VARIABLE, SITE_VARIABLE
    from polyrank.site import check_readable, read_table

    table = read_table(data, device)
    check_readable(table)
    os.environ[SITE_VARIABLE] = str(data.resolve())
    os.environ[DEVICE_VARIABLE] = device or ""
    room = min(table.limits.max_memory_gb * 1e9, 4 * MOST_BYTES)
    _become("client", kit, f"uid={settings['client']['fqsn']}", settings, room)


def status(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run over a network.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Show each site of a run: connected, last seen, device, texts, round and rank plan."""
    _need_flare()
    from polyrank.ledger import RunFolder
    from polyrank.remote import status as rows_of

    rows = rows_of(run_folder)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    typer.echo(f"{run_folder}: {len(RunFolder(run_folder).read_rows('rounds.jsonl'))} rounds are committed")
    columns = ("site", "connected", "seen_s_ago", "device", "num_examples", "round", "slots", "error")
    cells = [columns, *(["" if row[c] is None else str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    for line in cells:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def run_remote(config: Config, out: Path | None) -> tuple[Iterator[dict[str, Any]], Path, int]:
    """Begin a run over a network: its rows as they come, its folder, its rounds."""
    _need_flare()
    from polyrank.remote import follow, open_remote

    path = open_remote(config, out).path
    return follow(path), path, config.rounds


def resume_remote(config: Config, path: Path) -> tuple[Iterator[dict[str, Any]], Path, int]:
    """Go on with a run over a network."""
    _need_flare()
    from polyrank.remote import follow

    return follow(path), path, config.rounds


def _need_flare() -> None:
    if importlib.util.find_spec("nvflare") is None:
        raise InputError("engine.kind", "flare", "needs the extra 'flare' (pip install 'polyrank[flare]')")


def _kit_file(kit: Path, name: str) -> dict[str, Any]:
    """A kit's own settings.

    Raises: InputError when the folder is no such kit.
    """
    try:
        found: dict[str, Any] = json.loads((kit / "startup" / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            "KIT", str(kit), f"holds no startup/{name}; `polyrank provision` makes kits"
        ) from error
    return found


def _become(role: str, kit: Path, more: str, settings: dict[str, Any], most_bytes: float) -> None:
    """Turn this process into FLARE's, so that a service manager sees one process, and its exit code."""
    from polyrank.kit import restrict, settings_for

    module, file = f"nvflare.private.fed.app.{role}.{role}_train", f"fed_{role}.json"
    words = ["-m", module, "-m", str(kit.resolve()), "-s", file, "--set", "secure_train=true"]
    try:
        restrict(kit)
    except (OSError, ValueError, KeyError) as error:
        allowed = f"cannot be started by this user, or is not whole ({first_line(error)})"
        raise InputError("KIT", str(kit), allowed) from error
    for name, value in settings_for(role, most_bytes).items():
        os.environ.setdefault(name, value)
    words += [*([more] if more else []), "org=polyrank", "config_folder="]
    target = settings["servers"][0]["service"]["target"]
    typer.echo(f"polyrank: {role} of {settings['servers'][0]['name']} at {target}")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-u", *words])
