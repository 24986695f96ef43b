"""Set up `.venv` from the lock, before anything is installed: standard library only."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
# CUDA's libraries follow from torch's own exact pins where a CUDA build is wanted; locking them would
# bring gigabytes to every laptop.
CUDA_PACKAGES = re.compile(r"^(nvidia-|cuda-|triton==)")
SUPPORTED = ((3, 11), (3, 13))


def setup(prefix: Path = ROOT / ".venv", lock: Path = LOCK) -> bool:
    """Make `prefix` hold exactly what `lock` says, and this project.

    Returns:
        True if something was installed, False if the environment already stood.
    Raises:
        SystemExit: with one sentence, if Python is unsupported or an installation fails.
    """
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        raise SystemExit(
            f"Python {platform.python_version()} is not one of 3.11, 3.12, 3.13. "
            "Choose another: make run PYTHON=python3.12"
        )
    stamp = prefix / "setup.stamp"
    wanted = _fingerprint(lock)
    if stamp.exists() and stamp.read_text() == wanted:
        return False
    stamp.unlink(missing_ok=True)
    print(f"Setting up {prefix.name} from {lock.name} …", flush=True)
    binaries = prefix / ("Scripts" if os.name == "nt" else "bin")
    if not (binaries / "pip").exists():  # the last thing that venv installs
        venv.create(prefix, with_pip=True)
    _run([binaries / "python", "-m", "pip", "install", "--quiet", f"uv=={_locked('uv', lock)}"])
    uv = [binaries / "uv", "pip", "install", "--python", binaries / "python"]
    settings = uv_settings(pip_configuration(binaries / "python"))
    _install_lock(uv, lock, os.environ | settings)
    _run([*uv, "--quiet", "--no-deps", "--no-build-isolation", "-e", ROOT], os.environ | settings)
    stamp.write_text(wanted)
    return True


def uv_settings(pip: dict[str, str]) -> dict[str, str]:
    """Translate pip's settings (`pip config list` names) to uv's variables; what is set already stays.

    uv reads none of pip's. With a second index, pip takes the best version of all of them, so uv must too.
    """
    names = {
        "find-links": "UV_FIND_LINKS",
        "index-url": "UV_DEFAULT_INDEX",
        "extra-index-url": "UV_INDEX",
        "no-index": "UV_NO_INDEX",
        "cert": "SSL_CERT_FILE",
    }
    found = {uv: pip[name] for name, uv in names.items() if pip.get(name)}
    if "UV_FIND_LINKS" in found:
        found["UV_FIND_LINKS"] = ",".join(found["UV_FIND_LINKS"].split())
    if "UV_INDEX" in found:
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {name: value for name, value in found.items() if name not in os.environ}


def write_lock(lock: Path = LOCK) -> None:
    """Resolve pyproject.toml for Python 3.11 to 3.13 on every platform and write `lock`."""
    lowest, highest = (".".join(map(str, version)) for version in SUPPORTED)
    settings = uv_settings(pip_configuration(Path(sys.executable)))
    settings.pop("UV_FIND_LINKS", None)  # a folder of this machine must not shape what others install
    # fmt: off
    uv = Path(sys.executable).with_name("uv")
    command = [uv, "pip", "compile", "--universal", "--python-version", lowest, "--quiet", "--upgrade",
               "--extra", "test", "--no-annotate", "--custom-compile-command", "make lock",
               ROOT / "pyproject.toml"]
    # fmt: on
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise SystemExit(f"The lock was not changed: {result.stderr.strip()}")
    kept = [line for line in result.stdout.splitlines() if not CUDA_PACKAGES.match(line)]
    header = f"# Tested on Python {lowest} to {highest}; CUDA's own packages follow from torch."
    lock.write_text("\n".join([header, *kept]) + "\n")


def _install_lock(uv: list, lock: Path, env: dict[str, str]) -> None:
    """Install the lock; on Linux prefer torch's CPU build, the default index brings gigabytes of CUDA."""
    command = [*uv, "-r", lock]
    backend = os.environ.get("TORCH_BACKEND")
    if backend:
        return _run([*command, f"--torch-backend={backend}"], env)
    if sys.platform == "linux" and not _offers_cpu_torch(uv, lock, env):
        attempt = subprocess.run([*command, "--torch-backend=cpu"], env=env)
        if attempt.returncode == 0:
            return None
        print("torch's CPU build could not be had; taking the default index instead.", flush=True)
    return _run(command, env)


def _offers_cpu_torch(uv: list, lock: Path, env: dict[str, str]) -> bool:
    """Whether the configured find-links already offer a CPU build of the locked torch."""
    if "UV_FIND_LINKS" not in env:
        return False
    command = [*uv, "--dry-run", "--no-deps", f"torch=={_locked('torch', lock)}"]
    return "+cpu" in subprocess.run(command, env=env, capture_output=True, text=True).stderr


def _fingerprint(lock: Path) -> str:
    parts = [lock.read_bytes(), (ROOT / "pyproject.toml").read_bytes(), platform.python_version().encode()]
    parts += [os.environ.get("TORCH_BACKEND", "").encode(), str(ROOT).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _locked(package: str, lock: Path) -> str:
    return re.search(rf"^{package}==([^\s;]+)", lock.read_text(), re.MULTILINE).group(1)


def pip_configuration(python: Path) -> dict[str, str]:
    """pip's settings by bare name; its environment wins over its files, as in pip itself."""
    listing = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    lines = [line.partition("=") for line in listing.splitlines()]
    settings = {key: value.strip("'\"") for key, _, value in lines}
    ordered = sorted(settings.items(), key=lambda item: item[0].startswith(":env:"))
    return {key.rpartition(".")[2]: value for key, value in ordered}


def _run(command: list, env: dict[str, str] | None = None) -> None:
    if subprocess.run([str(part) for part in command], env=env).returncode:
        raise SystemExit(f"Set-up stopped: {' '.join(map(str, command))!r} failed; run it again to go on.")
