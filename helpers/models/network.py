"""Why a download did not work, and the next step: the Hub's answer, a proxy, certificates."""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

# The variables of the environment that name certificates: to huggingface_hub, and to pip.
HUB = ("SSL_CERT_FILE",)
PIP = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
# Those that name proxies; each client reads them in lower and in upper case.
PROXIES = ("https_proxy", "http_proxy", "all_proxy", "pip_proxy")


def wrong_setting(certificates: tuple[str, ...]) -> str:
    """Name the first proxy or file of certificates in the environment that cannot work, and the next step.

    Args:
        certificates: the variables that the client reads, `HUB` or `PIP`.
    Returns:
        A sentence, in which a proxy's password is left out; "" if nothing is wrong.
    """
    for name, value in os.environ.items():
        if name in certificates and value and not _has_certificates(Path(value)):
            return f"{name}={value!r} is no file with certificates. Correct it, or unset it."
        if name.lower() in PROXIES and value and not _answers(value):
            proxy = value.rpartition("@")[2].rpartition("://")[2]
            return f"{name} names the proxy {proxy}, and nothing answers there. Correct it, or unset it."
    return ""


def hub_fault(error: Exception, repo: str, revision: str) -> str:
    """What went wrong with the Hub, and the next step, as a sentence."""
    from huggingface_hub import errors

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
    cause = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
    endpoint = os.environ.get("HF_ENDPOINT", "").rpartition("@")[2]
    asked = f"HF_ENDPOINT names the Hub {endpoint}. " if endpoint else ""
    step = wrong_setting(HUB) or f"{asked}Check the network and try again: it goes on from here."
    return f"{repo} could not be fetched ({cause}). {step}"


def _has_certificates(path: Path) -> bool:
    """Whether a file of certificates can be read. `requests` takes a folder of them as well."""
    if path.is_dir():
        return True
    try:
        ssl.create_default_context(cafile=path)
    except OSError:
        return False
    return True


def _answers(proxy: str) -> bool:
    """Whether anything listens at the address of a proxy."""
    try:
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        port = address.port or {"http": 80, "https": 443}.get(address.scheme, 1080)
        socket.create_connection((address.hostname, port), timeout=3).close()
    except (OSError, ValueError):
        return False
    return True
