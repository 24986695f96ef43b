"""Models whose attention has a sliding window in the graph (Gemma 2), at toy size with random weights."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from helpers.models import catalog, export
from helpers.models.onnx_chat_model import Phi3Model, attention_limits

TOKENS = 8


class Toy:
    """A Gemma 2 with a window of some tokens: its checkpoint, and the wrapper around its ONNX folder."""

    def __init__(self, window: int, context: int, tokenizer: Path, folder: Path):
        words = AutoTokenizer.from_pretrained(tokenizer)
        torch.manual_seed(0)
        config = Gemma2Config(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            query_pre_attn_scalar=32,
            max_position_embeddings=context,
            sliding_window=window,
            attn_implementation="eager",
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        self.reference = Gemma2ForCausalLM(config).float().eval()
        self.reference.save_pretrained(folder)
        words.save_pretrained(folder)
        onnx = export.onnx_folder(catalog.find(str(folder)), "fp32")
        self.wrapper = Phi3Model()
        self.wrapper.load_context(
            SimpleNamespace(artifacts={"phi3-mini-onnx": str(onnx)}, model_config={"threads": 1})
        )

    def expected(self, ids: np.ndarray) -> str:
        """The greedy answer of Transformers."""
        sequence = ids.tolist()
        for _ in range(TOKENS):
            with torch.no_grad():
                logits = self.reference(torch.tensor([sequence]), use_cache=False).logits
            sequence.append(int(logits[0, -1].argmax()))
            if sequence[-1] in self.wrapper.eos:
                break
        # As the wrapper decodes: a character that is not whole at the end is left out.
        stream = self.wrapper.tokenizer.create_stream()
        return "".join(stream.decode(token) for token in sequence[len(ids) :])

    def answers(self, *prompts: np.ndarray) -> list[str]:
        rows = self.wrapper.generate(list(prompts), {"max_new_tokens": TOKENS})
        return [row.result().text for row in rows]


@pytest.fixture(scope="module")
def toy(tiny_phi3_checkpoint, tmp_path_factory):
    """toy(window, context): each is made once."""
    weights, made = tmp_path_factory.mktemp("weights"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEIGHTS_DIR", str(weights))

        def make(window: int, context: int = 512) -> Toy:
            if (window, context) not in made:
                folder = weights / f"gemma2-{window}-{context}"
                made[window, context] = Toy(window, context, tiny_phi3_checkpoint, folder)
            return made[window, context]

        yield make


def prompt(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, 490, length).astype(np.int32)


@pytest.mark.parametrize("window", [16, 64, 512])
@pytest.mark.parametrize("beside", [-63, -40, -TOKENS, -1, 0, 1, 30, 300])
def test_a_prompt_shorter_than_the_window_or_longer_is_answered_as_by_transformers(toy, window, beside):
    model, length = toy(window), window + beside
    if not 0 < length <= 512 - TOKENS:
        pytest.skip("no such prompt")
    assert model.answers(prompt(length)) == [model.expected(prompt(length))]


def test_rows_of_different_lengths_are_answered_as_alone(toy):
    model = toy(64)
    prompts = [prompt(length) for length in (20, 30, 20, 62, 64, 90, 20, 300)]
    assert model.answers(*prompts) == [model.answers(each)[0] for each in prompts]


def test_a_window_larger_than_the_context_is_no_obstacle(toy):
    model = toy(4096)
    assert model.wrapper.context_length == 512
    assert model.answers(prompt(20)) == [model.expected(prompt(20))]
    with pytest.raises(ValueError, match="prompt 0 has 505 tokens; 504 fit"):
        model.answers(prompt(505))


def test_a_batch_counts_the_memory_of_a_whole_window_for_each_row(toy):
    decoder = toy(64).wrapper.decoder
    bound = decoder.max_tokens
    try:
        decoder.max_tokens = 3 * 64
        rows = toy(64).wrapper.generate([prompt(20)] * 4, {"max_new_tokens": TOKENS})
        assert decoder.fits(rows[:3])
        assert not decoder.fits(rows)
        assert len({row.result().text for row in rows}) == 1
    finally:
        decoder.max_tokens = bound


@pytest.mark.parametrize(
    ("window", "limits"),
    [
        ({}, (4096, 0)),
        ({"sliding_window": {"window_size": 2047, "layers": []}}, (2047, 0)),
        ({"sliding_window": {"window_size": 2047}}, (2047, 0)),
        ({"sliding_window": {"window_size": 8192, "layers": []}}, (4096, 0)),
        ({"sliding_window": {"window_size": 512, "layers": [0, 2]}}, (4096, 512)),
    ],
)
def test_what_fits_follows_from_where_the_window_is(window, limits):
    assert attention_limits({"context_length": 4096, "decoder": window}) == limits
