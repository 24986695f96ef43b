"""tiny-phi3 has Phi-3's shape, is the same everywhere, and says the same in both runtimes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.models import tiny_phi3

QUESTIONS = (
    "What is the capital of Spain?",
    "Tell me a joke about atom",
    "Hi",
    "List three colours",
    "Who are you?",
    "1, 2, 3,",
    "Why is the sky blue?",
    "Name a city in France.",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def tokenizer(tiny_phi3_checkpoint: Path):
    return AutoTokenizer.from_pretrained(tiny_phi3_checkpoint)


@pytest.fixture(scope="module")
def onnx_model(tiny_phi3_onnx: Path):
    return og.Model(str(tiny_phi3_onnx))


@pytest.fixture(scope="module")
def onnx_tokenizer(onnx_model):
    return og.Tokenizer(onnx_model)


@pytest.fixture(scope="module")
def answers(tiny_phi3_checkpoint: Path, tokenizer) -> dict[str, list[int]]:
    """Transformers' greedy answer to each question, as token ids."""
    model = AutoModelForCausalLM.from_pretrained(tiny_phi3_checkpoint)
    found = {}
    for question in QUESTIONS:
        inputs = tokenizer(prompt(tokenizer, question), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        found[question] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return found


def prompt(tokenizer, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.command
def test_two_builds_are_identical_to_the_byte(tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    tiny_phi3.build(here)
    subprocess.run([sys.executable, "-m", "helpers.models.tiny_phi3", there], check=True)
    names = sorted(path.name for path in here.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert names == sorted(path.name for path in there.iterdir())
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name


def test_it_is_phi_3_by_configuration_and_special_tokens(tiny_phi3_checkpoint: Path, tokenizer):
    config = json.loads((tiny_phi3_checkpoint / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["Phi3ForCausalLM"]
    assert config["max_position_embeddings"] == 4096
    assert config["vocab_size"] == len(tokenizer) == 512
    # In Phi-3 the chat tokens follow one another from <|endoftext|> (32000) to <|user|> (32010).
    first = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert first == 512 - 11
    assert tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]) == [
        first + 1,
        first + 6,
        first + 7,
        first + 10,
    ]


def test_answers_vary_and_end_for_both_reasons(answers: dict[str, list[int]], tokenizer):
    stops = set(tokenizer.convert_tokens_to_ids(list(tiny_phi3.STOP_TOKENS)))
    ended = [answer[-1] in stops for answer in answers.values()]
    assert any(ended)
    assert not all(ended)
    assert len({tuple(answer) for answer in answers.values()}) == len(QUESTIONS)
    assert all(len(set(answer)) > len(answer) / 2 for answer in answers.values())


def test_onnx_and_transformers_agree_token_for_token(answers, tokenizer, onnx_model, onnx_tokenizer):
    stops = set(tokenizer.convert_tokens_to_ids(list(tiny_phi3.STOP_TOKENS)))
    for question, expected in answers.items():
        ids = onnx_tokenizer.encode(prompt(tokenizer, question))
        params = og.GeneratorParams(onnx_model)
        params.set_search_options(max_length=len(ids) + NEW_TOKENS)
        generator = og.Generator(onnx_model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        found = generator.get_sequence(0)[len(ids) :].tolist()
        # onnxruntime-genai leaves the token that ended the answer out of the sequence.
        assert found == (expected[:-1] if expected[-1] in stops else expected), question


def test_both_tokenizers_render_the_same_chat(tokenizer, onnx_tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello <|you|> {there}"},
        {"role": "assistant", "content": "Hi\n"},
        {"role": "user", "content": "Tschüß 👋"},
    ]
    for header in (True, False):
        assert onnx_tokenizer.apply_chat_template(
            json.dumps(messages), add_generation_prompt=header
        ) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.sampled_from([*tiny_phi3.CHAT_TOKENS, *tiny_phi3.CORPUS.split(" "), " ", "\n", "é🎉"]))
)
def test_both_tokenizers_give_the_same_ids(tokenizer, onnx_tokenizer, pieces: list[str]):
    text = "".join(pieces)
    assert onnx_tokenizer.encode(text).tolist() == tokenizer(text)["input_ids"]


def test_every_text_survives_a_round_trip(tokenizer, onnx_tokenizer):
    text = "Grüße, 你好 🎉\n\tand {json: [1, 2]}"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert onnx_tokenizer.decode(np.array(ids, dtype=np.int32)).lstrip(" ") == text
