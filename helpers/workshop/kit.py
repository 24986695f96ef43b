"""A kit for a mixed room without network: wheels for each kind of laptop, the models, checksums, a page."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT, environment
from helpers.models import catalog, export, fetch, folders
from helpers.workshop import wheelhouse, written

# README asks for glibc 2.28 or newer.
MANYLINUX = [f"manylinux_2_{minor}" for minor in range(28, 4, -1)] + ["manylinux2014", "manylinux2010"]
MARKERS = ("platform_system", "platform_machine", "sys_platform", "os_name")  # as PEP 508 names them
# Name → the values of MARKERS, and the tags of the wheels that it takes, as pip names them.
SYSTEMS = {
    "linux-x86_64": ("Linux", "x86_64", "linux", "posix", [f"{tag}_x86_64" for tag in MANYLINUX]),
    "linux-aarch64": ("Linux", "aarch64", "linux", "posix", [f"{tag}_aarch64" for tag in MANYLINUX]),
    "macos-arm64": ("Darwin", "arm64", "darwin", "posix", ["macosx_14_0_arm64"]),
    "windows-amd64": ("Windows", "AMD64", "win32", "nt", ["win_amd64"]),
}
MODELS = ("smollm2-135m", "tiny-phi3")
WHEELS_MB = 600  # of one folder, measured for Linux

PAGE = """\
Which laptop takes which folder

{rows}

A folder marked "not run" has every package that its kind of laptop needs, by the packages' own metadata;
nothing was installed from it. Try it on one such laptop.

1. Copy the project to the laptop, and the folder weights of this kit into the project.
2. In the project's folder, with the path of a folder from above in place of FOLDER, and its Python:
     Linux, macOS   make run WHEELHOUSE=FOLDER PYTHON=python3.12 PARAMS="-p offline True"
     Windows, in a Command Prompt (not in PowerShell)
                    set WHEELHOUSE=FOLDER
                    py -3.12 -m helpers setup
                    .venv\\Scripts\\python -m helpers run -p offline True
3. `make doctor` (Windows: .venv\\Scripts\\python -m helpers doctor) ends with "Everything needed is here."

