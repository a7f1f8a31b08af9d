"""Who is not let in: no certificate, another root, an expired one, another site's name, plain text.

Twice: as bytes to the port of the server, and as what a site's engineer sees of `polyrank join`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from polyrank.kit import _HELLO as HELLO
from polyrank.provision import provision
from tests.network.federation import Federation

pytestmark = pytest.mark.network


def target(federation: Federation) -> tuple[str, int]:
    told = json.loads((federation.folder / "kits" / "admin" / "federation.json").read_text())
    return "localhost", told["port"]


def greeting(federation: Federation, certificate: tuple[Path, Path] | None) -> bytes:
    """What the server says first over TLS; an error where it lets nobody in."""
    startup = federation.folder / "kits" / "site-a" / "startup"
    context = ssl.create_default_context(cafile=startup / "rootCA.pem")
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(*certificate)
    with (
        socket.create_connection(target(federation), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(HELLO)
        return secure.recv(64)


def pair(kit: Path) -> tuple[Path, Path]:
    return kit / "startup" / "client.crt", kit / "startup" / "client.key"


def expired(federation: Federation, folder: Path) -> tuple[Path, Path]:
    """site-a's certificate as it will be after its last day, signed by the federation's own root."""
    found = next((federation.folder / "kits" / "private").rglob("cert.json"))
    root = serialization.load_pem_private_key(json.loads(found.read_text())["root_pri_key"].encode(), None)
    own, key = pair(federation.folder / "kits" / "site-a")
    old = x509.load_pem_x509_certificate(own.read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now - datetime.timedelta(days=1))
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    path = folder / "expired.crt"
    path.write_bytes(builder.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return path, key


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    """A server and no site."""
    made = Federation.made_in(tmp_path_factory.mktemp("served"))
    made.start("server")
    own, until = pair(made.folder / "kits" / "site-a"), time.monotonic() + 300
    while True:
        with contextlib.suppress(OSError):  # it is not there yet, or not ready
            assert greeting(made, own)  # the right one is let in
            break
        assert made.running["server"].poll() is None, (made.folder / "server.out").read_text()
        assert time.monotonic() < until
        time.sleep(1)
    yield made
    for name in list(made.running):
        made.kill(name)


def let_in(federation: Federation, certificate: tuple[Path, Path] | None) -> bool:
    try:
        return greeting(federation, certificate) != b""
    except (ssl.SSLError, ConnectionResetError):
        return False


def server_says(federation: Federation, reason: str, patience_s: float = 200.0) -> bool:
    until = time.monotonic() + patience_s
    while reason not in (federation.folder / "server.out").read_text():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def test_without_a_certificate(served):
    assert not let_in(served, None)
    assert server_says(served, "PEER_DID_NOT_RETURN_A_CERTIFICATE")


def test_with_a_certificate_of_another_root(served, tmp_path):
    provision("other", "localhost", ["site-a"], tmp_path / "kits")
    assert not let_in(served, pair(tmp_path / "kits" / "site-a"))
    assert server_says(served, "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate")


def test_with_an_expired_certificate(served, tmp_path):
    assert not let_in(served, expired(served, tmp_path))
    assert server_says(served, "CERTIFICATE_VERIFY_FAILED: certificate has expired")


def test_in_plain_text(served):
    with socket.create_connection(target(served), timeout=10) as plain:
        plain.sendall(HELLO)
        with contextlib.suppress(ConnectionResetError):
            assert plain.recv(64)[:1] in (b"", b"\x15")  # closed, or an alert of TLS
    assert server_says(served, "WRONG_VERSION_NUMBER")


def without_a_certificate(kit: Path, federation: Federation) -> None:
    (kit / "startup" / "client.crt").unlink()


def with_a_certificate_of_another_root(kit: Path, federation: Federation) -> None:
    provision("other", "localhost", ["site-a"], kit.parent / "other")
    for path in pair(kit.parent / "other" / "site-a"):
        shutil.copy(path, kit / "startup")


def of_another_federation(kit: Path, federation: Federation) -> None:
    with_a_certificate_of_another_root(kit, federation)
    shutil.copy(kit.parent / "other" / "site-a" / "startup" / "rootCA.pem", kit / "startup")


def with_an_expired_certificate(kit: Path, federation: Federation) -> None:
    path, _ = expired(federation, kit.parent)
    shutil.copy(path, kit / "startup" / "client.crt")


def in_plain_text(kit: Path, federation: Federation) -> None:
    settings = kit / "startup" / "fed_client.json"
    settings.write_text(settings.read_text().replace('"mtls"', '"clear"'))


REASONS = {
    without_a_certificate: "holds no startup/client.crt",
    with_a_certificate_of_another_root: "startup/client.crt is no certificate under startup/rootCA.pem",
    of_another_federation: "is not this federation's (unable to get local issuer certificate)",
    with_an_expired_certificate: "startup/client.crt expired on 20",
    in_plain_text: "asks for connection_security 'clear'; the server speaks mutual TLS only",
}


@pytest.mark.parametrize("spoil", REASONS, ids=lambda spoil: spoil.__name__)
def test_a_kit_that_will_not_be_let_in_is_told_why(served, tmp_path, spoil):
    kit = tmp_path / "kit"
    shutil.copytree(served.folder / "kits" / "site-a", kit)
    spoil(kit, served)
    words = served.command("join", str(kit), "--data", str(served.folder / "site-a" / "site.toml"))
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert REASONS[spoil] in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "Successfully registered" not in ended.stdout


def test_under_the_name_of_another_site(served, tmp_path):
    kit = tmp_path / "kit"
    shutil.copytree(served.folder / "kits" / "site-a", kit)
    settings = kit / "startup" / "fed_client.json"
    settings.write_text(settings.read_text().replace("site-a", "site-b"))
    name = "intruder"
    served.running[name] = served.begin(
        name, "join", str(kit), "--data", str(served.folder / "site-a" / "site.toml")
    )
    reason = "authenticated as 'site-a' but claimed endpoint 'site-b' requires identity 'site-b'"
    assert server_says(served, reason)
    served.kill(name)
    assert "Successfully registered" not in (served.folder / f"{name}.out").read_text()
