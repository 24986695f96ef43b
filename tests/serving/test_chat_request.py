"""What a chat request may say; what it may not is refused by name."""

import codecs
import inspect
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.resources.chat.completions import Completions
from serving_support import body

from helpers.models import onnx_chat_model
from helpers.serving.chat_request import ApiError, ChatRequest, parse

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
# What the fields of OpenAI's client may hold without asking for anything that this server has not.
NEUTRAL = {
    "frequency_penalty": [0, 0.0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "logprobs": [False],
    "metadata": [{}, {"team": "sales"}],
    "modalities": [["text"]],
    "n": [1],
    "parallel_tool_calls": [True, False],
    "presence_penalty": [0],
    "prompt_cache_key": ["chats"],
    "prompt_cache_options": [{"mode": "implicit"}],
    "prompt_cache_retention": ["in_memory", "24h"],
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "safety_identifier": ["5f3a"],
    "service_tier": ["auto", "default"],
    "stop": [[]],
    "store": [True, False],
    "stream": [False],
    "stream_options": [{}, {"include_usage": None}, {"include_usage": False}],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
    "user": ["anna"],
    "verbosity": ["medium"],
}
ASKING = {
    "audio": [{"voice": "alloy", "format": "mp3"}],
    "frequency_penalty": [0.1, -0.1],
    "function_call": [{"name": "weather"}],
    "functions": [[{"name": "weather"}]],
    "logit_bias": [{"50256": -100}],
    "logprobs": [True],
    "modalities": [["text", "audio"]],
    "moderation": [{"model": "omni-moderation-latest"}],
    "n": [0, 2, True],
    "prediction": [{"type": "content", "content": "Madrid"}],
    "presence_penalty": [2],
    "reasoning_effort": ["low"],
    "tool_choice": ["required", {"type": "function", "function": {"name": "weather"}}],
    "tools": [[TOOL]],
    "top_logprobs": [1],
    "verbosity": ["low"],
    "web_search_options": [{}],
}
OF_THE_CLIENT = set(inspect.signature(Completions.create).parameters) - {
    *("self", "model", "messages", "timeout", "extra_headers", "extra_query", "extra_body")
}


def encoded(**changes) -> bytes:
    return json.dumps(body(**changes)).encode()


def said(content: object) -> list[dict]:
    return [{"role": "user", "content": content}]


def test_a_value_that_asks_for_nothing_changes_nothing():
    neutral = [(name, value) for name, values in NEUTRAL.items() for value in values]
    for name, value in [*neutral, *((name, None) for name in OF_THE_CLIENT)]:
        expected = {"max_new_tokens": 4} if (name, value) != ("max_tokens", None) else {}
        asked = parse(encoded(**{name: value})).params()
        assert {other: given for other, given in asked.items() if given != []} == expected, name


def test_a_value_that_asks_for_what_cannot_be_done_is_refused_by_name():
    for name, value in [(name, value) for name, values in ASKING.items() for value in values]:
        with pytest.raises(ApiError, match=rf"^{name} is not supported by this server.*\.$") as caught:
            parse(encoded(**{name: value}))
        assert (caught.value.status, caught.value.param) == (400, name)


def test_every_field_of_the_client_is_known():
    assert NEUTRAL.keys() | ASKING.keys() | ChatRequest.model_fields.keys() >= OF_THE_CLIENT


def test_what_an_earlier_answer_held_is_accepted_in_its_turn():
    turn = {"role": "assistant", "content": "Hi.", "refusal": None, "tool_calls": None, "annotations": []}
    assert parse(encoded(messages=[turn])).messages[0].plain() == {"role": "assistant", "content": "Hi."}


# Body, parameter in the error, words of the error.
MISTAKES = {
    "five stop texts": (encoded(stop=list("abcde")), "stop", "at most 4 items"),
    "an empty stop text": (encoded(stop=""), "stop.0", "at least 1 character"),
    "a stop number": (encoded(stop=5), "stop", "a text or a list"),
    "a stop number in a list": (encoded(stop=["a", 5]), "stop.1", "a valid string"),
    "a number as content": (encoded(messages=said(5)), "messages.0.content", "a text or a list"),
    "no content": (encoded(messages=said(None)), "messages.0.content", "a text or a list"),
    "a part that is a text": (encoded(messages=said(["a"])), "messages.0.content.0", "an object"),
    "a part without text": (
        encoded(messages=said([{"type": "text"}])),
        "messages.0.content.0.text",
        "required",
    ),
    "an image": (
        encoded(messages=said([{"type": "image_url", "image_url": {"url": "data:"}}])),
        "messages.0.content.0.type",
        "'image_url' is not supported by this server",
    ),
    "a tool's turn": (
        encoded(messages=[{"role": "tool", "content": "18 °C", "tool_call_id": "1"}]),
        "messages.0.role",
        "'tool' is not supported by this server",
    ),
    "a name": (
        encoded(messages=[{"role": "user", "content": "Hello", "name": "Anna"}]),
        "messages.0.name",
        "messages.0.name is not supported by this server",
    ),
    "messages in a text": (encoded(messages="Hello"), "messages", "a valid array"),
    "a turn in a text": (encoded(messages=["Hello"]), "messages.0", "an object"),
    "no turn": (encoded(messages=[]), "messages", "at least 1 item"),
    "no messages": (b'{"model": "slm-onnx"}', "messages", "required"),
    "a format in a text": (encoded(response_format="text"), "response_format", "an object"),
    "a number in a text": (encoded(temperature="hot"), "temperature", "a valid number"),
    "true as a number": (encoded(max_tokens=True), "max_tokens", "a valid integer"),
    "too hot": (encoded(temperature=2.5), "temperature", "less than or equal to 2"),
    "no tokens": (encoded(max_tokens=0), "max_tokens", "greater than or equal to 1"),
    "a huge seed": (encoded(seed=2**70), "seed", "less than 9223372036854775808"),
    "NaN": (encoded(temperature=float("nan")), "temperature", "a finite number"),
    "no body": (b"", None, "not valid JSON"),
    "no JSON": (b"{", None, "not valid JSON"),
    "no UTF-8": (b'{"model": "\xff"}', None, "not valid JSON: 'utf-8' codec can't decode"),
    "UTF-16": (encoded().decode().encode("utf-16"), None, "not valid JSON: 'utf-8' codec"),
    "half a surrogate pair": (b'{"model": "\\ud800"}', None, "not valid JSON"),
    "deep nesting": (b"[" * 10_000, None, "not valid JSON"),
    "a list": (b"[]", None, "not a JSON object"),
}


@pytest.mark.parametrize(("bad", "param", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_as_what_it_is(bad, param, says):
    with pytest.raises(ApiError) as caught:
        parse(bad)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert says in str(caught.value)
    assert not any(word in str(caught.value) for word in ("constrained", "TextPart", "Message", "dictionary"))


def test_a_schema_that_is_missing_is_named():
    with pytest.raises(ApiError, match=r"response_format\.json_schema is missing\."):
        parse(encoded(response_format={"type": "json_schema"})).params()


def test_a_byte_order_mark_is_no_mistake():
    assert parse(codecs.BOM_UTF8 + encoded()).max_tokens == 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*ChatRequest.model_fields, "n", "tools", "role", "content", "type", "schema"])


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(FIELDS, JSON | st.dictionaries(FIELDS, JSON) | st.lists(st.dictionaries(FIELDS, JSON)))
)
def test_whatever_json_a_body_holds_it_is_a_request_or_a_refusal(fields):
    def names_or_status() -> set | int:
        try:
            return set(parse(json.dumps(fields).encode()).params())
        except ApiError as error:
            return error.status

    outcome = names_or_status()
    assert outcome <= set(onnx_chat_model.DEFAULT_PARAMS) if isinstance(outcome, set) else outcome == 400