To compare a copy with its checksums:  sha256sum -c SHA256SUMS  (macOS: shasum -a 256 -c SHA256SUMS)
"""


@dataclass(frozen=True)
class Target:
    """A kind of laptop: a key of SYSTEMS, and a minor version of Python."""

    system: str
    python: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """From "linux-x86_64:3.11"; ValueError for what is not known."""
        system, _, python = text.partition(":")
        if system not in SYSTEMS or python not in environment.PYTHONS:
            raise ValueError(
                f"{text!r} is not a system and a Python. The systems are {', '.join(SYSTEMS)}, the Pythons "
                f"{', '.join(environment.PYTHONS)}. For example: make kit PLATFORMS=macos-arm64:3.12"
            )
        return cls(system, python)

    @property
    def folder(self) -> str:
        return f"{self.system}-{self.python}"

    @property
    def is_here(self) -> bool:
        here = (platform.system(), platform.machine(), environment.python_version())
        return (*SYSTEMS[self.system][:2], self.python) == here

    def pins(self) -> dict[str, str]:
        """Name → version of what the lock has for this kind of laptop."""
        markers = dict(zip(MARKERS, SYSTEMS[self.system], strict=False)) | {
            "python_version": self.python,
            "python_full_version": f"{self.python}.99",  # a late patch release
            "implementation_name": "cpython",
        }
        return environment.locked(markers=markers)


def make(platforms: list[str], output: Path = ROOT / "kit") -> int:
    """Gather in `output` a folder of wheels for each of `platforms`, the models, a page and checksums.

    Wheels that are there already stay, so that a second try goes on.

    Returns:
        0, or 1 if a package has no wheel for one of them; the page and the output say which.
    Raises:
        ValueError: for a platform that is not known, an `output` that can be no folder, or too little disk;
            before anything is gathered.
        SystemExit: if pip fails for another reason.
    """
    targets = [Target.parse(text) for text in platforms]
    written.make_folder(output)
    models = _models()
    size = sum(map(folders.total_size, models)) / 1e6
    needed, free = size + WHEELS_MB * len(targets), shutil.disk_usage(output).free / 1e6
    print(
        f"{output.name}: models {size:,.0f} MB, wheels about {WHEELS_MB} MB for each of {len(targets)} kinds "
        f"of laptops; {needed:,.0f} MB in all, {free:,.0f} MB are free.",
        flush=True,
    )
    if free < needed:
        raise ValueError(
            f"{output} needs {needed:,.0f} MB, and {free:,.0f} MB are free. Name another --output."
        )
    for folder in models:
        copy = output / "weights" / folder.parent.name / folder.name
        # The large files are read-only, so a copy cannot be written over.
        if copy.exists():
            shutil.rmtree(copy)
        shutil.copytree(folder, copy)
    missing = {target: _gather(target, output / target.folder) for target in targets}
    _write_page(output, missing)
    return 1 if any(missing.values()) else 0


def _models() -> list[Path]:
    """The checkpoint and the ONNX folders of both models, fetched and converted where they are missing."""
    made = []
    for model in map(catalog.find, MODELS):
        made += [fetch.checkpoint(model), *(export.onnx_folder(model, p) for p in export.compared(model))]
    return made


def _gather(target: Target, folder: Path) -> list[str]:
    """Fetch the wheels of a target, and list them as `make wheelhouse` does; returns what has none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / environment.CONTENTS).unlink(missing_ok=True)
    pins, missing = target.pins(), []
    torch = pins.pop("torch")
    while failed := _download(target, folder, [f"{name}=={version}" for name, version in pins.items()]):
        missing.append(f"{failed}=={pins.pop(failed)}")
    # On Linux the default index has torch for CUDA, with gigabytes of further packages.
    pins["torch"] = f"{torch}+cpu" if target.system.startswith("linux") else torch
    wanted = [f"torch=={pins['torch']}"]
    if _download(target, folder, wanted) and _download(
        target, folder, wanted, "--extra-index-url", f"{wheelhouse.TORCH_BUILDS}/cpu"
    ):
        missing += wanted
    print(f"{folder.name}: {'no wheel for ' + ', '.join(missing) if missing else 'complete'}", flush=True)
    if not missing:
        system, machine = SYSTEMS[target.system][:2]
        head = wheelhouse.made_for(environment.LOCK, system, machine, target.python)
        # An earlier lock may have left other wheels here.
        for wheel in {*folder.glob("*.whl")} - {*wheelhouse.write_contents(folder, pins, head)}:
            wheel.unlink()
    return missing


def _download(target: Target, folder: Path, wanted: list[str], *options: str) -> str:
    """Let pip fetch the wheels; returns the name of a package that has none, or ""."""
    *_, accepted = SYSTEMS[target.system]
    tags = [part for tag in accepted for part in ("--platform", tag)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    # A late patch release: some packages refuse the first ones of a version.
    python = ["--implementation", "cp", "--python-version", f"{target.python}.99"]
    done = subprocess.run(
        [*command, *python, *tags, "--dest", folder, *options, *wanted],
        # The lock has every version. Where this machine's constraints name a package too, pip (26) calls its
        # missing wheel a conflict.
        env=os.environ | {"PIP_CONSTRAINT": os.devnull},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode == 0:
        return ""
    if found := re.search(r"No matching distribution found for ([\w.-]+)==", done.stderr):
        return found[1]
    raise SystemExit(
        f"{folder.name} is not complete. The same command goes on from here.\n{done.stderr.strip()}"
    )


def _write_page(output: Path, missing: dict[Target, list[str]]) -> None:
    rows = []
    for target, lacking in missing.items():
        size = folders.total_size(output / target.folder) / 1e6
        state = "the kind of the machine that made this kit" if target.is_here else "not run"
        if lacking:
            state = f"NOT COMPLETE, needs a network: no wheel for {', '.join(lacking)}"
        system, machine = SYSTEMS[target.system][:2]
        name = {"Darwin": "macOS 14 or newer"}.get(system, system)
        rows.append(
            f"  {target.folder:<20} {name}, {machine}, Python {target.python}: {size:.0f} MB; {state}"
        )
    (output / "README.txt").write_text(PAGE.format(rows="\n".join(rows)), encoding="utf-8")
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and path.name != "SHA256SUMS"]
    sums = [f"{folders.sha256(path)}  {path.relative_to(output).as_posix()}\n" for path in files]
    (output / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
