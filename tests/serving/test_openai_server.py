"""The OpenAI endpoint, as the official client and as hostile clients see it: real servers, real models."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import mlflow
import openai
import pytest
from serving_support import (
    CAPITAL,
    COUNT,
    ENDLESS,
    HOSTILE,
    QUESTION,
    Server,
    body,
    find_trace,
    is_openai_error,
    reply_on,
    running,
    with_system,
)
from support import connected, eventually

from helpers import processes
from helpers.models import onnx_chat_model
from helpers.processes import free_port
from helpers.serving.openai_server import API_KEY, serve

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def tiny(tiny_uri, store, tmp_path_factory):
    with running(tiny_uri, store, tmp_path_factory.mktemp("log")) as server:
        yield server


@pytest.fixture(scope="module")
def keyed(smollm2_uri, store, tmp_path_factory):
    """With a key from the environment, every call traced, and place for two requests."""
    options = {"environment": {API_KEY: "secret"}, "trace_sampling": 1.0, "max_queue": 2}
    with running(smollm2_uri, store, tmp_path_factory.mktemp("log"), **options) as server:
        server.key = "secret"
        yield server


@pytest.fixture(scope="module")
def wrapper(tiny_uri, store):
    """The served model in this process."""
    with connected(store):
        return mlflow.pyfunc.load_model(tiny_uri).unwrap_python_model()


# ---- answers ----


@pytest.mark.key
def test_an_answer_is_the_models_own_with_its_usage(tiny, wrapper):
    answer = tiny.ask(max_tokens=200)
    expected = wrapper.generate([wrapper.encode_messages(with_system(QUESTION))], {"max_new_tokens": 200})[0]
    assert answer.choices[0].message.content == expected.result().text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == expected.completion_tokens
    assert answer.usage.total_tokens == expected.prompt_tokens + expected.completion_tokens
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "slm-onnx"


@pytest.mark.key
def test_a_stream_is_the_same_answer_in_pieces(tiny):
    whole = tiny.ask(max_tokens=50)
    chunks = list(tiny.ask(max_tokens=50, stream=True, stream_options={"include_usage": True}))
    *pieces, usage = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == whole.choices[0].message.content
    assert len(pieces) > 10
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.choices == []
    assert usage.usage == whole.usage


def test_usage_is_streamed_only_where_it_was_asked_for(tiny):
    chunks = list(tiny.ask(max_tokens=4, stream=True))
    assert [chunk for chunk in chunks if chunk.usage or not chunk.choices] == []


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_that_is_cut_short_says_so(tiny, name):
    answer = tiny.ask(**{name: 3})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


@pytest.mark.key
def test_an_answer_ends_before_a_stop_text(tiny):
    text = tiny.ask(max_tokens=50).choices[0].message.content
    stop = text[10:13]
    whole = tiny.ask(max_tokens=50, stop=stop).choices[0]
    assert (whole.message.content, whole.finish_reason) == (text[: text.index(stop)], "stop")
    chunks = list(tiny.ask(max_tokens=50, stop=["never said", stop], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_sampling_follows_the_seed(tiny):
    def sample(seed):
        answer = tiny.ask(max_tokens=30, temperature=1.0, top_p=0.9, seed=seed)
        return answer.choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(5)}) > 1


@pytest.mark.key
def test_an_answer_fits_the_schema_it_was_asked_to_fit(tiny):
    schema = {"type": "object", "properties": {"city": {"enum": ["Madrid", "Paris"]}}, "required": ["city"]}
    schema["additionalProperties"] = False
    named = {"name": "city", "schema": schema, "strict": True}
    answer = tiny.ask(max_tokens=50, response_format={"type": "json_schema", "json_schema": named})
    assert json.loads(answer.choices[0].message.content)["city"] in ("Madrid", "Paris")
    assert answer.choices[0].finish_reason == "stop"


def test_turns_parts_and_the_developer_role_reach_the_template(tiny, wrapper):
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a joke."}]
    answer = tiny.ask(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": parts},
        ],
        max_tokens=20,
    )
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "Tell me a joke.")]
    ids = wrapper.encode_messages([{"role": role, "content": content} for role, content in turns])
    expected = wrapper.generate([ids], {"max_new_tokens": 20})[0].result()
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == len(ids)


def test_the_models_system_message_yields_to_the_callers(tiny, wrapper):
    asked = [{"role": "system", "content": ""}, *QUESTION]
    assert tiny.ask(asked, max_tokens=1).usage.prompt_tokens == len(wrapper.encode_messages(asked))
    assert tiny.ask(max_tokens=1).usage.prompt_tokens == len(wrapper.encode_messages(with_system(QUESTION)))


def test_special_tokens_in_a_content_open_no_turn(tiny, wrapper):
    as_turns = wrapper.tokenizer.encode(wrapper.apply_chat_template(with_system(HOSTILE)))
    usage = tiny.ask(HOSTILE, max_tokens=1).usage
    assert usage.prompt_tokens == len(wrapper.encode_messages(with_system(HOSTILE)))
    assert usage.prompt_tokens > len(as_turns)


@pytest.mark.key
def test_concurrent_callers_get_each_their_own_answer(tiny):
    questions = [[{"role": "user", "content": f"Count to {n}."}] for n in range(16)]

    def ask(messages):
        return tiny.ask(messages, max_tokens=40).choices[0].message.content

    alone = [ask(messages) for messages in questions]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, questions)) == alone
    assert len(set(alone)) > 8


LOGGING_WRAPPER = """

