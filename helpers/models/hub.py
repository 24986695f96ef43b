"""Fetch one commit of a Hugging Face Hub repository, each file checked before it counts.

A download goes on where it was stopped, in this process or another. huggingface_hub's own `snapshot_download`
(1.33) takes up only what broke in the same process, and checks sizes, not checksums.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from helpers.errors import ModelUnavailable
from helpers.models import folders, guard, network
from helpers.models.catalog import Hub, Model
from helpers.progress import Progress

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
PARTS = ".parts"  # half-fetched files, by checksum


def download(model: Model, hub: Hub, patterns: tuple[str, ...], staging: Path, progress: Progress) -> dict:
    """Bring the files of `hub` that match `patterns`, and its licences, into `staging`, the small ones first.

    Over plain HTTP even where the Hub offers Xet, which cannot go on with another process's part of a file.

    Returns:
        What `folders.make` asks of a writer: source_model, source_revision (the commit), licence, root.
    Raises:
        ModelUnavailable: with the next step for the reader; what has arrived stays for the next try.
    """
    import httpx
    from huggingface_hub import errors, logging

    logging.set_verbosity_error()  # its notes on every retry would stay in the reader's notebook
    _check_environment(hub.repo)
    try:
        commit, files = _listing(hub, patterns)
        _drop_all_but(files, staging)
        size = sum(file.size for file in files)
        folders.check_disk(staging, model.key, size - folders.total_size(staging))
        progress.start("fetching", size)
        done = 0
        for file in files:
            _fetch_file(hub, commit, file, staging, _Count(progress, done))
            done += file.size
    except (errors.OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise ModelUnavailable(_hub_sentence(error, hub.repo, hub.revision)) from error
    shutil.rmtree(staging / PARTS, ignore_errors=True)
    root = staging / hub.folder
    for licence in staging.glob("*") if hub.folder else ():
        if licence.is_file():
            licence.replace(root / licence.name)
    return {"source_model": hub.repo, "source_revision": commit, "licence": model.licence, "root": root}


def _check_environment(repo: str) -> None:
    """Make a client as huggingface_hub will, which reads proxies and certificates of the environment."""
    import httpx
    from huggingface_hub import constants

    try:
        httpx.Client().close()
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        reason = network.fault(constants.ENDPOINT, "httpx") or f"{type(error).__name__}: {error}."
        raise ModelUnavailable(f"{repo} could not be fetched: {reason}") from None


def _listing(hub: Hub, patterns: tuple[str, ...]) -> tuple[str, list]:
    """The commit that a revision stands for, and its files that are wanted: none from folders below."""
    from huggingface_hub import HfApi

    def wanted(path: str) -> bool:
        place, _, name = path.rpartition("/")
        here = patterns if place == hub.folder else ()
        return any(fnmatchcase(name, pattern) for pattern in (*here, *(() if place else LICENCE_FILES)))

    info = HfApi().model_info(hub.repo, revision=hub.revision, files_metadata=True)
    guard.check_listing(hub.repo, [file.rfilename for file in info.siblings])
    files = sorted((file for file in info.siblings if wanted(file.rfilename)), key=lambda file: file.size)
    if not any(file.rfilename in guard.WEIGHTS or file.rfilename.endswith(".onnx") for file in files):
        raise ModelUnavailable(
            f"{hub.repo} at {hub.revision} holds neither {' nor '.join(guard.WEIGHTS)} nor the ONNX folder "
            "asked for, and nothing else is loaded. Choose another model."
        )
    return info.sha, files


def _drop_all_but(files: list, staging: Path) -> None:
    """Remove what a try at another commit left."""
    wanted = {staging / file.rfilename for file in files}
    wanted |= {staging / PARTS / _checksum(file) for file in files}
    for path in staging.rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()


def _fetch_file(hub: Hub, commit: str, file, staging: Path, count: _Count) -> None:
    """Put one file in its place once it is whole; `http_get` itself takes up a connection that breaks."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    name, target, part = file.rfilename, staging / file.rfilename, staging / PARTS / _checksum(file)
    if _matches(target, file):
        return
    part.parent.mkdir(exist_ok=True)
    with part.open("ab") as sink:
        count.update(sink.tell())
        if sink.tell() < file.size:
            url, headers = hf_hub_url(hub.repo, name, revision=commit), build_hf_headers()
            http_get(url, sink, resume_size=sink.tell(), headers=headers, tqdm_class=lambda **_: count)
    if not _matches(part, file):
        size = part.stat().st_size
        part.unlink()
        wrong = f"{size:,} of {file.size:,} bytes" if size < file.size else "a checksum the Hub does not list"
        raise ModelUnavailable(
            f"{name} of {hub.repo} arrived with {wrong}, and was dropped. Try again; if it happens again, "
            "something between this machine and the Hub changes files."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)


@dataclass
class _Count:
    """What huggingface_hub takes for its progress bar: it moves ours."""

    progress: Progress
    done: int  # bytes

    def __enter__(self) -> _Count:
        return self

    def __exit__(self, *exception: object) -> None:
        """One bar shows all files."""

    def update(self, size: int) -> None:
        self.done += size
        self.progress.advance(self.done)


def _checksum(file) -> str:
    """What the Hub lists: sha256 for large files, git's own sha1 for others. It also names the file's part.

    Raises:
        ModelUnavailable: if it is anything else, say a path.
    """
    checksum, digits = (file.lfs.sha256, 64) if file.lfs else (file.blob_id, 40)
    if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", str(checksum)):
        raise ModelUnavailable(
            f"The Hub lists {checksum!r} as the checksum of {file.rfilename}, and that is none. "
            "Nothing was fetched. Choose another model."
        )
    return checksum


def _matches(path: Path, file) -> bool:
    """Whether a file is what the Hub lists."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.lfs:
        return folders.sha256(path) == file.lfs.sha256
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return blob.hexdigest() == file.blob_id


def _hub_sentence(error: Exception, repo: str, revision: str) -> str:
    """What went wrong with the Hub, and the next step, in one sentence or two."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
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
    if status == 401 and "Invalid credentials" in error.response.headers.get("X-Error-Message", ""):
        return (
            "The Hub refuses your token, in HF_TOKEN or of `hf auth login`: it is wrong or has expired. Make "
            "another at https://huggingface.co/settings/tokens, or use none: public models need none."
        )
    if status == 429:
        wait = error.response.headers.get("Retry-After", "")
        when = f"in {wait} s" if wait.isdigit() else "later"  # it may also be a date
        return f"The Hub has had too many requests from here (429). Try again {when}, or set HF_TOKEN."
    cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
    again = "Check the network and try again: it goes on from here."
    return f"{repo} could not be fetched ({cause}). {network.fault(constants.ENDPOINT, 'httpx') or again}"
