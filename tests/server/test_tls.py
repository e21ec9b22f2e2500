"""https, with and without certificates of clients."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from soloist.errors import ConfigurationError
from soloist.server.run import Listening
from tests.server.live import live

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Certificates that sign themselves, so that each is its own authority, and their keys."""
    found = tmp_path_factory.mktemp("tls")
    for name in ("server", "client", "stranger"):
        make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        named = ["-days", "1", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
        files = ["-keyout", str(found / f"{name}.key"), "-out", str(found / f"{name}.pem")]
        subprocess.run([*make, *named, *files], check=True, capture_output=True)
    return found


def health(url: str, folder: Path, client: str | None = None) -> int:
    """As a client that trusts the server and shows its own certificate, if it has one."""
    trusted = ssl.create_default_context(cafile=str(folder / "server.pem"))
    if client:
        trusted.load_cert_chain(folder / f"{client}.pem", folder / f"{client}.key")
    return httpx.get(f"{url}/health", verify=trusted, timeout=200).status_code


def test_https(fake, folder):
    with live(
        fake.served, Listening(port=0, certificate=folder / "server.pem", private_key=folder / "server.key")
    ) as s:
        assert s.url.startswith("https:")
        assert health(s.url, folder) == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{s.url}/health", timeout=200)


def test_clients_show_certificates_that_the_authorities_signed(fake, folder):
    files = {"certificate": "server.pem", "private_key": "server.key", "client_authorities": "client.pem"}
    with live(fake.served, Listening(port=0, **{key: folder / name for key, name in files.items()})) as server:
        assert health(server.url, folder, "client") == 200
        for wrong in (None, "stranger"):
            with pytest.raises(httpx.TransportError):
                health(server.url, folder, wrong)


def test_a_key_of_another_certificate_is_told(folder):
    with pytest.raises(ConfigurationError, match=r"server.pem.*cannot be used with its key"):
        Listening(certificate=folder / "server.pem", private_key=folder / "client.key")


def test_an_encrypted_key_is_told_and_nobody_is_asked_for_its_password(folder):
    hidden = folder / "hidden.key"
    command = [
        "openssl",
        "pkey",
        "-in",
        str(folder / "server.key"),
        "-out",
        str(hidden),
        "-aes128",
        "-passout",
        "pass:x",
    ]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ConfigurationError, match="the key is encrypted"):
        Listening(certificate=folder / "server.pem", private_key=hidden)
