"""Convert a checkpoint to an ONNX folder for onnxruntime-genai, once per precision."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from helpers.errors import ChildFailed, ModelUnavailable
from helpers.models import fetch, folders
from helpers.models.catalog import Model, check_precision
from helpers.models.folders import Staging
from helpers.models.origins import Folder

# The options of the builder. The int4 recipe was chosen by how far smollm2-135m's
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
# Any text; change it whenever q4_grid writes other weights. It began as the sha256 of that file.
GRID_VERSION = "04c0c6d4eea3cc6b1c4dab3a9c676c32d638a7edc08328b4ea8c08120fc53f69"


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
    place = folders.weights_dir() / model.key / f"onnx-{precision}"
    if isinstance(model.origin, Folder) and model.origin.is_onnx:
        folder = fetch.check_onnx(model.origin.path)
    elif precision in model.published:
        folder = fetch.check_onnx(fetch.fetched(place, model, model.published[precision], offline))
    else:
        folder = _converted(place, model, precision, offline, prompt, max_new_tokens)
    if prompt:
        fetch.check_prompt(folder, model, prompt, max_new_tokens)
    return folder


def onnx_recipe(model: Model, precision: str) -> dict:
    """What decides the content of an ONNX folder: equal recipes, equal folders."""
    if precision in model.published:
        return model.published[precision].recipe()
    recipe = {
        "checkpoint": model.origin.recipe(),
        "precision": precision,
        "options": OPTIONS[precision],
        "builder": f"onnxruntime-genai {version('onnxruntime-genai')}",
    }
    return recipe | ({"grid": GRID_VERSION} if precision == "int4" else {})


def _converted(
    folder: Path, model: Model, precision: str, offline: bool, prompt: str, max_new_tokens: int
) -> Path:
    recipe = onnx_recipe(model, precision)
    with folders.building(folder, recipe, label=f"{model.key} {precision}") as staging:
        if staging:
            checkpoint = fetch.checkpoint(model, offline)
            if prompt:
                fetch.check_prompt(checkpoint, model, prompt, max_new_tokens)
            _convert(checkpoint, precision, staging)
            staging.source = fetch.source(checkpoint)
    if offline:
        folders.verify(folder)
    return folder


def _convert(checkpoint: Path, precision: str, staging: Staging) -> None:
    """Run the builder of onnxruntime-genai, and copy the licences."""
    staging.progress.start("converting to ONNX")
    builder = "helpers.models.q4_grid" if precision == "int4" else "onnxruntime_genai.models.builder"
    options = OPTIONS[precision]
    try:
        staging.run_module(
            builder,
            *("-m", "none", "-i", checkpoint, "-o", staging.path, "-c", staging.path / "cache"),
            *("-p", precision.partition("-")[0], "-e", "cpu"),
            *(("--extra_options", *options) if options else ()),
            what=f"Converting {checkpoint} to {precision}",
        )
    except ChildFailed as error:
        if error.out_of_space:
            raise
        raise ModelUnavailable(
            f"{_architecture(checkpoint)} cannot be converted to {precision} by the builder of "
            f"onnxruntime-genai {version('onnxruntime-genai')} ({error.reason.rstrip('.')}). Notebook 01 "
            "works with it all the same. For notebook 02 choose another model (docs/models.md names kinds "
            "that work), or a folder that is ONNX already."
        ) from None
    if not (staging.path / "genai_config.json").is_file():
        raise ModelUnavailable(f"The builder wrote no genai_config.json for {checkpoint}; it cannot be used.")
    for name in ("LICENSE", "NOTICE"):
        for licence in checkpoint.glob(f"{name}*"):
            (staging.path / licence.name).write_bytes(licence.read_bytes())


def _architecture(folder: Path) -> str:
    """What a checkpoint says that it is, say "Gemma3ForCausalLM in /my/model"."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return f"{' '.join(config.get('architectures') or [config.get('model_type', 'The model')])} in {folder}"
