"""docs/serving.md's recipe: MLflow's gateway, in the process of `make ui`, in front of `make serve`."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import mlflow
import openai
import pytest
from serving_support import QUESTION
from support import connected, eventually, make

from helpers import ROOT, processes

pytestmark = pytest.mark.server

RECIPE = (ROOT / "docs" / "serving.md").read_text("utf-8").partition("## MLflow's gateway")[2]
KEY = "a-key-for-tests"
# One token of each kind costs this, in dollars, by the recipe's prices.
PROMPT_PRICE, ANSWER_PRICE = 1e-6, 2e-6
NAMED = [{"role": "user", "content": "Hi", "name": "Ann"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
SHAPE = {"type": "json_schema", "json_schema": {"name": "number", "schema": SCHEMA}}


def block(language: str) -> str:
    """The recipe's one block of a language."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", RECIPE, re.DOTALL)
    return text


@dataclass
class Recipe:
    """Both servers of the recipe, and an endpoint `chat` of the gateway."""

    store: str
    endpoint: str
    gateway: str

    def make_endpoint(self, changes: dict[str, str]) -> None:
        """Run the recipe's Python with these servers, and with other names or values."""
        changes |= {"http://127.0.0.1:8000": self.endpoint, "http://127.0.0.1:5000": self.gateway}
        changes |= {"a-key": KEY}
        code = block("python")
        for before, after in changes.items():
            assert before in code
            code = code.replace(before, after)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def client(self, through: bool) -> openai.OpenAI:
        """A client of the gateway, or of the endpoint itself."""
        address = f"{self.gateway}/gateway/mlflow/v1" if through else f"{self.endpoint}/v1"
        return openai.OpenAI(base_url=address, api_key="none" if through else KEY, max_retries=0, timeout=300)

    def post(self, through: bool, **body: object) -> httpx.Response:
        client = self.client(through)
        asked = {"model": "chat" if through else "slm-onnx", "messages": QUESTION, "max_tokens": 4} | body
        headers = {"Authorization": f"Bearer {client.api_key}"}
        return httpx.post(f"{client.base_url}chat/completions", json=asked, headers=headers, timeout=300)


@pytest.fixture(scope="module")
def recipe(registered_onnx, tmp_path_factory) -> Iterator[Recipe]:
    prices = tmp_path_factory.mktemp("prices")
    (prices / "openai.json").write_text(block("json"), encoding="utf-8")
    one, other = processes.free_port(), processes.free_port()
    found = Recipe(registered_onnx, f"http://127.0.0.1:{one}", f"http://127.0.0.1:{other}")
    settings = dict(re.findall(r"^export (\w+)=(\S+)", block("bash"), re.MULTILINE))
    settings |= {"MLFLOW_MODEL_CATALOG_URI": prices.as_uri(), "MLFLOW_GATEWAY_BUDGET_REFRESH_INTERVAL": "1"}
    own = os.environ | {"TRACKING_URI": registered_onnx, "OPENAI_SERVER_API_KEY": KEY}
    with (
        make("serve", f"{found.endpoint}/health", f"PARAMS=--port {one}", env=own),
        make("ui", f"{found.gateway}/health", f"PORT={other}", env=own | settings),
    ):
        found.make_endpoint({})
        yield found


