"""`polyrank provision`: start-up kits with certificates for the server, each site and the administrator.

NVIDIA FLARE makes the keys, the certificates and the signed start-up files: every connection is mutual TLS
under the project's own root. What a kit allows to run is set when it is started (`kit.py`).
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from polyrank.durable import kind_at
from polyrank.errors import InputError
from polyrank.remote import ADMIN, FEDERATION

_ORGANISATION = "polyrank"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HOST = re.compile(rf"(?=.{{1,63}}$){_NAME.pattern}(\.{_NAME.pattern})*")


def provision(project: str, server: str, sites: Sequence[str], out: Path, port: int = 8002) -> list[Path]:
    """Make the kits of a new federation; returns the folders of server, administrator and sites.

    Args:
        server: the host name or address by which sites and administrator reach the server.
        out: a new folder; its ``private`` part holds the key of the root and belongs to no one else.

    Raises: InputError when a name cannot be used, or ``out`` exists or cannot be made.
    """
    for key, names in (("PROJECT", [project]), ("--server", [server])):
        for name in names:
            if not _HOST.fullmatch(name):
                raise InputError(key, name, "must be lower-case letters, digits, '-' and '.', at most 63")
    for name in sites:
        if not _NAME.fullmatch(name):
            raise InputError("--site", name, "must be lower-case letters, digits and '-', at most 63")
    if not sites or len(set(sites)) < len(sites) or {server, "server", "admin", "private"} & set(sites):
        allowed = "name each site once, and none as the server, 'server', 'admin' or 'private'"
        raise InputError("--site", list(sites), allowed)
    if kind_at(out) != "nothing":
        raise InputError("--out", str(out), "exists already; name a new folder, nothing was overwritten")
    try:
        (out / "private").mkdir(parents=True)
    except OSError as error:
        raise InputError("--out", str(out), f"cannot be made ({error.strerror})") from error
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
    with contextlib.redirect_stdout(io.StringIO()):
        context = Provisioner(str(workspace), builders).provision(plan)
    return Path(context["current_prod_dir"])