class Logged(Decoder):
    def decode(self, rows):
        with open({log!r}, "a") as log:
            print(len(rows), file=log)
        return super().decode(rows)


Decoder = Logged
"""


def test_concurrent_requests_share_batches(register_python_model, tiny_phi3_onnx, store, tmp_path):
    code, log = tmp_path / "logging_wrapper.py", tmp_path / "batches.log"
    wrapper = Path(onnx_chat_model.__file__).read_text("utf-8")
    code.write_text(wrapper + LOGGING_WRAPPER.format(log=str(log)), encoding="utf-8")
    folder = {"phi3-mini-onnx": str(tiny_phi3_onnx)}
    uri = register_python_model("logged", code, artifacts=folder)
    with running(uri, store, tmp_path) as server, ThreadPoolExecutor(8) as pool:
        asked = body(model="logged", messages=COUNT, max_tokens=1000)
        replies = list(pool.map(server.post, [asked] * 8))
    assert [reply.status_code for reply in replies] == [200] * 8
    rows = [int(line) for line in log.read_text("utf-8").split()]
    assert sum(rows) == 8
    assert max(rows) > 1


# ---- what is refused, and how ----


@pytest.mark.key
def test_what_is_not_supported_is_refused_by_name(tiny):
    with pytest.raises(openai.BadRequestError, match="n is not supported by this server") as caught:
        tiny.ask(n=2)
    assert caught.value.param == "n"
    assert caught.value.request_id.startswith("req_")


@pytest.mark.key
def test_options_that_ask_for_nothing_are_accepted(tiny):
    neutral = {"n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "anna"}
    neutral |= {"tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"], "tools": []}
    assert tiny.ask(max_tokens=1, **neutral).choices[0].finish_reason == "length"


BAD_BODIES = {
    "no JSON": b"{",
    "a NUL character": body(messages=[{"role": "user", "content": "a\0b"}]),
    "an impossible schema": body(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "bogus"}}}
    ),
    "a prompt over the context": body(messages=[{"role": "user", "content": "joke " * 9000}]),
}


@pytest.mark.key
@pytest.mark.parametrize("bad", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_request_is_a_400_in_openais_shape_and_in_the_log_under_its_id(tiny, bad):
    reply = tiny.post(bad)
    assert is_openai_error(reply, 400)
    assert f"{reply.headers['x-request-id']} 400 " in tiny.log.read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "max_tokens", "stream"),
    [("joke " * 9000, 5, False), ("Hello", 4096, False), ("Hello", 10**9, True)],
)
def test_a_request_over_the_context_is_refused_as_openai_does(tiny, text, max_tokens, stream):
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is \d+ tokens") as caught:
        tiny.ask([{"role": "user", "content": text}], stream=stream, max_tokens=max_tokens)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert "max_tokens" in str(caught.value)
    assert not any(word in str(caught.value) for word in ("max_new_tokens", "prompt 0"))


@pytest.mark.key
def test_other_mistakes_have_their_own_status(tiny):
    assert is_openai_error(tiny.post(body(model="gpt-5")), 404)
    assert is_openai_error(tiny.post(b" " * 1_000_001), 413)
    wrong_method = httpx.get(f"{tiny.url}/v1/chat/completions")
    assert is_openai_error(wrong_method, 405)
    assert wrong_method.headers["allow"] == "POST"
    assert is_openai_error(tiny.post(body(), **{"Content-Type": "text/plain"}), 415)
    assert is_openai_error(httpx.get(f"{tiny.url}/docs"), 404)
    with pytest.raises(openai.NotFoundError):
        tiny.client().models.retrieve("gpt-5")


# ---- bodies that are too long, or do not come ----


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("header", ["X-Nothing: 1", "Expect:", "Transfer-Encoding: chunked"])
def test_curl_shows_why_a_long_body_is_refused(tiny, keyed, header):
    command = ["curl", "--silent", "--show-error", "--data-binary", "@-", "--header", header]
    command += ["--header", "Content-Type: application/json"]
    for server, says in ((tiny, "is longer than 1000000 bytes"), (keyed, "API key is missing or wrong")):
        url = f"{server.url}/v1/chat/completions"
        sent = subprocess.run([*command, url], input=bytes(30_000_000), capture_output=True, check=True)
        assert says in json.loads(sent.stdout)["error"]["message"]


def test_openais_client_shows_why_a_long_body_is_refused(tiny):
    with pytest.raises(openai.APIStatusError, match="is longer than 1000000 bytes") as caught:
        tiny.ask([{"role": "user", "content": "a" * 30_000_000}])
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/chat/completions", {}, 413),
        ("/v1/chat/completions", {"Authorization": "Bearer wrong"}, 401),
        ("/v1/chat/completions", {"Content-Type": "text/plain"}, 415),
        ("/nowhere", {}, 404),
        ("/v1/models", {}, 405),
    ],
)
def test_a_client_that_closes_after_one_answer_gets_it_while_it_still_sends(keyed, path, headers, status):
    """Python's own client says `Connection: close`, and reads only when all is sent."""
    known = {"Content-Type": "application/json", "Authorization": f"Bearer {keyed.key}"}
    asked = urllib.request.Request(f"{keyed.url}{path}", bytes(30_000_000), known | headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(asked, timeout=60)
    with caught.value:
        assert caught.value.status == status


def send_until_cut_off(connection: socket.socket, piece: bytes, pause: float, most: int) -> int:
    """How many bytes the server took before it closed the connection."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < most:
            sent += connection.send(piece)
            time.sleep(pause)
    return sent


def test_who_sends_slowly_gets_an_answer_and_no_more_time(tiny):
    def send(length: int) -> tuple[int, httpx.Response]:
        with closing(tiny.connect(b"{", length)) as connection:
            return send_until_cut_off(connection, bytes(10), 0.1, most=20_000), reply_on(connection)

    with ThreadPoolExecutor(2) as pool:
        (long, refused), (short, late) = pool.map(send, [30_000_000, 30_000])
    assert max(long, short) < 20_000
    assert is_openai_error(refused, 413)
    assert is_openai_error(late, 408)


def test_a_body_without_an_end_is_cut_off(tiny):
    with closing(tiny.connect(b"{", length=10**12)) as connection:
        assert send_until_cut_off(connection, bytes(1_000_000), 0, most=10**9) < 10**9


def test_a_client_that_goes_while_it_sends_is_counted_and_logged(tiny):
    gone = tiny.metric('chat_requests_total{status="499"}')
    tiny.connect(b"{", length=100).close()
    assert eventually(lambda: tiny.metric('chat_requests_total{status="499"}') == gone + 1)
    assert "499 'The client has gone.'" in tiny.log.read_text("utf-8")


def test_the_server_is_well_after_all_that(tiny):
    assert httpx.get(f"{tiny.url}/health").json() == {"status": "ok"}
    assert [model.id for model in tiny.client().models.list()] == ["slm-onnx"]
    assert tiny.client().models.retrieve("slm-onnx").owned_by == "mlflow"


# ---- models that fail ----


FAILING_MODEL = """
import mlflow

class Completion:
    prompt_tokens, completion_tokens, finish_reason = 1, 1, None
    def __init__(self, error): self.error = error
    def __iter__(self):
        yield "So far so good"
        raise self.error
    def close(self): pass

class Failing(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str]) -> list[str]: return model_input
    def encode_messages(self, messages):
        print("What a model prints goes to the log.")
        when, kind = messages[0]["content"].split()
        error = {"ValueError": ValueError, "RuntimeError": RuntimeError}[kind]("The secret inside.")
        if when == "early":
            raise error
        return error
    def generate(self, prompts, params): return [Completion(prompts[0])]

