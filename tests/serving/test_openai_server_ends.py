"""How answers of the OpenAI endpoint end before their time, how it starts, and that nothing of it is left."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import openai
import psutil
import pytest
from serving_support import ENDLESS, QUESTION, body, find_trace, is_openai_error, reply_on, running
from support import connected, eventually, left

from helpers.processes import free_port
from helpers.serving import openai_server

pytestmark = pytest.mark.server


def test_an_answer_over_its_time_is_stopped(smollm2_uri, store, tmp_path):
    with running(smollm2_uri, store, tmp_path, timeout=1.5) as server:
        with pytest.raises(openai.InternalServerError, match="took longer than") as caught:
            server.ask(**ENDLESS)
        assert caught.value.status_code == 504
        pieces = []
        with pytest.raises(openai.APIError, match="took longer than"):
            pieces.extend(server.ask(stream=True, **ENDLESS))
        server.wait_until_idle()
        counters = ('chat_requests_total{status="504"}', "chat_errors_total")
        assert eventually(lambda: [server.metric(name) for name in counters] == [2, 2])
        assert eventually(lambda: server.metric("chat_completion_tokens_total") >= len(pieces))


TALKATIVE_MODEL = """
import mlflow, time

class Completion:
    prompt_tokens, completion_tokens, finish_reason = 1, 0, None
    def __iter__(self):
        while not self.finish_reason:
            self.completion_tokens += 1
            yield "x" * 100_000
            time.sleep(0.01)
    def close(self): self.finish_reason = "closed"

class Talkative(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[str]) -> list[str]: return model_input
    def encode_messages(self, messages): return [1]
    def generate(self, prompts, params): return [Completion()]

mlflow.models.set_model(Talkative())
"""


def test_a_reader_that_takes_nothing_gets_no_more_time(register_python_model, store, tmp_path):
    code = tmp_path / "talkative_model.py"
    code.write_text(TALKATIVE_MODEL, encoding="utf-8")
    uri = register_python_model("talkative", code)
    asked = json.dumps(body(model="talkative", stream=True)).encode()
    with running(uri, store, tmp_path, timeout=3) as server:
        with closing(server.connect(asked, len(asked))) as connection:
            assert eventually(lambda: server.metric("chat_requests_in_progress"))
            server.wait_until_idle()
            assert eventually(lambda: server.metric("chat_completion_tokens_total"))
            assert reply_on(connection).text.rstrip().endswith('"code": null}}')
        assert server.metric('chat_requests_total{status="504"}') == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_finishes_its_answers_and_takes_no_new_ones(smollm2_uri, store, tmp_path, number):
    with running(smollm2_uri, store, tmp_path, grace=300) as server:
        processes = server.processes()
        chunks = iter(server.ask(stream=True, max_tokens=200, extra_body=ENDLESS["extra_body"]))
        next(chunks)
        server.process.send_signal(number)
        time.sleep(1)
        with pytest.raises(openai.APIConnectionError):
            server.ask(max_tokens=1)
        assert list(chunks)[-1].choices[0].finish_reason == "length"
        assert server.process.wait(300) == 0
        assert left(processes) == []


def test_a_stopped_server_waits_only_so_long_and_says_so(smollm2_uri, store, tmp_path):
    endless = body(model="smollm2", max_tokens=4000, **ENDLESS["extra_body"])
    options = {"grace": 2, "trace_sampling": 1.0}
    with running(smollm2_uri, store, tmp_path, **options) as server, ThreadPoolExecutor(1) as pool:
        processes = server.processes()
        whole = pool.submit(server.post, endless)
        chunks = iter(server.ask(stream=True, **ENDLESS))
        first = next(chunks)
        assert eventually(lambda: server.metric("chat_requests_in_progress") == 2)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="The server is stopping"):
            list(chunks)
        assert is_openai_error(whole.result(), 503)
        assert "The server is stopping." in whole.result().text
        assert int(whole.result().headers["retry-after"]) > 0
        assert server.process.wait(300) == 0
        assert left(processes) == []
        log = server.log.read_text("utf-8")
        assert log.count("POST '/v1/chat/completions' 503") == 2
        assert "Traceback" not in log
    (span,) = find_trace(store, first.id).data.spans
    assert span.outputs["choices"][0]["finish_reason"] == "closed"


def test_a_body_that_is_still_coming_when_the_server_is_cut_off_is_a_503(tiny_uri, store, tmp_path):
    with running(tiny_uri, store, tmp_path, grace=0) as server:
        with closing(server.connect(b"{", length=100)) as connection:
            time.sleep(0.5)  # For the head to be read.
            server.process.send_signal(signal.SIGTERM)
            assert is_openai_error(reply_on(connection), 503)
        assert server.process.wait(300) == 0
        assert "Traceback" not in server.log.read_text("utf-8")


def test_a_killed_server_leaves_no_process(smollm2_uri, store, tmp_path):
    with running(smollm2_uri, store, tmp_path) as server:
        processes = server.processes()
        next(iter(server.ask(stream=True, **ENDLESS)))
        server.process.kill()
    assert len(processes) >= 2
    assert left(processes) == []


def test_the_server_ends_with_its_model_and_says_so(smollm2_uri, store, tmp_path):
    with running(smollm2_uri, store, tmp_path) as server:
        chunks = iter(server.ask(stream=True, **ENDLESS))
        next(chunks)
        for process in server.processes()[1:]:
            process.kill()
        with pytest.raises(openai.APIError, match="The model's process has ended"):
            list(chunks)
        assert server.process.wait(300) == 1
        assert "The model's process ended, so the server did." in server.log.read_text("utf-8")


def test_a_notebook_has_the_server_for_the_length_of_a_block(tiny_uri, store, capfd):
    others = psutil.Process().children(recursive=True)
    with connected(store), openai_server.running(tiny_uri) as url:
        processes = [child for child in psutil.Process().children(recursive=True) if child not in others]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=300)
        answer = client.chat.completions.create(model="slm-onnx", messages=QUESTION, max_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert len(processes) >= 3  # The supervisor, the server, the model.
    assert left(processes) == []
    assert capfd.readouterr().out.startswith(
        f"Starting an OpenAI server for {tiny_uri} … ready at {url} after "
    )


def start(model_uri: str, store: str) -> subprocess.Popen:
    """A server that need not come up."""
    arguments = {"model_uri": model_uri, "port": free_port(), "tracking_uri": store}
    code = f"from helpers.serving.openai_server import serve\nserve(**{arguments!r})"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", [psutil.Process.terminate, psutil.Process.kill])
def test_a_server_that_is_ended_while_it_loads_leaves_no_process(smollm2_uri, store, end):
    process = start(smollm2_uri, store)
    while "Loading" not in process.stderr.readline():
        assert process.poll() is None
    while not (model := psutil.Process(process.pid).children(recursive=True)):
        assert process.poll() is None
    end(psutil.Process(process.pid))
    process.communicate(timeout=300)
    assert left(model) == []


def test_a_model_that_does_not_exist_is_one_sentence(store):
    process = start("models:/nobody@champion", store)
    error = process.communicate(timeout=600)[1].strip().splitlines()[-1]
    assert process.returncode == 1
    assert error.startswith("RuntimeError: models:/nobody@champion could not be loaded: ")
    assert "nobody not found in this MLflow store. `make run` registers slm-transformers" in error
