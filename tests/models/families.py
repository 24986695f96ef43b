"""Random models of many families at toy size, each made by the family's own configuration in Transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

# Width and depth of all; the tokenizer, hence the vocabulary, is SmolLM2's.
SIZE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [1.5] * 16,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
SILENT = "llama that answers nothing"
# What a family needs besides: name → (model_type of Transformers, settings).
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama, 131,072 positions, llama3 rope": (
        "llama",
        {"max_position_embeddings": 131072, "rope_parameters": LLAMA3_ROPE},
    ),
    SILENT: ("llama", {}),
    "mistral": ("mistral", {}),
    "mistral, window of 64": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "granite": ("granite", {}),
    "phi": ("phi", {}),
    "nemotron": ("nemotron", {}),
    "gemma": ("gemma", {"head_dim": 32}),
    # Its window of 4,096 tokens is the default, and so is a context that is longer.
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "max_position_embeddings": 8192},
    ),
    "gemma3_text": ("gemma3_text", {"head_dim": 32, "query_pre_attn_scalar": 32}),
    "smollm3": ("smollm3", {}),
    "phi3, 4,096 positions": ("phi3", {"max_position_embeddings": 4096}),
    "phi3, 2,048 positions": ("phi3", {}),
    "phi3, 131,072 positions, longrope": (
        "phi3",
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_parameters": LONG_ROPE,
        },
    ),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_inner": 256, "n_positions": 2048}),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": (
        "gptj",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_inner": 256, "n_positions": 2048, "rotary_dim": 16},
    ),
    "opt": ("opt", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {}),
    "falcon": ("falcon", {}),
    "cohere": ("cohere", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "mamba": ("mamba", {}),
    "glm4": ("glm4", {"head_dim": 32}),
    "ernie4_5": ("ernie4_5", {"head_dim": 32}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 32}),
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def build(family: str, folder: Path, smollm2: Path, seed: int = 7) -> Path:
    """Write a checkpoint of `family` with random weights into `folder`, with the tokenizer of `smollm2`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = FAMILIES[family]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": 49152}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **SIZE | ids | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if family == SILENT:
        # All tokens are equally likely, so the first is the greedy one, and it ends the answer.
        torch.nn.init.zeros_(model.model.norm.weight)
        model.generation_config.eos_token_id = [0, 2]
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(smollm2 / name, folder)
    return folder
