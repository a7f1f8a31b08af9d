"""Who is not let in: no certificate, another root, an expired one, another site's name, plain text."""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import socket
import ssl
import time
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from polyrank.provision import provision
from tests.network.federation import Federation

pytestmark = pytest.mark.network
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of gRPC begins."""


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
def served(federation: Federation) -> Federation:
    until = time.monotonic() + 60
    while True:
        try:
            assert greeting(
                federation, pair(federation.folder / "kits" / "site-a")
            )  # the right one is let in
            return federation
        except OSError:
            assert time.monotonic() < until
            time.sleep(1)


def let_in(federation: Federation, certificate: tuple[Path, Path] | None) -> bool:
    try:
        return greeting(federation, certificate) != b""
    except (ssl.SSLError, ConnectionResetError):
        return False


def test_without_a_certificate(served):
    assert not let_in(served, None)


def test_with_a_certificate_of_another_root(served, tmp_path):
    provision("other", "localhost", ["site-a"], tmp_path / "kits")
    assert not let_in(served, pair(tmp_path / "kits" / "site-a"))


def test_with_an_expired_certificate(served, tmp_path):
    assert not let_in(served, expired(served, tmp_path))


def test_in_plain_text(served):
    with socket.create_connection(target(served), timeout=10) as plain:
        plain.sendall(HELLO)
        with contextlib.suppress(ConnectionResetError):
            assert plain.recv(64)[:1] in (b"", b"\x15")  # closed, or an alert of TLS


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
    until = time.monotonic() + 60
    while reason not in (served.folder / "server.out").read_text():
        assert time.monotonic() < until
        time.sleep(1)
    served.kill(name)
    assert "Successfully registered" not in (served.folder / f"{name}.out").read_text()
