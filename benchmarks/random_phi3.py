"""A checkpoint with Phi-3's architecture, tokens and chat template at any size, its weights drawn at random.

What holds for a model's shape (disk, memory, speed, formats) can be tried with it; its answers mean nothing.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from helpers.models import tiny_phi3

SEED = 7
SHARD_BYTES = 10**9  # no more than this is in memory at once


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Phi-3 model: `tokens` has the tokenizer, `vocabulary` rows the first and last matrix."""

    name: str
    tokens: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    spread: float  # standard deviation of the weights

    @property
    def parameters(self) -> int:
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return 2 * self.vocabulary * self.hidden + self.layers * layer + self.hidden

    @property
    def checkpoint_bytes(self) -> int:
        return 2 * self.parameters  # bfloat16

    @property
    def onnx_bytes(self) -> int:
        """int4 in blocks of 32 with a float32 scale each; the first matrix stays float32."""
        embedding = self.vocabulary * self.hidden
        return 4 * embedding + (self.parameters - embedding) * (4 + 32 // 32) // 8

    def with_layers(self, layers: int) -> "Geometry":
        return replace(self, name=f"{self.name}, {layers} of {self.layers} layers", layers=layers)


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        # config.json of microsoft/Phi-3-mini-4k-instruct: 3,821,079,552 parameters
        Geometry("phi-3-mini", 32011, 32064, 3072, 8192, 32, 32, 0.02),
        Geometry("tiny", 512, 576, 64, 128, 2, 4, 0.4),
    )
}


def write(folder: Path, geometry: Geometry) -> None:
    """Write config, tokenizer and bfloat16 weights in shards, of which one at a time is in memory."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import Phi3ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(geometry)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):  # names and shapes without memory
        model = Phi3ForCausalLM(_config(tokenizer, geometry)).to(torch.bfloat16)
    assert model.num_parameters() == geometry.parameters, model.num_parameters()
    model.config.save_pretrained(folder)
    model.generation_config.eos_token_id = _stop_ids(tokenizer)
    model.generation_config.save_pretrained(folder)
    shapes = model.state_dict()
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD_BYTES)
    torch.manual_seed(SEED)
    never = _never_said(tokenizer, geometry)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: _weights(name, shapes[name].shape, geometry.spread, never) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _weights(name: str, shape, spread: float, never):
    import torch

    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    weights = torch.empty(shape, dtype=torch.bfloat16).normal_(0, spread)
    if name == "lm_head.weight":
        weights[never] = 0
    return weights


def _never_said(tokenizer, geometry: Geometry) -> list[int]:
    """Ids that a greedy answer must not hold: bytes (half characters), ends, and rows without a token."""
    control = len(tiny_phi3.CONTROL_TOKENS)
    chat = tokenizer.convert_tokens_to_ids(list(tiny_phi3.CHAT_TOKENS))
    return [*range(control + 256), *chat, *range(geometry.tokens, geometry.vocabulary)]


def _stop_ids(tokenizer) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(tiny_phi3.STOP_TOKENS))


def _tokenizer(geometry: Geometry):
    """tiny-phi3's tokenizer, filled up with words that no text is split into, but that decode."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = tiny_phi3.train_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    chat = [token for token in described["added_tokens"] if token["content"] in tiny_phi3.CHAT_TOKENS]
    described["added_tokens"] = [token for token in described["added_tokens"] if token not in chat]
    words = described["model"]["vocab"]
    for number in range(len(words), geometry.tokens - len(chat)):
        words[f"▁w{number}"] = number
    larger = Tokenizer.from_str(json.dumps(described))
    for token in chat:
        rstrip = token["rstrip"]
        larger.add_special_tokens([AddedToken(token["content"], rstrip=rstrip, normalized=False)])
    tokenizer._tokenizer = larger
    assert len(tokenizer) == geometry.tokens, len(tokenizer)
    return tokenizer


def _config(tokenizer, geometry: Geometry):
    from transformers import Phi3Config

    return Phi3Config(
        architectures=["Phi3ForCausalLM"],
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.intermediate,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.heads,
        max_position_embeddings=tiny_phi3.CONTEXT_LENGTH,
        original_max_position_embeddings=tiny_phi3.CONTEXT_LENGTH,
        sliding_window=2047,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def read(text: str) -> Geometry:
    """The geometry that `dump` wrote."""
    return Geometry(**json.loads(text))


def dump(geometry: Geometry) -> str:
    return json.dumps(asdict(geometry))
