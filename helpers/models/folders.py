"""Folders of model files that are whole or not there.

A finished folder holds a manifest with the size and sha256 of each of its files. It is made under a lock in a
staging folder beside its place, and then renamed: an interrupted try leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from helpers import ROOT, processes
from helpers.errors import ModelUnavailable
from helpers.progress import Progress, megabytes

MANIFEST = "manifest.json"


def weights_dir() -> Path:
    """The folder of all model files: $WEIGHTS_DIR, or `weights` in the repository."""
    return Path(os.environ.get("WEIGHTS_DIR") or ROOT / "weights").expanduser().resolve()


@dataclass
class Staging:
    """A folder that is being made.

    Attributes:
        path: where its files are written.
        label: what the reader calls the model.
        progress: the line that the reader sees.
        source: source_model, source_revision and licence of what was written.
    """

    path: Path
    label: str
    progress: Progress
    source: dict[str, str] = field(default_factory=dict)

    def run_module(
        self, module: str, *arguments: object, what: str, watch: Callable[[str], None] | None = None
    ) -> None:
        """Run `python -m module arguments` without the Hub; see `processes.run_module`."""
        processes.run_module(
            module,
            *arguments,
            log=self.path / "log.txt",
            watch=watch or (lambda output: self.progress.advance()),
            what=what,
            HF_HUB_OFFLINE="1",
        )


@contextlib.contextmanager
def building(
    folder: Path, recipe: dict, *, label: str, needs: int = 0, keep: bool = False
) -> Iterator[Staging | None]:
    """Make `folder` in a `with` block, unless it is already finished with this recipe:

        with folders.building(folder, recipe, label="tiny-phi3") as staging:
            if staging:
                …  # write to staging.path, and set staging.source

    Args:
        recipe: everything that decides the content; a folder made with another recipe is replaced.
        label: what the reader calls it, for progress and errors.
        needs: bytes of disk that must be free.
        keep: leave the unfinished folder for the next try if this one fails.
    Yields:
        What to fill, or None where there is nothing to do.
    Raises:
        ModelUnavailable: if it cannot be made.
    """
    if is_complete(folder, recipe):
        yield None
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Progress(label) as progress, _locked(folder, progress):
            if is_complete(folder, recipe):  # Another process was faster.
                yield None
                return
            check_disk(folder.parent, label, needs)
            with _staging(folder, keep) as path:
                staging = Staging(path, label, progress)
                yield staging
                _publish(path, folder, staging.source | {"recipe": recipe})
            progress.finish(f"{label}: {megabytes(total_size(folder))}")
    except OSError as error:
        raise _explain(error, folder, label) from error


def is_complete(folder: Path, recipe: dict) -> bool:
    """Whether `folder` was finished with this recipe, and its files are what they were.

    Looks at names and sizes, and reads only files that were written after the manifest; `verify` reads all.

    Raises:
        ModelUnavailable: if it was finished, but files have gone or changed since.
    """
    if not (folder / MANIFEST).exists():
        return False
    manifest = read_manifest(folder)
    if manifest["recipe"] != json.loads(json.dumps(recipe)):
        return False
    if _compare(folder, manifest["files"], newer_than=(folder / MANIFEST).stat().st_mtime_ns):
        # Copied or restored, and whole: the next call need not read them again.
        with contextlib.suppress(OSError):
            (folder / MANIFEST).touch()
    return True


def verify(folder: Path) -> None:
    """Read every file of a finished folder and compare it with the manifest, say after copying it.

    Raises:
        ModelUnavailable: naming the files that are missing or corrupted.
    """
    _compare(folder, read_manifest(folder)["files"])


def _compare(folder: Path, files: dict[str, dict], newer_than: float = -math.inf) -> bool:
    """Compare the sizes of all files with the manifest, and read those newer than that (nanoseconds).

    Returns whether any was read. Raises ModelUnavailable if one is missing or differs.
    """
    newer, damaged = [], []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            damaged.append(name)
        elif path.stat().st_mtime_ns > newer_than:
            newer.append(name)
    damaged += [name for name in newer if sha256(folder / name) != files[name]["sha256"]]
    if damaged:
        raise ModelUnavailable(
            f"{', '.join(damaged)} in {folder} is missing or differs from {MANIFEST}. "
            "Delete the folder, and the next run makes it again; or copy it again."
        )
    return bool(newer)


def read_manifest(folder: Path) -> dict:
    """What is known of a finished folder: source_model, source_revision, licence, recipe, files.

    Raises:
        ModelUnavailable: if the folder has no manifest, so was never finished or is not one of ours.
    """
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelUnavailable(
            f"{folder} has no readable {MANIFEST}, so it was never finished. Delete it and fetch again."
        ) from None


def sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal, read piece by piece."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def total_size(folder: Path) -> int:
    """Bytes of all files in a folder; those that vanish meanwhile do not count."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def check_disk(folder: Path, label: str, needs: int) -> None:
    """Raise ModelUnavailable if the disk of `folder` has less than `needs` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needs:
        raise ModelUnavailable(
            f"{label} needs {megabytes(needs)} of disk and {folder} has {megabytes(free)} free. "
            "Free some, or set WEIGHTS_DIR to a folder on another disk."
        )


def _locked(folder: Path, progress: Progress) -> contextlib.AbstractContextManager:
    """Take the folder's lock, to be held in a `with` block; the system frees it when its holder dies."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        progress.start("waiting for another process that makes it")
        return lock.acquire()


@contextlib.contextmanager
def _staging(folder: Path, keep: bool) -> Iterator[Path]:
    """A folder beside `folder` to work in.

    Without `keep` its name is new each time, and what dead tries have left is deleted: a child process that
    outlives its killed parent for a moment cannot write into the next try's folder.
    """
    for leftover in folder.parent.glob(f".{folder.name}.*-try"):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep:
        path = folder.parent / f".{folder.name}.partial"
        path.mkdir(exist_ok=True)
    else:
        path = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix="-try", dir=folder.parent))
    try:
        yield path
    finally:
        if not keep:
            shutil.rmtree(path, ignore_errors=True)


def _publish(path: Path, folder: Path, facts: dict) -> None:
    """Write the manifest and move the finished folder to its place, where an older one is deleted."""
    files = {
        file.relative_to(path).as_posix(): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    (path / MANIFEST).write_text(json.dumps(facts | {"files": files}, indent=2) + "\n", encoding="utf-8")
    # mkdtemp and safetensors make files that only their owner can read.
    for each in [path, *path.rglob("*")]:
        each.chmod(0o755 if each.is_dir() else 0o644)
    if folder.exists():
        shutil.rmtree(folder)
    path.rename(folder)


def _explain(error: OSError, folder: Path, label: str) -> ModelUnavailable:
    """Turn a file-system error into a sentence with a next step."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelUnavailable(
            f"The disk of {folder.parent} was full before {label} was whole. "
            "Free some, or set WEIGHTS_DIR to a folder on another disk."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ModelUnavailable(
            f"{folder.parent} cannot be written to, so {label} cannot be put there. "
            "Set WEIGHTS_DIR to a folder that can."
        )
    return ModelUnavailable(f"{label} could not be made: {error}. Run it again.")
