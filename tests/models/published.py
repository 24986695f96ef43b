"""Phi-3-mini's two repositories as Microsoft laid them out in 2024, at toy size and with random weights.

File names, the keys of every configuration, the merges of the tokenizer as text and the external data of the
graph are those of microsoft/Phi-3-mini-4k-instruct and microsoft/Phi-3-mini-4k-instruct-onnx; numbers that
follow from the size are tiny-phi3's. The graph is of today's builder: the one of 2024 could not be tried.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from helpers.models import catalog, tiny_phi3

CHECKPOINT = catalog.CATALOGUE["phi-3-mini"].origin
ONNX = catalog.CATALOGUE["phi-3-mini"].published["int4"]
ONNX_NAME = "phi3-mini-4k-instruct-cpu-int4-rtn-block-32-acc-level-4.onnx"
CODE = b"raise SystemExit('code of a model repository was run')\n"
COMMITS = {CHECKPOINT.repo: CHECKPOINT.revision, ONNX.repo: ONNX.revision}


def checkpoint(tiny: Path) -> dict[str, bytes]:
    """Path → content of the checkpoint's repository: two shards in bfloat16, code and papers beside them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="170KB")
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    config = json.loads(files["config.json"])
    for new in ("dtype", "rope_parameters"):
        config.pop(new, None)
    config |= {
        "_name_or_path": "Phi-3-mini-4k-instruct",
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.2",
    }
    files["config.json"] = as_json(config)
    return files | tokenizer(tiny) | papers() | {"modeling_phi3.py": CODE, "sample_finetune.py": CODE}


def onnx(int4: Path, tiny: Path) -> dict[str, bytes]:
    """Path → content of the ONNX repository: the folder for the CPU; other variants and papers beside it."""
    import onnx as library

    # onnx refuses a data file with several names, which one in weights/ has when a logged model shares it.
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(int4, copy, dirs_exist_ok=True)
        graph = library.load(Path(copy, "model.onnx"))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / ONNX_NAME
        library.save(
            graph, target, save_as_external_data=True, location=f"{ONNX_NAME}.data", size_threshold=0
        )
        variant = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    facts = json.loads((int4 / "genai_config.json").read_text("utf-8"))["model"]
    config = json.loads((tiny / "config.json").read_text("utf-8")) | {"transformers_version": "4.40.2"}
    variant |= tokenizer(tiny) | {
        "genai_config.json": as_json(genai_config(facts)),
        "config.json": as_json(config),
    }
    variant = {name: content for name, content in variant.items() if name != "LICENSE"}
    other = {"genai_config.json": b"{}", "model.onnx": b"graph", "model.onnx.data": b"numbers"}
    folders = {ONNX.folder: variant, "cpu_and_mobile/cpu-int4-rtn-block-32": other}
    folders |= {f"{name}": other for name in ("cuda/cuda-int4-rtn-block-32", "directml/directml-int4-awq")}
    files = {f"{folder}/{name}": data for folder, part in folders.items() for name, data in part.items()}
    return files | papers() | {"config.json": b"{}"}


def genai_config(facts: dict) -> dict:
    """The genai_config.json of 2024, key for key; only what follows from the size is taken from `facts`."""
    decoder = facts["decoder"]
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    names = {
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    session = {"log_id": "onnxruntime-genai", "provider_options": []}
    return {
        "model": {
            "bos_token_id": 1,
            "context_length": 4096,
            "decoder": {
                "session_options": session,
                "filename": ONNX_NAME,
                **names,
                **{size: decoder[size] for size in sizes},
            },
            "eos_token_id": facts["eos_token_id"],
            "pad_token_id": facts["pad_token_id"],
            "type": "phi3",
            "vocab_size": facts["vocab_size"],
        },
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": False,
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": 4096,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def tokenizer(tiny: Path) -> dict[str, bytes]:
    """The tokenizer's files of 2024: the chat template inside tokenizer_config.json, a LlamaTokenizer."""
    content = json.loads((tiny / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # now they are pairs
    added = content["added_tokens"]
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    special |= {"unk_token": "<unk>"}
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {str(token["id"]): {flag: token[flag] for flag in flags} for token in added},
        "chat_template": tiny_phi3.CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 4096,
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
        **special,
    }
    return {
        "tokenizer.json": as_json(content),
        "tokenizer.model": b"sentencepiece's form of tokenizer.json, which nothing here reads",
        "tokenizer_config.json": as_json(config),
        "special_tokens_map.json": as_json(special),
        "added_tokens.json": as_json({token["content"]: token["id"] for token in added}),
        "configuration_phi3.py": CODE,
    }


def papers() -> dict[str, bytes]:
    return {name: name.encode() for name in ("README.md", "LICENSE", "SECURITY.md", ".gitattributes")}


def as_json(content: dict) -> bytes:
    return json.dumps(content, indent=2).encode()
