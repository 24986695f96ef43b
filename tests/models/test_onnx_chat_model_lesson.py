"""The class that notebook 02 lets a learner write, as it stands there, beside the class that ships."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest

from helpers.models import catalog, export
from helpers.models.onnx_chat_model import Phi3Model
from helpers.workshop import notebooks

QUESTIONS = [
    "What is the capital of Spain?",
    "Tell me a joke about atom.",
    "Write a long story about the sea.",
]
LONGEST = 64


@pytest.fixture(scope="module")
def source() -> str:
    """What the notebook's %%writefile cell writes."""
    book = nbformat.read(notebooks.NOTEBOOKS["02"], as_version=4)
    (cell,) = [cell for cell in book.cells if cell.source.startswith("%%writefile")]
    return cell.source.partition("\n")[2]


@pytest.fixture(scope="module", params=["tiny-phi3", "smollm2-135m"])
def models(request, source, tmp_path_factory):
    """The learner's class and the class that ships, with the same model in fp32."""
    chosen = catalog.find(request.param)
    context = SimpleNamespace(
        artifacts={"phi3-mini-onnx": str(export.onnx_folder(chosen, "fp32"))}, model_config={}
    )
    file = tmp_path_factory.mktemp("learner") / "my_model.py"
    file.write_text(source, encoding="utf-8")
    learners, shipped = runpy.run_path(str(file))["MyModel"](), Phi3Model()
    learners.load_context(context)
    shipped.load_context(context)
    return learners, shipped, [shipped.apply_chat_template(chosen.messages(asked)) for asked in QUESTIONS]


def test_the_learners_class_answers_token_for_token_as_the_class_that_ships(models):
    learners, shipped, prompts = models
    table = pd.DataFrame({"prompt": prompts})
    answers = learners.predict(None, table)
    assert answers == shipped.predict(None, table, {"max_new_tokens": LONGEST})
    assert all(answers)
    for text, row in zip(answers, shipped.generate(prompts, {"max_new_tokens": LONGEST}), strict=True):
        np.testing.assert_array_equal(
            learners.tokenizer.encode(text), shipped.tokenizer.encode(row.result().text)
        )


def test_the_learners_class_renders_a_chat_as_the_class_that_ships(models):
    learners, shipped, _ = models
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = learners.tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=True)
    assert rendered == shipped.apply_chat_template(chat)


def test_the_learners_class_is_short_and_leans_on_nothing_of_ours(source):
    code = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= 30
    assert "helpers" not in source


def test_the_parts_of_the_file_that_the_notebook_names_are_there():
    """The table "what it adds · where in the file", and the line up to which the file is for reading."""
    from helpers.models import onnx_chat_model

    book = nbformat.read(notebooks.NOTEBOOKS["02"], as_version=4)
    (prose,) = [cell.source for cell in book.cells if "where in the file" in cell.source]
    rows = [line.split("|")[2] for line in prose.splitlines() if line.startswith("|")][2:]
    named = [name for row in rows for name in row.split("`")[1::2]]
    assert len(named) >= len(rows) >= 6
    for name in named:
        part = onnx_chat_model
        for step in name.split("."):
            part = getattr(part, step)
    text = Path(onnx_chat_model.__file__).read_text(encoding="utf-8")
    lesson, _, engine = text.partition("# You can stop reading here.")
    assert "def decode(" in lesson
    assert "class Phi3Model(" in lesson
    assert "class Decoder" in engine
