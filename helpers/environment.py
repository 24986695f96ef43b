"""Set up `.venv` from the lock, before anything is installed: standard library only."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from helpers import ROOT

LOCK = ROOT / "requirements.lock"
# CUDA's libraries follow from torch's own exact pins where a CUDA build is wanted; locking them would
# bring gigabytes to every laptop.
CUDA_PACKAGES = re.compile(r"^(nvidia-|cuda-|triton==)")
# What could still lead uv to an index, or to another folder, when it is to use a wheelhouse alone.
INDEX_SETTINGS = ("UV_FIND_LINKS", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL",
                  "UV_TORCH_BACKEND")  # fmt: skip
# Of the Python Packaging Authority; not locked, for it is no part of the tutorial.
AUDITOR = "pip-audit>=2.10,<3"
SUPPORTED = ((3, 11), (3, 13))
WHEELHOUSE = ROOT / "wheelhouse"
# Made last in a wheelhouse: what it was made for, then each wheel's name, version and sha256, as pip reads.
CONTENTS = "requirements.txt"
STAMP = "setup.stamp"
TORCH_BUILDS = "https://download.pytorch.org/whl"


def setup(prefix: Path = ROOT / ".venv", lock: Path = LOCK, wheelhouse: Path | None = None) -> bool:
    """Make `prefix` hold what `lock` says, and this project; what else is installed there stays.

    An environment of another version of Python, of one that is gone, or made in another place, is made anew.

    Args:
        wheelhouse: take everything from this folder of `make wheelhouse`, and touch no network.
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
    if is_current(prefix, lock):
        return False
    if wheelhouse:
        check_wheelhouse(wheelhouse, lock)
    stamp = prefix / STAMP
    stamp.unlink(missing_ok=True)
    print(f"Setting up {prefix.name} from {wheelhouse or lock.name} …", flush=True)
    binaries = _binaries(prefix)
    if not _stands(prefix):
        # A child, because this process may itself run in `prefix`: make puts .venv's Python first.
        _run([sys._base_executable, "-m", "venv", "--clear", prefix])
    pip = [binaries / "python", "-m", "pip", "install", "--quiet", f"uv=={_locked('uv', lock)}"]
    # Bytecode is made once, here: a process that imports mlflow then starts in 2 s rather than 8, also where
    # Python is told to write none.
    uv = [binaries / "uv", "pip", "install", "--compile-bytecode", "--python", binaries / "python"]
    if wheelhouse:
        alone = ["--no-index", "--find-links", wheelhouse]
        uv += ["--no-config", "--offline", *alone]
        env = {name: value for name, value in os.environ.items() if name not in INDEX_SETTINGS}
        _run([*pip, "--isolated", *alone])
        _run([*uv, "--require-hashes", "-r", wheelhouse / CONTENTS], env)
    else:
        env = os.environ | uv_settings(pip_configuration(binaries / "python"))
        _run(pip)
        _install_lock(uv, lock, env)
    _run([*uv, "--quiet", "--no-deps", "--no-build-isolation", "-e", ROOT], env)
    stamp.write_text(_fingerprint(lock), encoding="utf-8")
    return True


def is_current(prefix: Path = ROOT / ".venv", lock: Path = LOCK) -> bool:
    """Whether `prefix` was set up to the end, in this place, from this lock and with this Python."""
    stamp = prefix / STAMP
    return stamp.exists() and stamp.read_text("utf-8") == _fingerprint(lock) and _stands(prefix)


