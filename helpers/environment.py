"""Set up `.venv` from requirements.lock, before anything is installed: standard library only."""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from helpers import ROOT

LOCK = ROOT / "requirements.lock"
VENV = ROOT / ".venv"
PYTHONS = ("3.11", "3.12", "3.13")
STAMP = "setup.stamp"
# The list of wheels in a wheelhouse, as pip reads it.
CONTENTS = "requirements.txt"
# Torch's own exact pins bring CUDA's libraries where a CUDA build is wanted. Locking them would bring
# gigabytes to every laptop.
CUDA_PACKAGES = re.compile(r"^(nvidia-|cuda-|triton==)")
# A tool of the Python Packaging Authority. It is not locked, because it is no part of the tutorial.
AUDITOR = "pip-audit>=2.10,<3"


def setup(prefix: Path = VENV, lock: Path = LOCK) -> bool:
    """Make `prefix` hold what `lock` says, and this project.

    An environment that was changed, moved, or made by another Python is made again from nothing; uv's cache
    makes that quick. If WHEELHOUSE names a folder of `make wheelhouse`, no network is used.

    Returns:
        True if something was installed, False if the environment was up to date.
    Raises:
        SystemExit: with one sentence, if Python is unsupported or an installation fails.
    """
    if python_version() not in PYTHONS:
        raise SystemExit(
            f"Python {platform.python_version()} is not one of {', '.join(PYTHONS)}. "
            "Choose another: make run PYTHON=python3.12"
        )
    if is_current(prefix, lock):
        return False
    folder = os.environ.get("WHEELHOUSE")
    wheelhouse = Path(folder).resolve() if folder else None
    if wheelhouse:
        from helpers.workshop import wheelhouse as wheels

        wheels.check(wheelhouse, lock)
    print(f"Setting up {prefix.name} from {wheelhouse or lock.name} …", flush=True)
    # Make starts .venv's own Python, which cannot replace itself: ask the one that .venv was made with.
    _show([sys._base_executable, "-m", "venv", "--clear", prefix])
    _install(python_of(prefix), lock, wheelhouse)
    (prefix / STAMP).write_text(_fingerprint(prefix, lock), encoding="utf-8")
    return True


def is_current(prefix: Path = VENV, lock: Path = LOCK) -> bool:
    """Whether `prefix` was set up to the end, in this place, from this lock and with this Python."""
    try:
        stamp = (prefix / STAMP).read_text("utf-8")
        started = _run([python_of(prefix), "-c", "import platform; print(platform.python_version())"])
    except OSError:  # never finished, or made with a Python that is gone
        return False
    return stamp == _fingerprint(prefix, lock) and started.stdout.strip() == platform.python_version()


def python_version() -> str:
    """Major and minor version of this Python: "3.11"."""
    return "{}.{}".format(*sys.version_info)