mlflow.models.set_model(Failing())
"""


@pytest.fixture(scope="module")
def failing(register_python_model, store, tmp_path_factory):
    """Fails early or late, with the error that it is asked for."""
    folder = tmp_path_factory.mktemp("failing")
    (folder / "failing_model.py").write_text(FAILING_MODEL, encoding="utf-8")
    uri = register_python_model("failing", folder / "failing_model.py")
    with running(uri, store, folder, trace_sampling=1.0) as server:
        yield server


def failure(text: str, **options) -> dict:
    return body(model="failing", messages=[{"role": "user", "content": text}], **options)


@pytest.mark.parametrize("text", ["early RuntimeError", "late RuntimeError", "late ValueError"])
def test_a_failing_model_is_a_500_whose_cause_stays_in_log_and_trace(failing, store, text):
    reply = failing.post(failure(text))
    assert is_openai_error(reply, 500)
    assert "secret" not in reply.text
    request_id = reply.headers["x-request-id"]
    assert f"{request_id} failed" in failing.log.read_text("utf-8")
    assert "The secret inside" in failing.log.read_text("utf-8")
    trace = find_trace(store, request_id)
    assert trace.info.state == "ERROR"
    assert trace.info.tags["model_version"] == "failing/1"
    (span,) = trace.data.spans
    assert span.inputs["messages"][0]["content"] == text
    assert "The secret inside." in span.status.description


def test_what_a_model_refuses_before_it_begins_is_a_400_in_its_own_words(failing):
    reply = failing.post(failure("early ValueError"))
    assert is_openai_error(reply, 400)
    assert reply.json()["error"]["message"] == "The secret inside."
    assert "What a model prints goes to the log." in failing.log.read_text("utf-8")


def test_a_stream_that_fails_ends_with_the_error_and_counts_as_one(failing):
    before = [failing.metric(name) for name in ("chat_errors_total", 'chat_requests_total{status="500"}')]
    chunks = []
    with pytest.raises(openai.APIError, match="The model failed"):
        chunks.extend(failing.ask([{"role": "user", "content": "late RuntimeError"}], stream=True))
    after = [failing.metric(name) for name in ("chat_errors_total", 'chat_requests_total{status="500"}')]
    assert after == [number + 1 for number in before]


# ---- keys, hosts, queues, traces, figures ----


@pytest.mark.key
def test_a_public_address_needs_a_key(monkeypatch):
    monkeypatch.delenv(API_KEY, raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ValueError, match=f"{host} can be reached by others: set {API_KEY}"):
            serve("models:/slm-onnx@champion", host=host)


def test_only_the_key_opens_the_models(keyed):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
        assert is_openai_error(keyed.post(body(), **headers), 401)
        assert is_openai_error(httpx.get(f"{keyed.url}/v1/models", headers=headers), 401)
        assert is_openai_error(httpx.get(f"{keyed.url}/metrics", headers=headers), 401)
    assert httpx.get(f"{keyed.url}/health").status_code == 200
    assert [model.id for model in keyed.client().models.list()] == ["smollm2"]


def ask_as(server: Server, path: str, host: str, **headers: str) -> httpx.Response:
    method = "POST" if "chat" in path else "GET"
    headers |= {"Host": host, "Content-Type": "application/json"}
    return httpx.request(method, f"{server.url}{path}", headers=headers, content=b"{")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/metrics"])
def test_without_a_key_a_web_page_that_gives_this_machine_a_name_of_its_own_is_refused(tiny, keyed, path):
    status = 400 if "chat" in path else 200
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        assert is_openai_error(ask_as(tiny, path, host), 403)
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]", "[::1]:8000"):
        assert ask_as(tiny, path, host).status_code == status
    opened = ask_as(keyed, path, "a-name-in-the-network", Authorization=f"Bearer {keyed.key}")
    assert opened.status_code == status


def test_a_traced_call_holds_inputs_outputs_usage_and_version(keyed, store):
    answer = keyed.ask(CAPITAL, max_tokens=16)
    assert "Madrid" in answer.choices[0].message.content
    trace = find_trace(store, answer.id)
    span = trace.data.spans[0]
    assert span.inputs["messages"] == [{"role": "system", "content": ""}, *CAPITAL]
    assert span.inputs["max_new_tokens"] == 16
    assert span.outputs["choices"][0]["message"]["content"] == answer.choices[0].message.content
    assert trace.info.token_usage["input_tokens"] == answer.usage.prompt_tokens
    assert trace.info.token_usage["output_tokens"] == answer.usage.completion_tokens
    assert trace.info.tags["model_version"] == "smollm2/1"
    assert trace.info.trace_metadata["mlflow.modelId"].startswith("m-")
    assert trace.info.execution_duration > 0


@pytest.fixture
def workspaces(tmp_path):
    """The URL of an MLflow server with workspaces, as a classroom's; this process uses its default one."""
    port = free_port()
    # fmt: off
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
               "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--workers", "1",
               "--artifacts-destination", str(tmp_path / "artifacts"), "--enable-workspaces"]
    # fmt: on
    with processes.running(command, port, "MLflow", 600) as url:
        mlflow.set_tracking_uri(url)
        mlflow.set_experiment("models")  # The one that tests before this chose is another store's.
        yield url