def _stands(prefix: Path) -> bool:
    """Whether `prefix` is a whole environment, made in this place, and its Python starts, in this version."""
    binaries, about = _binaries(prefix), prefix / "pyvenv.cfg"
    if not about.is_file() or not any(binaries.glob("pip*")):  # the first and the last thing that venv makes
        return False
    # Its programs name the Python of the place it was made in, by the whole path.
    if not re.search(rf"^command = .* {re.escape(str(prefix))}$", about.read_text("utf-8"), re.MULTILINE):
        return False
    try:
        started = subprocess.run(
            [binaries / "python", "-c", "import sys; print(*sys.version_info[:2])"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError:
        return False
    return started.stdout.split() == [str(number) for number in sys.version_info[:2]]


def _binaries(prefix: Path) -> Path:
    return prefix / ("Scripts" if os.name == "nt" else "bin")


def locked(lock: Path = LOCK) -> dict[str, str]:
    """Name → version of what `lock` has for this system and Python. Needs the environment."""
    from packaging.requirements import Requirement

    lines = [line for line in lock.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    here = [each for each in map(Requirement, lines) if not each.marker or each.marker.evaluate()]
    return {each.name: str(each.specifier).removeprefix("==") for each in here}


def installed() -> dict[str, str]:
    """Name → version, with its build (2.13.0+cpu), of what this Python can import. Needs the environment."""
    from packaging.utils import canonicalize_name

    return {canonicalize_name(each.name): each.version for each in metadata.distributions()}


def make_wheelhouse(folder: Path = WHEELHOUSE, lock: Path = LOCK) -> int:
    """Gather a wheel of every locked package in `folder`, as installed in the environment that runs this.

    Wheels that are there already stay; others are removed. What has no wheel on the index is built. The
    folder serves machines with this system, processor and version of Python.

    Returns:
        How many wheels there are.
    Raises:
        SystemExit: if one cannot be had; the next try goes on from there.
        ValueError: if `folder` holds anything but wheels and the list of an earlier one; nothing is touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        ours = path.name == CONTENTS and path.is_file() and b" with Python " in path.read_bytes()[:80]
        if path.suffix != ".whl" and not ours:
            raise ValueError(f"{path} is not of a wheelhouse. Name an empty folder with --output.")
    (folder / CONTENTS).unlink(missing_ok=True)
    here = installed()
    cuda = [name for name in here if CUDA_PACKAGES.match(f"{name}==")]  # torch brought them, if any
    wanted = {name: here[name] for name in [*locked(lock), *cuda]}
    # Only torch comes in builds for different hardware, some from an index of its own.
    torch = f"torch=={wanted.pop('torch')}"
    others = [f"{name}=={version}" for name, version in wanted.items()]
    pip = [Path(sys.executable), "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", folder]
    print(f"Gathering {len(others) + 1} wheels in {folder.name}, some 600 MB …", flush=True)
    _run([*pip, *others])
    build = torch.partition("+")[2]
    if subprocess.run([*map(str, pip), torch], capture_output=bool(build)).returncode:
        _run([*pip, *(["--extra-index-url", f"{TORCH_BUILDS}/{build}"] if build else []), torch])
    lines = _contents(folder, wanted | {"torch": torch.partition("==")[2]})
    (folder / CONTENTS).write_text("\n".join([*_made_for(lock), *lines]) + "\n", encoding="utf-8")
    return len(lines)


def check_wheelhouse(folder: Path, lock: Path = LOCK) -> None:
    """Raise SystemExit with one sentence unless `folder` is whole and made for this machine and this lock."""
    again = "Make it on a machine like this one, with a network: make wheelhouse"
    if not (folder / CONTENTS).is_file():
        raise SystemExit(f"{folder} is not a finished wheelhouse: it has no {CONTENTS}. {again}")
    lines = (folder / CONTENTS).read_text("utf-8").splitlines()
    (machine, made_from), (this, wanted) = lines[:2], _made_for(lock)
    if machine != this:
        raise SystemExit(f"{folder} was made for {machine[2:]}, and this is {this[2:]}. {again}")
    if made_from != wanted:
        raise SystemExit(f"{folder} was made from another {lock.name}. {again}")
    names = [line.rpartition("# ")[2] for line in lines[2:]]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}. Copy it again.")


def _made_for(lock: Path) -> list[str]:
    python = ".".join(map(str, sys.version_info[:2]))
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    return [f"# {platform.system()} {platform.machine()} with Python {python}", f"# {lock.name} {digest}"]


def _contents(folder: Path, wanted: dict[str, str]) -> list[str]:
    """A line with name, version and sha256 for each wheel in `folder`; others than `wanted` are removed."""
    from packaging.utils import parse_wheel_filename
    from packaging.version import Version

    pins = {name: Version(version) for name, version in wanted.items()}
    lines = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        if pins.get(name) != version:
            wheel.unlink()
            continue
        with wheel.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        lines.append(f"{name}=={version} --hash=sha256:{digest}  # {wheel.name}")
    return lines


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
    # Lists: in pip's files each value may stand on a line of its own.
    if "UV_FIND_LINKS" in found:
        found["UV_FIND_LINKS"] = ",".join(found["UV_FIND_LINKS"].split())
    if "UV_INDEX" in found:
        found |= {"UV_INDEX": " ".join(found["UV_INDEX"].split()), "UV_INDEX_STRATEGY": "unsafe-best-match"}
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
    result = subprocess.run(
        command, env=os.environ | settings, capture_output=True, encoding="utf-8", errors="replace", cwd=ROOT
    )
    if result.returncode:
        raise SystemExit(f"The lock was not changed: {result.stderr.strip()}")
    kept = [line for line in result.stdout.splitlines() if not CUDA_PACKAGES.match(line)]
    header = f"# Resolved for Python {lowest} to {highest}; CUDA's own packages follow from torch."
    lock.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")


def audit(lock: Path = LOCK, service: str = "https://api.osv.dev/v1/query") -> int:
    """Look every locked package up in a database of known vulnerabilities; pip-audit runs in its own place.

    Args:
        service: an address that speaks the query API of osv.dev.
    Returns:
        0 if none is known, 1 if some are; they are printed.
    Raises:
        RuntimeError: if not every package could be looked up.
    """
    settings = uv_settings(pip_configuration(Path(sys.executable)))
    # fmt: off
    command = [Path(sys.executable).with_name("uv"), "tool", "run", "--quiet", "--isolated",
               "--from", AUDITOR, "pip-audit", "--requirement", lock, "--no-deps", "--disable-pip",
               "--vulnerability-service", "osv", "--osv-url", service, "--format", "json",
               "--progress-spinner", "off"]
    # fmt: on
    result = subprocess.run(
        map(str, command), env=os.environ | settings, capture_output=True, encoding="utf-8", errors="replace"
    )
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except ValueError:
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        reason = re.sub(r"^[\w.]*?(\w+Error): .*", r"\1", last)  # of a traceback, the name is enough
        raise RuntimeError(
            f"The packages could not be looked up at {service} ({reason:.200}). Nothing was audited; "
            "run `make audit` where that address can be reached."
        ) from None
    if skipped := [package["name"] for package in packages if "skip_reason" in package]:
        raise RuntimeError(f"{service} could not answer for {', '.join(skipped)}. Run `make audit` again.")
    known = [(package, flaw) for package in packages for flaw in package["vulns"]]
    for package, flaw in known:
        mend = f"mended in {', '.join(flaw['fix_versions'])}" if flaw["fix_versions"] else "not mended yet"
        print(f"{package['name']} {package['version']}: {flaw['id']}, {mend}: https://osv.dev/{flaw['id']}")
    print(f"{len(packages)} packages looked up, {len(known)} known vulnerabilities.")
    return 1 if known else 0


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
    attempt = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", errors="replace")
    return "+cpu" in attempt.stderr


def _fingerprint(lock: Path) -> str:
    parts = [lock.read_bytes(), (ROOT / "pyproject.toml").read_bytes(), platform.python_version().encode()]
    parts += [os.environ.get("TORCH_BACKEND", "").encode(), str(ROOT).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _locked(package: str, lock: Path) -> str:
    return re.search(rf"^{package}==([^\s;]+)", lock.read_text("utf-8"), re.MULTILINE).group(1)


def pip_configuration(python: Path) -> dict[str, str]:
    """pip's settings by bare name; its environment wins over its files, as in pip itself."""
    command = [python, "-X", "utf8", "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace").stdout
    lines = [line.partition("=") for line in listing.splitlines()]
    settings = {key: ast.literal_eval(value) for key, _, value in lines}
    ordered = sorted(settings.items(), key=lambda item: item[0].startswith(":env:"))
    return {key.rpartition(".")[2]: value for key, value in ordered}


def _run(command: list, env: dict[str, str] | None = None) -> None:
    if subprocess.run([str(part) for part in command], env=env).returncode:
        raise SystemExit(
            "Set-up stopped; the lines above say why. Mend that and run it again: it goes on from there. "
            f"What failed: {' '.join(map(str, command))}"
        )
