"""docs/serving.md's recipe: MLflow's gateway, in the process of `make ui`, in front of `make serve`."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import mlflow
import openai
import pytest
from serving_support import QUESTION, eventually
from support import connected, make

from helpers import ROOT, processes

pytestmark = pytest.mark.server

RECIPE = (ROOT / "docs" / "serving.md").read_text("utf-8").partition("## MLflow's gateway")[2]
KEY = "a-key-for-tests"
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


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

    def direct(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.endpoint}/v1", api_key=KEY, max_retries=0)

    def through(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.gateway}/gateway/mlflow/v1", api_key="none", max_retries=0)

    def post(self, **body: object) -> httpx.Response:
        url = f"{self.gateway}/gateway/mlflow/v1/chat/completions"
        return httpx.post(
            url, json={"model": "chat", "messages": QUESTION, "max_tokens": 4} | body, timeout=300
        )


@pytest.fixture(scope="module")
def recipe(registered_onnx, tmp_path_factory) -> Iterator[Recipe]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "prices").mkdir()
    (folder / "prices" / "openai.json").write_text(block("json"), encoding="utf-8")
    one, other = processes.free_port(), processes.free_port()
    found = Recipe(registered_onnx, f"http://127.0.0.1:{one}", f"http://127.0.0.1:{other}")
    given = dict(re.findall(r"(MLFLOW_\w+)=(\S+)", block("bash")))
    given["MLFLOW_MODEL_CATALOG_URI"] = (folder / "prices").as_uri()
    own = os.environ | {"TRACKING_URI": registered_onnx, "OPENAI_SERVER_API_KEY": KEY}
    code = block("python").replace("http://127.0.0.1:8000", found.endpoint).replace("a-key", KEY)
    code = code.replace("http://127.0.0.1:5000", found.gateway)
    with (
        make("serve", f"{found.endpoint}/health", f"PARAMS=--port {one}", env=own),
        make("ui", f"{found.gateway}/health", f"PORT={other}", env=own | given),
    ):
        exec(compile(code, "docs/serving.md", "exec"), {})
        yield found