def python_of(prefix: Path) -> Path:
    """The Python of an environment."""
    return prefix / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _fingerprint(prefix: Path, lock: Path) -> str:
    """Digest of all that decides what an environment holds, and of its place: its programs name that."""
    parts = [lock.read_bytes(), (ROOT / "pyproject.toml").read_bytes(), platform.python_version().encode()]
    parts += [os.environ.get("TORCH_BACKEND", "").encode(), str(prefix.absolute()).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _install(python: Path, lock: Path, wheelhouse: Path | None) -> None:
    """Install the lock and this project with uv, which pip brings in the locked version."""
    pip = [python, "-m", "pip", "install", "--quiet"]
    uv = [python, "-m", "uv", "pip", "install", "--python", python]
    uv_pin = re.search(r"^uv==[^\s;]+", lock.read_text("utf-8"), re.MULTILINE)[0]
    # Bytecode is made once, here: a process that imports mlflow then starts in 2 s rather than 8, also where
    # Python is told to write none.
    compiled = {"UV_COMPILE_BYTECODE": "1"}
    if wheelhouse:
        alone = ["--no-index", "--find-links", wheelhouse]
        uv += ["--no-config", "--offline", *alone]
        kept = ("UV_CACHE_DIR", *compiled)
        own = {name: value for name, value in os.environ.items() if name in kept or name[:3] != "UV_"}
        settings = compiled | own
        _show([*pip, "--isolated", *alone, uv_pin])
        _show([*uv, "--require-hashes", "-r", wheelhouse / CONTENTS], settings)
    else:
        settings = compiled | os.environ | uv_settings(pip_configuration(python))
        _show([*pip, uv_pin])
        _install_lock([*uv, "-r", lock], settings)
    _show([*uv, "--quiet", "--no-deps", "--no-build-isolation", "-e", ROOT], settings)


def _install_lock(command: list, settings: dict[str, str]) -> None:
    """Install the lock with the build of torch that TORCH_BACKEND names; on Linux without it, the CPU build.

    The default index would bring gigabytes of CUDA on Linux. It is asked where the CPU build cannot be had,
    and where pip has find-links of its own.
    """
    backend = os.environ.get("TORCH_BACKEND")
    if not backend and sys.platform == "linux" and "UV_FIND_LINKS" not in settings:
        attempt = subprocess.run([str(part) for part in [*command, "--torch-backend=cpu"]], env=settings)
        if attempt.returncode == 0:
            return
        print("torch's CPU build could not be had; taking the default index instead.", flush=True)
    _show([*command, f"--torch-backend={backend}"] if backend else command, settings)


def uv_settings(pip: dict[str, str]) -> dict[str, str]:
    """Translate pip's settings (`pip config list` names) to uv's variables; what is set already stays.

    uv reads none of pip's. With a second index, pip takes the best version of all of them, so uv must too.
    """
    found = {
        "UV_FIND_LINKS": ",".join(pip.get("find-links", "").split()),
        "UV_DEFAULT_INDEX": pip.get("index-url", ""),
        "UV_INDEX": " ".join(pip.get("extra-index-url", "").split()),
        "UV_INDEX_STRATEGY": "unsafe-best-match" if pip.get("extra-index-url") else "",
        "UV_NO_INDEX": pip.get("no-index", ""),
        "SSL_CERT_FILE": pip.get("cert", ""),
    }
    return {name: value for name, value in found.items() if value and name not in os.environ}


def pip_configuration(python: Path) -> dict[str, str]:
    """pip's settings by bare name; its environment wins over its files, as in pip itself."""
    command = [python, "-X", "utf8", "-m", "pip", "config", "list"]
    lines = [line.partition("=") for line in _run(command).stdout.splitlines()]
    ordered = sorted(lines, key=lambda line: line[0].startswith(":env:"))
    return {key.rpartition(".")[2]: ast.literal_eval(value) for key, _, value in ordered}


def locked(lock: Path = LOCK, markers: dict[str, str] | None = None) -> dict[str, str]:
    """Name → version of what `lock` has for a system and a Python. Needs the environment.

    Args:
        markers: what differs from this machine, in the names of PEP 508: {"sys_platform": "win32", …}.
    """
    from packaging.requirements import Requirement

    lines = [line for line in lock.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    here = [each for each in map(Requirement, lines) if not each.marker or each.marker.evaluate(markers)]
    return {each.name: str(each.specifier).removeprefix("==") for each in here}


def installed() -> dict[str, str]:
    """Name → version, with its build (2.13.0+cpu), of what this Python can import. Needs the environment."""
    from packaging.utils import canonicalize_name

    return {canonicalize_name(each.name): each.version for each in metadata.distributions()}


def write_lock(lock: Path = LOCK) -> None:
    """Resolve pyproject.toml for Python 3.11 to 3.13 on every platform and write `lock`."""
    lowest, highest = PYTHONS[0], PYTHONS[-1]
    settings = uv_settings(pip_configuration(Path(sys.executable)))
    # A folder of this machine must not shape what others install.
    settings.pop("UV_FIND_LINKS", None)
    # fmt: off
    command = [sys.executable, "-m", "uv", "pip", "compile", "--universal", "--python-version", lowest,
               "--quiet", "--upgrade", "--extra", "test", "--no-annotate",
               "--custom-compile-command", "make lock", ROOT / "pyproject.toml"]
    # fmt: on
    result = _run(command, os.environ | settings)
    if result.returncode:
        raise SystemExit(f"The lock was not changed: {result.stderr.strip()}")
    kept = [line for line in result.stdout.splitlines() if not CUDA_PACKAGES.match(line)]
    header = f"# Resolved for Python {lowest} to {highest}; CUDA's own packages follow from torch."
    lock.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")


def audit(lock: Path = LOCK, service: str = "https://api.osv.dev/v1/query") -> int:
    """Let pip-audit look every locked package up in a database of known vulnerabilities, and print its table.

    Args:
        service: an address that speaks the query API of osv.dev.
    Returns:
        0 if none is known, 1 if some are.
    Raises:
        RuntimeError: if not every package could be looked up.
    """
    settings = uv_settings(pip_configuration(Path(sys.executable)))
    # fmt: off
    command = [sys.executable, "-m", "uv", "tool", "run", "--quiet", "--isolated", "--from", AUDITOR,
               "pip-audit", "--requirement", lock, "--no-deps", "--disable-pip", "--strict",
               "--vulnerability-service", "osv", "--osv-url", service, "--progress-spinner", "off"]
    # fmt: on
    result = _run(command, os.environ | settings)
    # pip-audit (2.10) ends with 1 both for a known vulnerability, then with a table, and for a failure.
    if result.returncode and not result.stdout.strip():
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(
            f"The packages could not be looked up at {service} ({last:.200}). Nothing was audited; "
            "run `make audit` where that address can be reached."
        )
    print(result.stdout or result.stderr.strip())
    return result.returncode


def _run(command: list, settings: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run a command to its end, and keep what it prints."""
    words = [str(part) for part in command]
    return subprocess.run(words, env=settings, capture_output=True, encoding="utf-8", errors="replace")


def _show(command: list, settings: dict[str, str] | None = None) -> None:
    """Run a command of a set-up, whose output the reader sees."""
    words = [str(part) for part in command]
    if subprocess.run(words, env=settings).returncode:
        raise SystemExit(
            "Set-up stopped; the lines above say why. Fix that and run it again. "
            f"What failed: {' '.join(words)}"
        )
