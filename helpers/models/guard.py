"""What a model folder made elsewhere may not do: leave its place, bring pickles, or have its code run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from helpers.errors import ModelUnavailable

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# What a genai_config.json made elsewhere may set; threads and provider are the wrapper's choice anyway.
SESSION_OPTIONS = (
    *("log_id", "log_severity_level", "log_verbosity_level", "provider_options", "graph_optimization_level"),
    *("intra_op_num_threads", "inter_op_num_threads", "enable_cpu_mem_arena", "enable_mem_pattern"),
    *("disable_cpu_ep_fallback", "disable_quant_qdq", "enable_quant_qdq_cleanup", "use_env_allocators"),
)


def check_checkpoint(folder: Path) -> Path:
    """The folder, if transformers reads only its own safetensors and needs no code that came with it.

    transformers 5.23 takes model.safetensors, or its index; without both it takes pytorch_model.bin, a
    pickle, whatever other safetensors lie there. The setting transformers_weights names yet another file.

    Raises:
        ModelUnavailable: naming what it would have read or run.
    """
    if not ((folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHTS)):
        raise ModelUnavailable(
            f"{folder} is not a Transformers checkpoint: it needs config.json and {' or '.join(WEIGHTS)} "
            "(pickled weights are not read). Choose another model."
        )
    if name := _read(folder / "config.json").get("transformers_weights"):
        raise ModelUnavailable(
            f"config.json in {folder} sets transformers_weights to {name!r}, and only {' or '.join(WEIGHTS)} "
            "is read. Remove it from the file if the model is your own; otherwise choose another model."
        )
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(_read(index).get("weight_map", {}).values())
        if wrong := [name for name in shards if not re.fullmatch(r"[\w.-]+\.safetensors", name)]:
            raise ModelUnavailable(
                f"{index.name} in {folder} names {', '.join(sorted(wrong))}, and only *.safetensors "
                "beside it are read. Choose another model."
            )
    files = [folder / name for name in ("config.json", "tokenizer_config.json")]
    if any("auto_map" in path.read_text("utf-8") for path in files if path.is_file()) and _needs_code(folder):
        raise ModelUnavailable(
            f"{folder} needs code that came with it (auto_map in its configuration), and that is never run. "
            "Choose a model that transformers knows by itself."
        )
    return folder


def _needs_code(folder: Path) -> bool:
    """Code may also lie beside a model that transformers knows by itself, as with Phi-3; no need then."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError:
        return True
    return config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def check_onnx(folder: Path) -> Path:
    """The folder, if its genai_config.json names only files in it, and nothing that writes or runs others.

    onnxruntime-genai 0.18 hands session options on to ONNX Runtime, unknown ones too: enable_profiling and
    session.optimized_model_filepath write to any path, custom_ops_library loads a library.

    Raises:
        ModelUnavailable: naming the setting.
    """
    config = folder / "genai_config.json"
    for name, value in _settings(_read(config)):
        path = name.endswith("filename") and not stays_inside(str(value))
        option = name.startswith("session_options.") and name.partition(".")[2] not in SESSION_OPTIONS
        if path or option:
            raise ModelUnavailable(
                f"{config} sets {name} to {value!r}, which could reach outside of the folder. "
                "Remove it from the file if the model is your own; otherwise do not use the model."
            )
    return folder


def _read(path: Path) -> dict:
    """A JSON object; a key that comes twice is refused, as other readers would see what is hidden here."""
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=_once)
    except ValueError as error:
        raise ModelUnavailable(f"{path} is not JSON ({error}). Fetch or copy it again.") from None
    return content if isinstance(content, dict) else {}


def _once(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} comes twice in one object")
    return content


def _settings(node: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every setting of a JSON tree with its name, led by its group's where that is session_options."""
    if isinstance(node, list):
        for value in node:
            yield from _settings(value, name)
    elif isinstance(node, dict):
        for key, value in node.items():
            full = f"{name}.{key}" if name == "session_options" else key
            yield full, value
            yield from _settings(value, full)


def check_listing(repo: str, paths: list[str]) -> None:
    """Raise ModelUnavailable if a repository lists files that would be written outside of its folder."""
    if outside := [path for path in paths if not stays_inside(path)]:
        raise ModelUnavailable(
            f"{repo} lists {', '.join(map(repr, outside))}, which would be written outside of its folder. "
            "Nothing was fetched. Do not use it; choose another model."
        )


def stays_inside(name: str) -> bool:
    """Whether a path in a listing cannot leave the folder it is put in, on any system."""
    return bool(name) and not re.search(r"^/|\\|:|\0|(^|/)\.\.(/|$)", name)