def answer(recipe: Recipe, through: bool, **options: object):
    model = "chat" if through else "slm-onnx"
    return recipe.client(through).chat.completions.create(model=model, messages=QUESTION, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 12},
        {"max_completion_tokens": 12, "stop": ["a", "e"]},
        {"max_tokens": 12, "temperature": 1.5, "top_p": 0.9, "seed": 3},
        {"max_tokens": 12, "extra_body": {"repetition_penalty": 1.3}},
        {"max_tokens": 40, "response_format": SHAPE},
    ],
)
def test_text_end_and_usage_are_those_of_the_endpoint_whole_or_streamed(recipe, options):
    direct, through = answer(recipe, False, **options), answer(recipe, True, **options)
    (first,), (second,) = direct.choices, through.choices
    assert (second.message.content, second.finish_reason) == (first.message.content, first.finish_reason)
    assert through.usage.to_dict() == direct.usage.to_dict()
    chunks = list(answer(recipe, True, stream=True, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        first.message.content
    )
    assert chunks[-1].usage.to_dict() == direct.usage.to_dict()  # though nobody asked for it


def test_every_answer_leaves_its_usage_and_its_price_as_a_trace(recipe):
    said = answer(recipe, True, max_tokens=7)
    price = said.usage.prompt_tokens * PROMPT_PRICE + said.usage.completion_tokens * ANSWER_PRICE

    def traces() -> list[mlflow.entities.Trace]:
        everywhere = [each.experiment_id for each in mlflow.search_experiments()]
        found = mlflow.search_traces(locations=everywhere, return_type="list")
        return [trace for trace in found if said.id in str(trace.data.response)]

    # Asked of the server, not of its store: spans that are still on their way are looked for among artifacts.
    with connected(recipe.gateway):
        (trace,) = eventually(traces)
    usage = trace.info.token_usage
    assert usage["input_tokens"] == said.usage.prompt_tokens
    assert usage["output_tokens"] == said.usage.completion_tokens
    assert trace.info.cost["total_cost"] == pytest.approx(price)


def test_a_spent_budget_ends_the_answers_of_its_endpoint_alone(recipe):
    names = {'"chat"': '"poor"', '"make-serve"': '"poor"', '    name="slm-onnx"': '    name="poor"'}
    recipe.make_endpoint(names | {"budget_amount=0.5": "budget_amount=0.0001"})
    refused = eventually(
        lambda: (reply := recipe.post(True, model="poor", max_tokens=12)).status_code != 200 and reply
    )
    assert refused.status_code == 429
    assert "Budget limit exceeded. Limit: $0.00 USD per 1 day." in refused.json()["detail"]
    assert recipe.post(True).status_code == 200


# What the gateway takes. Each is a fact of MLflow that the page states.


@pytest.mark.parametrize("field", [{"stop": "a"}, {"top_k": 0}])
def test_a_request_that_the_endpoint_honours_is_refused(recipe, field):
    assert recipe.post(False, **field).status_code == 200
    refused = recipe.post(True, **field)
    assert refused.status_code == 400
    assert "Invalid chat payload" in refused.json()["detail"]


def test_an_unknown_field_of_a_message_is_dropped_and_one_of_the_request_is_passed_on(recipe):
    assert recipe.post(False, messages=NAMED).status_code == 400
    assert recipe.post(True, messages=NAMED).status_code == 200
    for through in (False, True):
        assert recipe.post(through, logit_bias={"5": 1}).status_code == 400


def test_an_error_loses_its_shape_and_keeps_its_status_and_its_sentence(recipe):
    direct, through = (recipe.post(way, logprobs=True) for way in (False, True))
    assert through.status_code == direct.status_code == 400
    error = direct.json()["error"]
    assert error["code"] or error["param"]
    assert set(through.json()) == {"detail"}
    assert error["message"] in str(through.json()["detail"])


def test_an_error_before_a_stream_begins_arrives_as_a_chunk_of_a_good_answer(recipe):
    assert recipe.post(False, logprobs=True, stream=True).status_code == 400
    through = recipe.post(True, logprobs=True, stream=True)
    assert through.status_code == 200
    (event,) = through.text.strip().split("\n\n")
    assert json.loads(event.removeprefix("data: ")).keys() == {"error"}


def test_a_stream_has_no_last_line_and_an_answer_no_log_probabilities_and_no_request_id(recipe):
    direct, through = (recipe.post(way, stream=True) for way in (False, True))
    assert direct.text.endswith("data: [DONE]\n\n")
    assert "[DONE]" not in through.text
    assert "usage" not in direct.text
    direct, through = (recipe.post(way) for way in (False, True))
    assert direct.json().keys() ^ through.json().keys() == {"provider"}
    first, second = (reply.json()["choices"][0] for reply in (direct, through))
    assert first.keys() ^ second.keys() == {"logprobs"}
    assert "x-request-id" in direct.headers
    assert "x-request-id" not in through.headers


def test_the_other_route_passes_the_body_on_as_it_is(recipe):
    url = f"{recipe.gateway}/gateway/openai/v1/chat/completions"
    asked = {"model": "chat", "messages": QUESTION, "max_tokens": 4, "stop": "a", "top_k": 0}
    assert httpx.post(url, json=asked, timeout=300).status_code == 200
    assert httpx.post(url, json=asked | {"messages": NAMED}, timeout=300).status_code == 400
