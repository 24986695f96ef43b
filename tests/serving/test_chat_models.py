"""What can be served as chat, and the Transformers flavour as it is served."""

import httpx
import mlflow
import openai
import pytest
from serving_support import COUNT, HOSTILE, QUESTION, body, running, with_system
from support import connected

from helpers.models.onnx_chat_model import first_stop, possible_stop
from helpers.serving import chat_models

pytestmark = pytest.mark.server

ECHO = """
import mlflow

class Echo(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str]) -> list[str]: return model_input

mlflow.models.set_model(Echo())
"""


def test_a_model_that_cannot_chat_is_refused_by_name(register_python_model, store, tmp_path):
    (tmp_path / "echo.py").write_text(ECHO, encoding="utf-8")
    uri = register_python_model("echo", tmp_path / "echo.py")
    with connected(store), pytest.raises(ValueError, match=f"^{uri} has no generate and encode_messages"):
        chat_models.load(uri)


def test_a_models_version_is_known_however_it_was_asked_for(tiny_uri, store):
    with connected(store):
        for uri in (tiny_uri, "models:/slm-onnx/latest", "models:/slm-onnx/1"):
            assert chat_models.load(uri)[0].full_name == "slm-onnx/1"


@pytest.mark.parametrize(
    ("text", "stops", "shown", "kept_back", "stopped"),
    [
        ("one, two", [], "one, two", "", False),
        ("one, two", ["to", "tw"], "one, ", "", True),
        ("one, t", ["to", "tw"], "one, ", "t", False),
        ("aab", ["abc", "b"], "aa", "", True),
    ],
)
def test_a_beginning_of_a_stop_text_is_kept_back(text, stops, shown, kept_back, stopped):
    stop = first_stop(text, stops)
    assert (stop is not None) == stopped
    ready = stop if stopped else possible_stop(text, stops)
    assert text[:ready] == shown
    if not stopped:
        assert text[ready:] == kept_back


# ---- the Transformers flavour, served ----


@pytest.fixture(scope="module")
def served(transformers_uri, store, tmp_path_factory):
    with running(transformers_uri, store, tmp_path_factory.mktemp("log")) as server:
        yield server


def test_a_pipeline_is_served_with_the_same_answer_as_onnx(served, tiny_uri, store):
    with connected(store):
        onnx = mlflow.pyfunc.load_model(tiny_uri).unwrap_python_model()
    asked = with_system(QUESTION)
    expected = onnx.generate([onnx.encode_messages(asked)], {"max_new_tokens": 30})[0].result()
    answer = served.ask(asked, max_tokens=30)
    # The tokenizers differ in a leading space.
    assert answer.choices[0].message.content.strip() == expected.text.strip()
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == expected.completion_tokens


def test_a_pipeline_streams_and_uses_its_logged_configuration(served):
    whole = served.ask()
    chunks = list(served.ask(stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 20
    assert len(chunks) > 3


def test_a_pipeline_follows_stop_texts_and_seeds(served):
    text = served.ask(max_tokens=40).choices[0].message.content
    stopped = served.ask(max_tokens=40, stop=text[9:12]).choices[0]
    assert stopped.message.content == text[: text.index(text[9:12])]
    assert stopped.finish_reason == "stop"
    samples = [served.ask(temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


def test_a_pipeline_says_what_it_cannot_do(served):
    with pytest.raises(openai.BadRequestError, match="response_format needs the ONNX model"):
        served.ask(response_format={"type": "json_object"})
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        served.ask(max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"


def test_a_pipelines_work_stops_with_its_client(served):
    """Abandoned answers count their tokens when they end: far fewer than asked for."""
    asked = body(model="slm-transformers", messages=COUNT, max_tokens=1000)
    before = served.metric("chat_completion_tokens_total")
    stream = served.ask(COUNT, max_tokens=1000, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    with pytest.raises(httpx.ReadTimeout):  # In the queue behind it.
        httpx.post(f"{served.url}/v1/chat/completions", json=asked, timeout=0.3)
    stream.close()
    served.wait_until_idle()
    assert served.ask(max_tokens=3).usage.completion_tokens == 3
    assert before < served.metric("chat_completion_tokens_total") < before + 600


# ---- the Transformers flavour, in this process ----


@pytest.fixture(scope="module")
def pipeline(transformers_uri, store) -> chat_models.PipelineChat:
    with connected(store):
        return chat_models.load(transformers_uri)[1].__self__


def test_one_pipeline_answers_concurrent_callers_in_turn(pipeline):
    answers = [pipeline.start(QUESTION, {"max_new_tokens": 20}) for _ in range(4)]
    for number, answer in enumerate(answers):
        next(iter(answer))
        assert all(earlier.finish_reason == "length" for earlier in answers[:number])
    assert answers[0].completion_tokens == 20


def test_a_closed_answer_of_a_pipeline_says_so_whether_it_had_its_turn_or_not(pipeline):
    answers = [pipeline.start(COUNT, {"max_new_tokens": 1000}) for _ in range(2)]
    pieces = iter(answers[0])
    next(pieces)
    for answer in answers:
        answer.close()
    list(pieces)
    assert list(answers[1]) == [""]
    assert [answer.finish_reason for answer in answers] == ["closed", "closed"]
    assert answers[0].completion_tokens < 600
    assert answers[1].completion_tokens == 0


def test_an_answer_that_fails_raises_what_decoding_raised(pipeline):
    answer = pipeline.start(QUESTION, {"repetition_penalty": -1.0})
    with pytest.raises(ValueError, match="penalty"):
        list(answer)


def test_a_pipeline_keeps_special_tokens_in_contents_apart(pipeline):
    plain = with_system([{"role": "user", "content": "Hi\n\nObey.\n\nHi"}])
    extra = len(pipeline.encode_messages(with_system(HOSTILE))) - len(pipeline.encode_messages(plain))
    assert extra > 10  # As text, each of the four takes several tokens.


def test_messages_that_the_models_template_refuses_are_the_callers_mistake(pipeline, monkeypatch):
    refusing = "{{ raise_exception('Conversation roles must alternate.') }}"
    monkeypatch.setattr(pipeline.tokenizer, "chat_template", refusing)
    refusal = r"template refuses these messages: Conversation roles must alternate\.$"
    with pytest.raises(ValueError, match=refusal):
        pipeline.start(QUESTION, {})
