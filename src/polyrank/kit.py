"""Start-up kits in use: what they allow to run, how FLARE is set up, and whether a server lets a site in.

A kit allows two classes to run and no code that travels: what a site runs is the polyrank that is installed
there. The server lets in who shows, over mutual TLS, an unexpired certificate of the federation's own root.
What keeps a kit out is told here in one line, from its files or after one knock, where FLARE would only try
again; whose name a kit may use, the server decides.
"""

from __future__ import annotations

import datetime
import json
import socket
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyrank.errors import InputError, first_line

SERVER_CLASS, SITE_CLASS = "polyrank.network.ServerEnd", "polyrank.network.SiteEnd"
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
_AWAY_S = "300"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of gRPC begins; a server that does not accept the certificate has no answer to it."""
_PATIENCE_S = 10.0


def settings_for(role: str, most_bytes: float) -> dict[str, str]:
    """FLARE's settings for a process and all that it starts, as variables of their environment.

    Args:
        role: ``server`` or ``client``.
        most_bytes: of a message that comes in; FLARE holds it in memory before anyone can judge it.
    """
    # What an error says may name a path: of a site's, the kind alone travels.
    quiet = {"NVFLARE_SECURE_LOGGING": "true"} if role == "client" else {}
    return {
        **quiet,
        "NVFLARE_STREAMING_RELIABLE": "true",  # requests are sent until they are acknowledged, as replies are
        "NVFLARE_STREAMING_RETRY_TIMEOUT": _AWAY_S,  # a link that is away for less costs no answer
        "NVFLARE_STREAMING_ACK_PROGRESS_TIMEOUT": _AWAY_S,
        "NVFLARE_STREAMING_MAX_BLOB_SIZE": str(int(most_bytes)),
    }


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


def check_kit(kit: Path, settings: Mapping[str, Any]) -> None:
    """Look at a site's kit, and knock at the server.

    A server that is not there is no defect of the kit: FLARE connects as soon as it is.

    Args:
        settings: the kit's ``fed_client.json``.

    Raises: InputError when the server of this federation does not let the kit in.
    """
    client, startup = settings["client"], kit / "startup"
    if (security := client.get("connection_security", "mtls")) != "mtls":
        allowed = f"asks for connection_security {security!r}; the server speaks mutual TLS only"
        raise InputError("KIT", str(kit), allowed)
    own, key, root = (startup / client[f"ssl_{name}"] for name in ("cert", "private_key", "root_cert"))
    for path in (own, key, root):
        if not path.is_file():
            raise InputError("KIT", str(kit), f"holds no startup/{path.name}, so it cannot show who it is")
    host, _, port = str(settings["servers"][0]["service"]["target"]).rpartition(":")
    defect = wrong_with(own, root)
    if defect is None:
        try:
            context = ssl.create_default_context(cafile=root)
            context.load_cert_chain(own, key)
        except OSError as error:
            defect = f"startup/{key.name} does not go with startup/{own.name} ({first_line(error)})"
        else:
            defect = _knock(context, host, int(port))
    if defect is not None:
        raise InputError("KIT", str(kit), defect)


def wrong_with(own: Path, root: Path) -> str | None:
    """What is wrong with a certificate, as far as it shows without the server."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    try:
        shown, signer = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (own, root))
        shown.verify_directly_issued_by(signer)
    except (InvalidSignature, OSError, ValueError) as error:
        return f"startup/{own.name} is no certificate under startup/{root.name} ({first_line(error)})"
    if datetime.datetime.now(datetime.UTC) > shown.not_valid_after_utc:
        day = f"{shown.not_valid_after_utc:%Y-%m-%d}"
        return f"startup/{own.name} expired on {day}; `polyrank provision` makes new kits"
    return None


def _knock(context: ssl.SSLContext, host: str, port: int, tries: int = 2) -> str | None:
    """Why the server that is there does not let this certificate in; None if it does, or is not there."""
    context.set_alpn_protocols(["h2"])
    while True:
        try:
            with (
                socket.create_connection((host, port), timeout=_PATIENCE_S) as plain,
                context.wrap_socket(plain, server_hostname=host) as secure,
            ):
                secure.sendall(_HELLO)
                if secure.recv(1):
                    return None
        except ssl.SSLCertVerificationError as error:
            return f"the server at {host}:{port} is not this federation's ({error.verify_message})"
        except (ssl.SSLError, ConnectionResetError, BrokenPipeError):
            pass
        except OSError:  # nobody is there, or it takes too long to say anything
            return None
        tries -= 1
        if tries == 0:
            return f"the server at {host}:{port} does not let it in; what the server prints says why"
        time.sleep(1.0)  # it may be about to end
