"""Convert a checkpoint to an ONNX folder for onnxruntime-genai, once per precision."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from helpers import errors, processes
from helpers.errors import ModelUnavailable
from helpers.models import folders, guard
from helpers.models.catalog import Folder, Model, check_precision
from helpers.models.fetch import ONNX_FILES, check_prompt, checkpoint, hub_folder, recipe, source
from helpers.models.folders import weights_dir
from helpers.progress import Progress

# What the builder is told besides the precision. The int4 recipe was chosen by how far smollm2-135m's
# probabilities for the next token are from those in float32 (KL divergence; benchmarks/README.md has the
# table): 0.41 nats with the builder's rounding in blocks of 32, 0.004 with q4_grid, which gives each block
# an offset, as in the file that the weights come from. It uses no zero points: with them ONNX Runtime 1.32
# computes a single row wrongly on processors without AVX-512 (github.com/microsoft/onnxruntime/issues/29853).
# Blocks of 32 have one price there: a single row is added up in another order than several, so that between
# two tokens that are nearly equally likely an answer may choose otherwise in a batch. Blocks of 16 do not
# have it, but are slower than int8.
OPTIONS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "int8": (),
    "int4": (
        "algo_config=rtn",
        "is_symmetric=true",
        "block_size=32",
        "matmul_mixed_precision=last_matmul:int8",
        "fuse_mlp_gate_up=true",
    ),
    # The builder's own default, without care: never offered, but measured so that a gate has what to refuse.
    "int4-default": (),
}


def compared(model: Model) -> tuple[str, ...]:
    """What a study compares: what the model is offered in and, where it is converted here, int4-default."""
    converted = model.precisions and not model.published
    return (*model.precisions, "int4-default") if converted else model.precisions


def onnx_folder(
    model: Model, precision: str, offline: bool = False, *, prompt: str = "", max_new_tokens: int = 0
) -> Path:
    """The ONNX folder of `model` (genai_config.json, model, tokenizer) in fp32, int8, int4 or
    int4-default.

    A published folder is fetched where the catalogue knows one; a folder of the reader's own that already
    is ONNX is returned as it is; anything else is exported from the checkpoint for the CPU.

    Args:
        offline: touch no network; exporting needs none. Every byte of what is there is compared with the
            manifest.
        prompt: what the model will be asked, for an answer of up to `max_new_tokens`; that both fit is
            checked before the work as far as the checkpoint tells, and afterwards.
    Raises:
        ValueError: if the precision is none of those, or the prompt is too long.
        ModelUnavailable: if the files are not there and cannot be had, or if some are damaged.
    """
    if precision not in OPTIONS:
        check_precision(precision)
    if isinstance(model.origin, Folder) and model.origin.is_onnx:
        folder = guard.check_onnx(model.origin.path)
    else:
        folder = _onnx_folder(model, precision, offline, prompt, max_new_tokens)
        if offline:
            folders.verify(folder)
    if prompt:
        check_prompt(folder, model, prompt, max_new_tokens)
    return folder


def _onnx_folder(model: Model, precision: str, offline: bool, prompt: str, max_new_tokens: int) -> Path:
    folder = weights_dir() / model.key / f"onnx-{precision}"
    if precision in model.published:
        return guard.check_onnx(hub_folder(folder, model, model.published[precision], ONNX_FILES, offline))
    wanted = onnx_recipe(model, precision)
    if folders.is_complete(folder, wanted):
        return folder
    origin = checkpoint(model, offline)
    if prompt:
        check_prompt(origin, model, prompt, max_new_tokens)
    return folders.make(
        folder,
        wanted,
        lambda staging, progress: _export(origin, precision, staging, progress),
        label=f"{model.key} {precision}",
    )


def onnx_recipe(model: Model, precision: str) -> dict:
    """What decides the content of an ONNX folder: equal recipes, equal folders."""
    if precision in model.published:
        return asdict(model.published[precision])
    made_of = {
        "checkpoint": recipe(model),
        "precision": precision,
        "options": OPTIONS[precision],
        "builder": f"onnxruntime-genai {version('onnxruntime-genai')}",
    }
    if precision == "int4":
        code = Path(__file__).with_name("q4_grid.py").read_text("utf-8")
        made_of["grid"] = hashlib.sha256(code.encode()).hexdigest()
    return made_of


def _export(origin: Path, precision: str, staging: Path, progress: Progress) -> dict:
    progress.start("converting to ONNX")
    options = OPTIONS[precision]
    try:
        processes.run_module(
            "helpers.models.q4_grid" if precision == "int4" else "onnxruntime_genai.models.builder",
            *("-m", "none", "-i", origin, "-o", staging, "-p", precision.partition("-")[0], "-e", "cpu"),
            *("-c", staging / "cache"),
            *(("--extra_options", *options) if options else ()),
            log=staging / "log.txt",
            watch=lambda output: progress.advance(),
            what=f"Converting {origin} to {precision}",
            HF_HUB_OFFLINE="1",
        )
    except errors.ChildFailed as error:
        if error.for_want_of_room:
            raise
        builder = f"the builder of onnxruntime-genai {version('onnxruntime-genai')}"
        raise ModelUnavailable(
            f"{_architecture(origin)} cannot be converted to {precision} by {builder} "
            f"({error.reason.rstrip('.')}). Notebook 01 works with it all the same. For notebook 02 choose "
            "another model (docs/models.md names kinds that work), or a folder that is ONNX already."
        ) from None
    if not (staging / "genai_config.json").is_file():
        raise ModelUnavailable(f"The builder wrote no genai_config.json for {origin}; it cannot be used.")
    _copy_licences(origin, staging)
    return source(origin)


def _architecture(folder: Path) -> str:
    """What a checkpoint says that it is, say "Gemma3ForCausalLM in /my/model"."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return f"{' '.join(config.get('architectures') or [config.get('model_type', 'The model')])} in {folder}"


def _copy_licences(origin: Path, staging: Path) -> None:
    for name in ("LICENSE", "NOTICE"):
        for path in origin.glob(f"{name}*"):
            (staging / path.name).write_bytes(path.read_bytes())
