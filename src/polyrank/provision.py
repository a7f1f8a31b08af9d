"""`polyrank provision`: start-up kits with certificates for the server, each site and the administrator.

NVIDIA FLARE makes the keys, the certificates and the signed start-up files: every connection is mutual TLS
under the project's own root. On top of that a kit allows two classes to run and no code that travels: what
a site runs is the polyrank that is installed there.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyrank.durable import kind_at
from polyrank.errors import InputError
from polyrank.network import SERVER_CLASS, SITE_CLASS
from polyrank.remote import ADMIN, FEDERATION

_ORGANISATION = "polyrank"
_ALLOWED = (
    "nvflare.collab.runtime.controller.CollabController",
    "nvflare.collab.runtime.executor.CollabExecutor",
    SERVER_CLASS,
    SITE_CLASS,
)
_RIGHTS = {
    "project_admin": {
        **dict.fromkeys(("submit_job", "manage_job", "download_job", "view", "operate"), "any"),
        "get_job_log": "any",  # the server's own: where a job that cannot write its run folder says why
        **dict.fromkeys(("clone_job", "shell_commands", "byoc", "server-predeployed-flwr"), "none"),
    }
}
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")


def provision(project: str, server: str, sites: Sequence[str], out: Path, port: int = 8002) -> list[Path]:
    """Make the kits of a new federation; returns the folders of server, administrator and sites.

    Args:
        server: the host name or address by which sites and administrator reach the server.
        out: a new folder; its ``private`` part holds the key of the root and belongs to no one else.

    Raises: InputError when a name cannot be used or ``out`` exists.
    """
    for key, names in (("PROJECT", [project]), ("--server", [server]), ("--site", sites)):
        for name in names:
            if not _NAME.fullmatch(name):
                raise InputError(key, name, "must be lower-case letters, digits, '-' and '.', at most 63")
    if not sites or len(set(sites)) < len(sites) or {server, "server", "admin"} & set(sites):
        raise InputError("--site", list(sites), "name each site once, and none as the server")
    if kind_at(out) != "nothing":
        raise InputError("--out", str(out), "exists already; name a new folder, nothing was overwritten")
    made = _build(project, server, sites, out / "private", port)
    kits = {"server": made / server, "admin": made / ADMIN, **{site: made / site for site in sites}}
    for name, kit in kits.items():
        shutil.move(kit, out / name)
    listed = {"project": project, "server": server, "port": port, "sites": sorted(sites)}
    (out / "admin" / FEDERATION).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(made)
    (out / "private").chmod(0o700)
    return [out / name for name in kits]


def _build(project: str, server: str, sites: Sequence[str], workspace: Path, port: int) -> Path:
    """Let FLARE make its kits; returns the folder that they lie in."""
    from nvflare.lighter.entity import Project
    from nvflare.lighter.impl.cert import CertBuilder
    from nvflare.lighter.impl.signature import SignatureBuilder
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provisioner import Provisioner

    plan = Project(project, f"polyrank federation {project}")
    plan.set_server(server, _ORGANISATION, {"fed_learn_port": port, "admin_port": port})
    for site in sites:
        plan.add_client(site, _ORGANISATION, {})
    plan.add_admin(ADMIN, _ORGANISATION, {"role": "project_admin"})
    builders = [WorkspaceBuilder(), StaticFileBuilder(scheme="grpc"), CertBuilder(), SignatureBuilder()]
    workspace.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        context = Provisioner(str(workspace), builders).provision(plan)
    return Path(context["current_prod_dir"])


def restrict(kit: Path) -> None:
    """Allow a kit to build polyrank's own classes only, and no code to travel; keep what it stores inside it.

    This is done anew whenever a kit is started, so that it holds wherever the kit came from.
    """
    default = kit / "local" / "resources.json.default"
    resources: dict[str, Any] = json.loads(default.read_text(encoding="utf-8"))
    resources["class_allow_list"] = list(_ALLOWED)
    resources["allow_log_streaming"] = False  # a log may name paths and texts: it stays where it is
    kept = [
        part for part in resources["components"] if part["id"] not in ("site_log_streamer", "log_receiver")
    ]
    resources["components"] = kept
    text = json.dumps(resources, indent=2).replace("/tmp/nvflare/", f"{kit.resolve()}/storage/")
    (kit / "local" / "resources.json").write_text(text + "\n", encoding="utf-8")
    rights = {"format_version": "1.0", "permissions": _RIGHTS}
    (kit / "local" / "authorization.json").write_text(json.dumps(rights, indent=2) + "\n", encoding="utf-8")
