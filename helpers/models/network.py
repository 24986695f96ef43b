"""What in the environment keeps a download from working: a proxy or certificates, named by their variable."""

from __future__ import annotations

import os
import socket
import ssl
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

# What each client reads, the first that is set; pip's own names win over those of `requests`.
CERTIFICATES = {
    "httpx": ("SSL_CERT_FILE", "SSL_CERT_DIR"),
    "pip": ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
}
PROXIES = {
    "httpx": ("https_proxy", "http_proxy", "all_proxy"),
    "pip": ("pip_proxy", "https_proxy", "http_proxy"),
}
# Schemes of a proxy beside http and https, and the package that brings them.
SOCKS = {
    "httpx": (("socks5", "socks5h"), "socksio", "socksio"),
    "pip": (("socks4", "socks4a", "socks5", "socks5h"), "PySocks", "socks"),
}


def fault(url: str, client: str) -> str:
    """What in this environment keeps `client` ("httpx", "pip") from `url`, and the next step, as a sentence.

    Reads the variables and the files that they name, and asks whether anything listens at the proxy.

    Returns:
        The first fault that is found; "" if there is none, so that the reason is another.
    """
    certificates = next((name for name in CERTIFICATES[client] if os.environ.get(name)), None)
    if certificates and (reason := _certificates_fault(Path(os.environ[certificates]))):
        return f"{certificates}={os.environ[certificates]!r} {reason}. Correct it, or unset it."
    proxies = _proxies(client)
    for name, proxy in proxies.items():
        if reason := _proxy_fault(proxy, client):
            return f"{name} {reason}"
    address = urlsplit(url)
    direct = address.hostname and urllib.request.proxy_bypass_environment(address.hostname)
    for name, proxy in () if direct else proxies.items():
        if name.lower() in (f"{address.scheme}_proxy", "all_proxy", "pip_proxy"):
            where = proxy.netloc.rpartition("@")[2]
            dead = f"{name} names the proxy {where}, and nothing answers there. Correct it, or unset it."
            return "" if _listens(proxy) else dead
    return ""


def _proxies(client: str) -> dict[str, SplitResult]:
    """The proxies that are set, by their variable as it is spelled: the lower-case one wins, as in Python."""
    found = {}
    for name in PROXIES[client]:
        spelled = name if os.environ.get(name) else name.upper()
        if value := os.environ.get(spelled):
            found[spelled] = urlsplit(value if "://" in value else f"http://{value}")
    return found


def _certificates_fault(path: Path) -> str:
    if not path.exists():
        return "is no file or folder"
    try:
        if path.is_file():
            ssl.create_default_context(cafile=path)
    except OSError:
        return "holds no certificates"
    return ""


def _proxy_fault(proxy: SplitResult, client: str) -> str:
    """What is wrong with the address of a proxy, without the password that it may hold."""
    schemes, package, module = SOCKS[client]
    if proxy.scheme in schemes:
        missing = find_spec(module) is None
        how = f"Unset it and install that (python -m uv pip install {package}), or leave it unset."
        return f"names a SOCKS proxy, and the package {package} is not installed. {how}" if missing else ""
    if proxy.scheme not in ("http", "https"):
        known = ", ".join(("http", "https", *schemes))
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