def test_tracing_finds_the_model_in_its_workspace_and_leaves_its_traces_there(workspaces, tmp_path):
    (tmp_path / "failing_model.py").write_text(FAILING_MODEL, encoding="utf-8")
    with mlflow.start_run():
        mlflow.pyfunc.log_model(
            python_model=str(tmp_path / "failing_model.py"), name="failing", registered_model_name="failing"
        )
    with running("models:/failing/1", workspaces, tmp_path, trace_sampling=1.0) as server:
        request_id = server.post(failure("early ValueError")).headers["x-request-id"]
    where = [mlflow.get_experiment_by_name("serving").experiment_id]
    (trace,) = mlflow.search_traces(locations=where, return_type="list")
    assert trace.info.tags["request_id"] == request_id


def test_without_sampling_there_is_no_trace(tiny, store):
    assert tiny.ask(max_tokens=4).usage.completion_tokens == 4
    with connected(store):
        where = [mlflow.set_experiment("serving").experiment_id]
        only = "tags.model = 'slm-onnx'"
        assert mlflow.search_traces(locations=where, filter_string=only, return_type="list") == []


GONE = (
    'chat_requests_total{status="499"}',
    "chat_errors_total",
    "chat_prompt_tokens_total",
    "chat_completion_tokens_total",
)


