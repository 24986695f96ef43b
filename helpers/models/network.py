"""Why a download did not work, and the next step: the Hub's answer, a proxy, certificates."""

from __future__ import annotations

import os
import socket
import ssl
import urllib.request
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import SplitResult, urlsplit


@dataclass(frozen=True)
class Client:
    """What an HTTP client reads of the environment; of the certificates' variables the first that is set."""

    certificates: tuple[str, ...]
    proxies: tuple[str, ...]
    socks_schemes: tuple[str, ...]
    socks_package: str
    socks_module: str

    def proxies_set(self) -> dict[str, SplitResult]:
        """The proxies by their variable as it is spelled; the lower-case one wins, as in Python."""
        found = {}
        for name in self.proxies:
            spelled = name if os.environ.get(name) else name.upper()
            if value := os.environ.get(spelled):
                found[spelled] = urlsplit(value if "://" in value else f"http://{value}")
        return found


HTTPX = Client(  # huggingface_hub's
    certificates=("SSL_CERT_FILE", "SSL_CERT_DIR"),
    proxies=("https_proxy", "http_proxy", "all_proxy"),
    socks_schemes=("socks5", "socks5h"),
    socks_package="socksio",
    socks_module="socksio",
)
PIP = Client(  # its own variables before those of `requests`
    certificates=("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    proxies=("pip_proxy", "https_proxy", "http_proxy"),
    socks_schemes=("socks4", "socks4a", "socks5", "socks5h"),
    socks_package="PySocks",
    socks_module="socks",
)


def fault(url: str, client: Client) -> str:
    """What in this environment keeps `client` from `url`, and the next step, as a sentence.

    Reads the variables and the files that they name, and asks whether anything listens at the proxy.

    Returns:
        The first fault that is found; "" if there is none, so that the reason is another.
    """
    if reason := _certificates_fault(client):
        return reason
    proxies = client.proxies_set()
    for name, proxy in proxies.items():
        if reason := _proxy_fault(proxy, client):
            return f"{name} {reason}"
    address = urlsplit(url)
    if address.hostname and urllib.request.proxy_bypass_environment(address.hostname):
        return ""
    for name, proxy in proxies.items():
        if name.lower() in (f"{address.scheme}_proxy", "all_proxy", "pip_proxy"):
            where = proxy.netloc.rpartition("@")[2]
            dead = f"{name} names the proxy {where}, and nothing answers there. Correct it, or unset it."
            return "" if _listens(proxy) else dead
    return ""


def hub_fault(error: Exception, repo: str, revision: str) -> str:
    """What went wrong with the Hub, and the next step, as a sentence."""
    from huggingface_hub import constants, errors

    response = getattr(error, "response", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set and {repo} is not here yet. Unset it, or copy the folder from elsewhere."
        )
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms at https://huggingface.co/{repo} and set HF_TOKEN."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}. Name a commit, tag or branch that it has: {repo}@main."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"The Hub has no model {repo}, or it is private. Check the name, or set HF_TOKEN."
    if response is not None and "Invalid credentials" in response.headers.get("X-Error-Message", ""):
        return (
            "The Hub refuses your token, in HF_TOKEN or of `hf auth login`: it is wrong or has expired. Make "
            "another at https://huggingface.co/settings/tokens, or use none: public models need none."
        )
    if response is not None and response.status_code == 429:
        wait = response.headers.get("Retry-After", "")
        when = f"in {wait} s" if wait.isdigit() else "later"  # It may also be a date.
        return f"The Hub has had too many requests from here (429). Try again {when}, or set HF_TOKEN."
    if reason := fault(constants.ENDPOINT, HTTPX):
        return f"{repo} could not be fetched: {reason}"
    cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{repo} could not be fetched ({cause}). Check the network and try again: it goes on from here."


def _certificates_fault(client: Client) -> str:
    name = next((name for name in client.certificates if os.environ.get(name)), None)
    if name is None:
        return ""
    path = Path(os.environ[name])
    reason = "" if path.exists() else "is no file or folder"
    try:
        if path.is_file():
            ssl.create_default_context(cafile=path)
    except OSError:
        reason = "holds no certificates"
    return f"{name}={os.environ[name]!r} {reason}. Correct it, or unset it." if reason else ""


def _proxy_fault(proxy: SplitResult, client: Client) -> str:
    """What is wrong with the address of a proxy, without the password that it may hold."""
    if proxy.scheme in client.socks_schemes:
        if find_spec(client.socks_module):
            return ""
        package = client.socks_package
        return (
            f"names a SOCKS proxy, and the package {package} is not installed. "
            f"Unset it and install that (python -m uv pip install {package}), or leave it unset."
        )
    if proxy.scheme not in ("http", "https"):
        known = ", ".join(("http", "https", *client.socks_schemes))
        return f"begins with {proxy.scheme}://, and a proxy is one of {known}. Correct it, or unset it."
    try:
        _ = proxy.port
    except ValueError:
        return "has a port that is no number. Correct it (http://host:8080), or unset it."
    return "" if proxy.hostname else "names no host. Correct it (http://host:8080), or unset it."


def _listens(proxy: SplitResult) -> bool:
    port = proxy.port or {"http": 80, "https": 443}.get(proxy.scheme, 1080)
    try:
        socket.create_connection((proxy.hostname, port), timeout=3).close()
    except OSError:
        return False
    return True
