"""All locked wheels in one folder, so that machines like this one are set up without a network.

`check` runs before anything is installed: at its top this file imports the standard library only.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from pathlib import Path

from helpers import ROOT
from helpers.environment import CONTENTS, CUDA_PACKAGES, LOCK, installed, locked, python_version

FOLDER = ROOT / "wheelhouse"
TORCH_BUILDS = "https://download.pytorch.org/whl"


def make(folder: Path = FOLDER) -> int:
    """Gather a wheel of every locked package in `folder`, as installed in the environment that runs this.

    Wheels that are there already stay, and what has no wheel on the index is built. The folder serves
    machines with this system, processor and version of Python.

    Returns:
        How many wheels there are.
    Raises:
        RuntimeError: if one cannot be had; the next try goes on from there.
        ValueError: if `folder` holds somebody else's requirements.txt; nothing is touched then.
    """
    listed = folder / CONTENTS
    if listed.exists() and b" with Python " not in listed.read_bytes()[:80]:
        raise ValueError(f"{listed} is not of a wheelhouse. Name an empty folder with --output.")
    listed.unlink(missing_ok=True)
    here = installed()
    # Torch brought CUDA's packages, if any are here.
    cuda = [name for name in here if CUDA_PACKAGES.match(f"{name}==")]
    wanted = {name: here[name] for name in [*locked(), *cuda]}
    print(f"Gathering {len(wanted)} wheels in {folder.name}, some 600 MB …", flush=True)
    _gather(folder, *(f"{name}=={version}" for name, version in wanted.items() if name != "torch"))
    # Torch alone comes in builds for different hardware (2.13.0+cpu), some from an index of its own.
    build = wanted["torch"].partition("+")[2]
    index = ["--extra-index-url", f"{TORCH_BUILDS}/{build}"] if build else []
    _gather(folder, *index, f"torch=={wanted['torch']}")
    return len(write_contents(folder, wanted, made_for(LOCK)))


def _gather(folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", str(folder), *words]
    if subprocess.run(command).returncode:
        raise RuntimeError("Not every wheel could be had; the lines above say why.")


def write_contents(folder: Path, wanted: dict[str, str], head: list[str]) -> list[Path]:
    """Write the list of a finished folder: what it is made for, then name, version and sha256 of each wheel.

    Args:
        wanted: name → version; other wheels in the folder are not listed.
        head: what `made_for` returns.
    Returns:
        The wheels that are listed.
    """
    from packaging.utils import parse_wheel_filename
    from packaging.version import Version

    from helpers.models import folders

    wheels, lines = [], []
    for wheel in sorted(folder.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        if name in wanted and Version(wanted[name]) == version:
            wheels.append(wheel)
            lines.append(f"{name}=={version} --hash=sha256:{folders.sha256(wheel)}  # {wheel.name}")
    (folder / CONTENTS).write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    return wheels


def check(folder: Path, lock: Path = LOCK) -> None:
    """Raise SystemExit with one sentence unless `folder` is whole and made for this machine and this lock."""
    again = "Make it on a machine like this one, with a network: make wheelhouse"
    if not (folder / CONTENTS).is_file():
        raise SystemExit(f"{folder} is not a finished wheelhouse: it has no {CONTENTS}. {again}")
    machine, made_from, *lines = (folder / CONTENTS).read_text("utf-8").splitlines()
    this, wanted = made_for(lock)
    if machine != this:
        raise SystemExit(
            f"{folder} was made for {machine[2:]}, and this is {this[2:]}. Take the folder for this one, or "
            f"choose the folder's Python: make run PYTHON=python3.12. {again}"
        )
    if made_from != wanted:
        raise SystemExit(f"{folder} was made from another {lock.name}. {again}")
    names = [line.rpartition("# ")[2] for line in lines]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}. Copy it again.")


def made_for(lock: Path, system: str = "", machine: str = "", python: str = "") -> list[str]:
    """The first lines of a list of wheels: a kind of laptop, by default this one, and the lock."""
    system, machine = system or platform.system(), machine or platform.machine()
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    return [f"# {system} {machine} with Python {python or python_version()}", f"# {lock.name} {digest}"]
