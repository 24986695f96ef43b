"""Folders of model files that are whole or not there: manifest, lock, progress, child processes.

A finished folder holds a manifest with the size and sha256 of each of its files. It is made beside its place
and moved there in one step, under a lock, so an interrupted try leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import ROOT
from helpers.errors import ModelUnavailable
from helpers.progress import Progress, megabytes

if TYPE_CHECKING:
    pass

MANIFEST = "manifest.json"


def weights_dir() -> Path:
    """The folder of all model files: $WEIGHTS_DIR, or `weights` in the repository."""
    return Path(os.environ.get("WEIGHTS_DIR") or ROOT / "weights").expanduser().resolve()


def read_manifest(folder: Path) -> dict:
    """What is known of a finished folder: source_model, source_revision, licence, recipe, versions, files.

    Raises:
        ModelUnavailable: if the folder has no manifest, so was never finished or is not one of ours.
    """
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelUnavailable(
            f"{folder} has no readable {MANIFEST}, so it was never finished. Delete it and fetch again."
        ) from None


def verify(folder: Path) -> None:
    """Read every file of a finished folder and compare it with the manifest, say after copying it.

    Raises:
        ModelUnavailable: naming the files that are missing or corrupted.
    """
    files = read_manifest(folder)["files"]
    _refuse_damaged(folder, [name for name, entry in files.items() if _describe(folder / name) != entry])


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
    files = manifest["files"]
    _refuse_damaged(folder, [name for name, entry in files.items() if _size(folder / name) != entry["size"]])
    finished = (folder / MANIFEST).stat().st_mtime_ns
    touched = [name for name in files if (folder / name).stat().st_mtime_ns > finished]
    _refuse_damaged(folder, [name for name in touched if _describe(folder / name) != files[name]])
    if touched:  # copied or restored, and whole: not to be read again
        with contextlib.suppress(OSError):
            (folder / MANIFEST).touch()
    return True


def make(
    folder: Path,
    recipe: dict,
    write: Callable[[Path, Progress], dict],
    *,
    label: str,
    needs: int = 0,
    keep: bool = False,
) -> Path:
    """Return `folder`, made by `write` unless it is already finished with this recipe.

    Args:
        recipe: everything that decides the content; a folder made with another recipe is replaced.
        write: fills an empty folder (or, with `keep`, what an earlier try left) and returns the manifest's
            source_model, source_revision and licence, and as "root" the folder inside it to publish.
        label: what the reader calls it, for progress and errors.
        needs: bytes of free disk to ask for before starting.
        keep: leave the unfinished folder for the next try if this one fails.
    Raises:
        ModelUnavailable: if it cannot be made.
    """
    if is_complete(folder, recipe):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Progress(label) as progress, _lock(folder, progress):
            if is_complete(folder, recipe):  # another process was faster
                return folder
            check_disk(folder.parent, label, needs)
            with _staging(folder, keep) as staging:
                facts = write(staging, progress)
                root = facts.pop("root", staging)
                _write_manifest(root, facts | {"recipe": recipe})
                _publish(root, folder)
            progress.finish(f"{label}: {megabytes(total_size(folder))}")
    except OSError as error:
        raise _explain(error, folder, label) from error
    return folder


@contextlib.contextmanager
def _lock(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when its holder dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.parent / f".{folder.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.acquire(timeout=0))
        except Timeout:
            progress.start("another process is at it, waiting")
            while True:
                with contextlib.suppress(Timeout):
                    stack.enter_context(lock.acquire(timeout=1))
                    break
                progress.advance()
        yield


@contextlib.contextmanager
def _staging(folder: Path, keep: bool) -> Iterator[Path]:
    """A folder beside `folder` to work in; what dead tries left is cleaned up, or with `keep` gone on with.

    Without `keep` its name is new each time: a child process that outlives its killed parent for a moment
    then cannot write into the next try's folder.
    """
    kept = folder.parent / f".{folder.name}.partial"
    for leftover in folder.parent.glob(f".{folder.name}.*-try"):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep:
        kept.mkdir(exist_ok=True)
        try:
            yield kept
        except BaseException:
            with contextlib.suppress(OSError):
                kept.rmdir()  # goes only if nothing has arrived
            raise
        shutil.rmtree(kept, ignore_errors=True)
        return
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix="-try", dir=folder.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, folder: Path) -> None:
    """Move the finished folder to its place; an older one of another recipe makes room."""
    for path in [staging, *staging.rglob("*")]:  # mkdtemp and safetensors make what only the owner can read
        path.chmod(0o755 if path.is_dir() else 0o644)
    if folder.exists():
        replaced = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix="-try", dir=folder.parent))
        folder.rename(replaced / folder.name)
        staging.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        staging.rename(folder)


def _write_manifest(folder: Path, facts: dict) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    packages = ("onnxruntime-genai", "torch", "transformers", "huggingface-hub")
    manifest = facts | {
        "versions": {name: version(name) for name in packages},
        "files": {name: _describe(folder / name) for name in names if name != MANIFEST},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _describe(path: Path) -> dict | None:
    if not path.is_file():
        return None
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """The file's sha256 in hexadecimal, read piece by piece."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _size(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size if path.is_file() else None
    return None


def total_size(folder: Path) -> int:
    """Bytes of all files in a folder, those that vanish meanwhile not counted."""
    return sum(_size(path) or 0 for path in folder.rglob("*"))


def _refuse_damaged(folder: Path, names: list[str]) -> None:
    if names:
        raise ModelUnavailable(
            f"{', '.join(names)} in {folder} is missing or differs from {MANIFEST}. "
            "Delete the folder, and the next run makes it anew; or copy it again."
        )


def check_disk(folder: Path, label: str, needs: int) -> None:
    """Raise ModelUnavailable if the disk of `folder` has less than `needs` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needs:
        raise ModelUnavailable(
            f"{label} needs {megabytes(needs)} of disk and {folder} has {megabytes(free)} free. "
            "Free some, or set WEIGHTS_DIR to a folder on another disk."
        )


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
