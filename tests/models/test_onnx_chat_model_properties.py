"""What holds for every input: row order, batch equals single, stream equals predict, stop texts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.models.onnx_chat_model import Phi3Model

SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WORDS = st.sampled_from(
    ["a", "the", "Spain ", "\n", "é", "🎉", "<|user|>", "<|end|>", "quick fox ", "0", " "]
)
PROMPT = st.lists(WORDS, min_size=1, max_size=40).map("".join)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@pytest.fixture(scope="module")
def tiny(tiny_phi3_onnx) -> Phi3Model:
    model = Phi3Model()
    config = {"threads": 1, "max_batch_rows": 4}
    model.load_context(
        SimpleNamespace(artifacts={"phi3-mini-onnx": str(tiny_phi3_onnx)}, model_config=config)
    )
    return model


@SETTINGS
@given(prompts=st.lists(PROMPT, max_size=10), tokens=st.integers(1, 40), penalty=st.sampled_from([1.0, 1.3]))
def test_rows_come_back_in_order_and_as_they_would_alone(tiny, prompts, tokens, penalty):
    params = {"max_new_tokens": tokens, "repetition_penalty": penalty}
    alone = [tiny.predict(None, {"prompt": prompt}, params)[0] for prompt in prompts]
    assert tiny.predict(None, {"prompt": prompts}, params) == alone


@SETTINGS
@given(
    prompts=st.lists(PROMPT, min_size=1, max_size=6),
    limits=st.lists(st.integers(1, 30), min_size=6, max_size=6),
)
def test_callers_with_different_limits_do_not_change_each_other(tiny, prompts, limits):
    calls = list(zip(prompts, limits, strict=False))
    alone = [tiny.predict(None, {"prompt": prompt}, {"max_new_tokens": limit})[0] for prompt, limit in calls]
    rows = [row for prompt, limit in calls for row in tiny.generate([prompt], {"max_new_tokens": limit})]
    assert [row.result().text for row in rows] == alone
    assert all(row.completion_tokens <= limit for row, (_, limit) in zip(rows, calls, strict=True))


@SETTINGS
@given(
    prompt=PROMPT,
    params=st.fixed_dictionaries(
        {"max_new_tokens": st.integers(1, 60), "seed": st.integers(0, 2**31 - 1)},
        optional={
            "temperature": st.floats(0, 3),
            "top_p": st.floats(0, 1),
            "top_k": st.integers(0, 600),
            "stop": st.lists(st.text("aeist ", max_size=3), max_size=3),
        },
    ),
)
def test_the_pieces_of_a_stream_are_the_answer(tiny, prompt, params):
    pieces = list(tiny.predict_stream(None, {"prompt": prompt}, params))
    assert ["".join(pieces)] == tiny.predict(None, {"prompt": prompt}, params)
    assert all(pieces)
    assert "\ufffd" not in "".join(pieces)


@SETTINGS
@given(prompts=st.lists(PROMPT, min_size=1, max_size=5), data=st.data())
def test_an_answer_ends_before_the_stop_text_that_is_complete_first(tiny, prompts, data):
    params = {"max_new_tokens": 40}
    whole = tiny.predict(None, {"prompt": prompts}, params)
    said = "".join(whole) or "-"
    parts = st.tuples(st.integers(0, len(said) - 1), st.integers(1, 5)).map(lambda at: said[at[0] : sum(at)])
    stop = data.draw(st.lists(parts | st.text("aei", max_size=2), min_size=1, max_size=3))

    def cut(text: str) -> str:
        ends = [(text.index(end) + len(end), text.index(end)) for end in stop if end and end in text]
        return text[: min(ends)[1]] if ends else text

    assert tiny.predict(None, {"prompt": prompts}, params | {"stop": stop}) == [cut(text) for text in whole]


@SETTINGS
@given(contents=st.lists(st.lists(WORDS | TEXT, max_size=8).map("".join), min_size=1, max_size=3))
def test_no_content_makes_a_special_token(tiny, contents):
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("system", "user", "user"), contents, strict=False)
    ]
    ids = tiny.encode_messages(messages)
    empty = tiny.encode_messages([message | {"content": "x"} for message in messages])
    assert control(tiny, ids) == control(tiny, empty)


def control(model: Phi3Model, ids: np.ndarray) -> list[int]:
    """Those ids that are special tokens."""
    names = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    special = {int(model.tokenizer.encode(name)[-1]) for name in names}
    return [token for token in ids.tolist() if token in special]


@SETTINGS
@given(text=TEXT)
def test_every_text_can_be_a_prompt_or_is_refused_by_name(tiny, text):
    if text:
        assert len(tiny.predict(None, {"prompt": text}, {"max_new_tokens": 2})) == 1
    else:
        with pytest.raises(ValueError, match="prompt 0 is empty"):
            tiny.predict(None, {"prompt": text})


@SETTINGS
@given(
    schema=st.sampled_from([{"type": "integer"}, {"enum": ["yes", "no"]}, {"type": "array", "maxItems": 2}]),
    prompt=PROMPT,
)
def test_a_constrained_answer_that_ended_by_itself_is_json(tiny, schema, prompt):
    row = tiny.generate([prompt], {"json_schema": json.dumps(schema), "max_new_tokens": 60})[0].result()
    if row.finish_reason == "stop":
        json.loads(row.text)
