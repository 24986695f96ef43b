"""Phi-3 at toy size: its architecture, special tokens and chat template, random weights, built in seconds.

It answers nonsense, quickly and always the same, which is what tests need: everything that is true of
Phi-3's shape (and not of its knowledge) can be tried with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

VOCAB_SIZE = 512
CONTEXT_LENGTH = 4096
# With this seed and spread, greedy answers vary with the prompt and some end by themselves.
SEED = 7
WEIGHT_SPREAD = 0.4

# Phi-3-mini-4k-instruct's tokens, in its order; there they are ids 0 to 2 and 32000 to 32010.
CONTROL_TOKENS = ("<unk>", "<s>", "</s>")
CHAT_TOKENS = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
)
STOP_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|end|>")  # as in Phi-3's generation_config.json
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CORPUS = """
What is the capital of Spain? The capital of Spain is Madrid. And of France? Paris.
You are a stand-up comedian. Tell me a joke about an atom. Why did it cross the road? To split.
A small language model becomes an MLflow model: it is logged, registered, loaded again and served to others.
Two notebooks show every step, one with Transformers and one with a custom wrapper around ONNX Runtime.
The quick brown fox jumps over the lazy dog while five boxing wizards look at a bright yellow moon.
Numbers help too: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, and so do marks such as (these), "those", or {any}; right?
How many tokens per second does it make? Write a short list of words that rhyme with the name of the city.
"""


def build(folder: Path | str, seed: int = SEED) -> None:
    """Write a Transformers checkpoint (float32, 512 tokens, 2 layers of width 64) into `folder`.

    The same seed gives the same bytes on the same versions of torch and tokenizers.
    """
    tokenizer = train_tokenizer()
    model = _model(tokenizer, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer():
    """Train a byte-fallback BPE like Phi-3's (which is Llama's) and add Phi-3's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CHAT_TOKENS),
        special_tokens=[*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # Split only while training: no piece spans two words or joins a word with digits or marks. ONNX Runtime's
    # tokenizer never merges across these either, so both give the same ids.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    bpe.train_from_iterator(CORPUS.strip().splitlines(), trainer)
    bpe.pre_tokenizer = None
    bpe = _without_added_bytes(bpe)
    # Phi-3 swallows white space after its chat tokens, hence rstrip.
    bpe.add_special_tokens(
        [AddedToken(t, rstrip=t != "<|endoftext|>", normalized=False) for t in CHAT_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _without_added_bytes(bpe):
    """The trainer marks the byte tokens as special, and decoders skip special tokens: make them ordinary."""
    from tokenizers import Tokenizer

    description = json.loads(bpe.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] in CONTROL_TOKENS]
    return Tokenizer.from_str(json.dumps(description))


def _model(tokenizer, seed: int):
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    stop_ids = tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    config = Phi3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        original_max_position_embeddings=CONTEXT_LENGTH,
        sliding_window=2047,  # as published for the 4k model
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=WEIGHT_SPREAD,
        tie_word_embeddings=False,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Phi3ForCausalLM(config)
    with torch.no_grad():  # no byte token is ever the likeliest, so greedy answers are whole characters
        model.lm_head.weight[len(CONTROL_TOKENS) : len(CONTROL_TOKENS) + 256] = 0
    model.generation_config.eos_token_id = stop_ids
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


if __name__ == "__main__":
    build(sys.argv[1])