def test_a_client_that_goes_stops_its_work_and_is_counted(keyed, store):
    before = [keyed.metric(name) for name in GONE]
    stream = keyed.ask(stream=True, **ENDLESS)
    first = next(iter(stream))
    stream.close()
    keyed.wait_until_idle()
    trace = find_trace(store, first.id)
    assert trace.data.spans[0].outputs["choices"][0]["finish_reason"] == "closed"
    used = trace.info.token_usage
    assert used["output_tokens"] < ENDLESS["max_tokens"]
    added = [1, 1, used["input_tokens"], used["output_tokens"]]
    expected = [old + new for old, new in zip(before, added, strict=True)]
    assert eventually(lambda: [keyed.metric(name) for name in GONE] == expected)
    request_id = first.id.replace("chatcmpl-", "req_")
    assert f"{request_id} POST '/v1/chat/completions' 499" in keyed.log.read_text("utf-8")


def test_a_client_that_times_out_stops_its_work(keyed):
    with pytest.raises(openai.APITimeoutError):
        keyed.client(timeout=3).chat.completions.create(model="smollm2", messages=QUESTION, **ENDLESS)
    keyed.wait_until_idle()


def test_a_full_queue_is_a_429_that_says_when_to_come_back(keyed):
    streams = [keyed.ask(stream=True, **ENDLESS) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    with pytest.raises(openai.RateLimitError) as caught:
        keyed.ask(max_tokens=1)
    assert int(caught.value.response.headers["retry-after"]) > 0
    for stream in streams:
        stream.close()
    keyed.wait_until_idle()
    assert keyed.ask(max_tokens=1).usage.completion_tokens == 1


def test_figures_count_what_was_served(tiny):
    names = ("chat_requests_total", "chat_errors_total", "chat_prompt_tokens_total")
    names += ("chat_completion_tokens_total", "chat_time_to_first_token_seconds_count")
    before = [tiny.metric(name) for name in names]
    usage = tiny.ask(max_tokens=7).usage
    tiny.post(b"{")
    added = [tiny.metric(name) - old for name, old in zip(names, before, strict=True)]
    assert added == [2, 1, usage.prompt_tokens, usage.completion_tokens, 1]
    assert tiny.metric("chat_queue_length") == 0
