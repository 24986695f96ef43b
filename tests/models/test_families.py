"""Models of many families go through both notebooks, or end with one sentence; docs/models.md has a list."""

import os
import re
import subprocess
import sys
from pathlib import Path

import families
import nbformat
import pytest

from helpers import errors
from helpers.models import catalog, export

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture(scope="module")
def place(module_folder) -> Path:
    return module_folder("families")


@pytest.fixture
def build(place: Path, smollm2_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """build(family): its checkpoint, made once; what is exported from it lies beside it."""
    monkeypatch.setenv("WEIGHTS_DIR", str(place / "weights"))

    def folder(family: str) -> Path:
        path = place / re.sub(r"\W+", "-", family)
        return path if path.exists() else families.build(family, path, smollm2_checkpoint)

    return folder


def run(notebook: str, model: Path, place: Path) -> subprocess.CompletedProcess:
    given = {
        "model": model,
        "serve": False,
        "max_new_tokens": 8,
        "tracking_uri": f"sqlite:///{place}/mlflow.db",
    }
    if notebook == "02":
        given["questions"] = 20
    words = [str(word) for name, value in given.items() for word in ("-p", name, value)]
    command = [sys.executable, "-m", "helpers", "run", notebook, *words, "--output", str(place / "out")]
    return subprocess.run(command, cwd=place, capture_output=True, encoding="utf-8")


def printed(place: Path, notebook: str) -> str:
    book = nbformat.read(next((place / "out").glob(f"{notebook}_*.ipynb")), as_version=4)
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.models
@pytest.mark.parametrize("family", ["qwen3", "gemma2", families.SILENT])
def test_both_notebooks_run_to_their_end(family, build, place):
    for notebook in ("01", "02"):
        result = run(notebook, build(family), place)
        assert result.returncode == 0, result.stderr[-2000:]
        assert "✗" not in printed(place, notebook)


@pytest.mark.models
def test_notebook_01_runs_with_a_model_that_cannot_be_converted_and_02_is_refused_at_once(build, place):
    folder = build("gemma3_text")
    assert run("01", folder, place).returncode == 0
    refused = run("02", folder, place)
    assert refused.returncode == 1
    assert "Gemma3ForCausalLM" in refused.stderr
    assert refused.stderr.strip().count("\n") == 0


@pytest.mark.models
@pytest.mark.parametrize(
    ("family", "architecture", "reason"),
    [
        ("olmo2", "Olmo2ForCausalLM", "is not currently supported"),
        ("phi3, 2,048 positions", "Phi3ForCausalLM", "KeyError: 'multi_cache'"),
    ],
)
def test_a_model_that_the_builder_does_not_know_is_refused_in_one_sentence(
    family, architecture, reason, build
):
    folder = build(family)
    with pytest.raises(errors.ModelUnavailable) as refusal:
        export.onnx_folder(catalog.find(str(folder)), "int4")
    sentence = str(refusal.value)
    assert sentence.startswith(f"{architecture} in {folder} cannot be converted to int4")
    assert reason in sentence
    assert "Notebook 01 works with it" in sentence
    assert "\n" not in sentence
    assert not list(Path(os.environ["WEIGHTS_DIR"]).glob(f"{folder.name}-*/**/genai_config.json"))


def test_the_page_names_every_family_that_was_tried():
    rows = {
        line.split("|")[1].strip(" `")
        for line in DOCS.read_text("utf-8").splitlines()
        if line.startswith("| `")
    }
    assert rows == set(families.FAMILIES)
