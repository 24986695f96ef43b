"""`make run MODEL=phi-3-mini` goes the real way: from a Hub (here a local one) through both notebooks.

What is published here is Phi-3-mini in everything but size and knowledge; see published.py.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlflow
import nbformat
import onnxruntime_genai as og
import published
import pytest
from local_hub import LocalHub
from transformers import AutoTokenizer

from helpers.models import catalog, export, folders, onnx_chat_model

pytestmark = pytest.mark.kernel

PHI3 = catalog.find("phi-3-mini")
# Notes every import of what notebook 02 must not need, in every process that the run starts.
NOTE_IMPORTS = """
import os, sys
def note(event, details):
    if event == "import" and details[0].partition(".")[0] in ("torch", "transformers", "onnx"):
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(f"{details[0]} {sys.argv}\\n")
sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def tiny_int4() -> Path:
    return export.onnx_folder(catalog.find("tiny-phi3"), "int4")


@pytest.fixture(scope="module")
def hub(tiny_phi3_checkpoint: Path, tiny_int4: Path) -> Iterator[LocalHub]:
    repositories = {
        published.CHECKPOINT.repo: published.checkpoint(tiny_phi3_checkpoint),
        published.ONNX.repo: published.onnx(tiny_int4, tiny_phi3_checkpoint),
    }
    with LocalHub(repositories, published.COMMITS).serve() as server:
        yield server


@pytest.fixture(scope="module")
def run(hub: LocalHub, tmp_path_factory) -> SimpleNamespace:
    """Both notebooks on an empty machine, 02 first: its store, weights, pages, imports and the Hub's log."""
    place = tmp_path_factory.mktemp("phi3")
    uri = f"sqlite:///{place}/mlflow.db"
    given = ("-p", "tracking_uri", uri, "--output", place / "out")
    (place / "sitecustomize.py").write_text(NOTE_IMPORTS, encoding="utf-8")
    path = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
    notes = place / "imports.txt"
    _helpers(hub, place, "run", "02", *given, "-p", "questions", "20", PYTHONPATH=path, NOTES=str(notes))
    weights = place / "weights" / "phi-3-mini"
    alone = [folder.name for folder in weights.glob("[!.]*")]
    _helpers(hub, place, "run", "01", *given)
    mlflow.set_tracking_uri(uri)
    checkpoint, onnx = weights / "checkpoint", weights / "onnx-int4"
    asked = [(repo, path) for _, repo, path in hub.asked]
    return SimpleNamespace(
        place=place, checkpoint=checkpoint, onnx=onnx, asked=asked, notes=notes, after_02=alone
    )


def _helpers(hub: LocalHub, place: Path, *arguments: object, **environment: str) -> None:
    options = {"model": "phi-3-mini", "max_new_tokens": 9, "serve": False}
    given = [str(part) for name, value in options.items() for part in ("-p", name, value)]
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "hf"), "WEIGHTS_DIR": f"{place}/weights"}
    result = subprocess.run(
        [sys.executable, "-m", "helpers", *map(str, arguments), *given],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def _printed(notebook: Path) -> str:
    book = nbformat.read(notebook, as_version=4)
    return "".join(o.get("text", "") for c in book.cells if c.cell_type == "code" for o in c.outputs)


def test_only_the_needed_files_are_asked_for_and_each_once(run):
    wanted = {
        (published.CHECKPOINT.repo, name)
        for name in (
            *("LICENSE", "added_tokens.json", "config.json", "generation_config.json"),
            *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            *("model.safetensors.index.json", "special_tokens_map.json", "tokenizer.json"),
            *("tokenizer.model", "tokenizer_config.json"),
        )
    }
    wanted |= {
        (published.ONNX.repo, f"{published.ONNX.folder}/{name}")
        for name in (
            *("added_tokens.json", "config.json", "genai_config.json", "special_tokens_map.json"),
            *(published.ONNX_NAME, f"{published.ONNX_NAME}.data", "tokenizer.json", "tokenizer.model"),
            "tokenizer_config.json",
        )
    }
    assert sorted(run.asked) == sorted(wanted | {(published.ONNX.repo, "LICENSE")})
    folders.verify(run.checkpoint)
    folders.verify(run.onnx)


def test_model_versions_say_which_commit_they_are_made_of(run):
    client = mlflow.MlflowClient()
    for name, source in (("slm-transformers", published.CHECKPOINT), ("slm-onnx", published.ONNX)):
        version = client.get_model_version_by_alias(name, "candidate")
        assert version.tags["source_model"] == source.repo
        assert re.fullmatch("[0-9a-f]{40}", source.revision)  # pinned: a commit, not a branch
        assert version.tags["source_revision"] == source.revision
        assert version.tags["licence"] == "MIT"


def test_notebook_01_computes_in_the_checkpoints_own_numbers(run):
    assert "torch.bfloat16" in _printed(run.place / "out" / "01_TransformerPipeline.ipynb")
    loaded = mlflow.transformers.load_model("models:/slm-transformers@candidate")
    assert str(loaded.model.dtype) == "torch.bfloat16"


def test_notebook_02_logs_the_published_folder_byte_for_byte(run, hub: LocalHub):
    logged = Path(mlflow.artifacts.download_artifacts("models:/slm-onnx@candidate"))
    (folder,) = logged.glob("artifacts/*")
    repository = hub.repositories[published.ONNX.repo]
    names = {path.name for path in folder.iterdir()} - {folders.MANIFEST, "LICENSE"}
    assert published.ONNX_NAME in names
    for name in names:
        assert (folder / name).read_bytes() == repository[f"{published.ONNX.folder}/{name}"], name
    needs = (logged / "requirements.txt").read_text("utf-8")
    assert "onnxruntime-genai" in needs
    assert "torch" not in needs


def test_notebook_02_needs_neither_torch_nor_a_conversion_nor_the_checkpoint(run):
    assert not run.notes.exists(), run.notes.read_text("utf-8")
    assert run.after_02 == ["onnx-int4"]


def test_imports_of_torch_would_have_been_noted(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(NOTE_IMPORTS, encoding="utf-8")
    noted = os.environ | {"PYTHONPATH": str(tmp_path), "NOTES": str(tmp_path / "imports.txt")}
    subprocess.run([sys.executable, "-c", "import onnx"], env=noted, check=True)
    assert (tmp_path / "imports.txt").read_text("utf-8").startswith("onnx ")


# The folder as published in 2024 and onnxruntime-genai of today


@pytest.fixture(scope="module")
def of_2024(tiny_phi3_checkpoint: Path, tiny_int4: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("of-2024")
    for path, content in published.onnx(tiny_int4, tiny_phi3_checkpoint).items():
        if path.startswith(f"{published.ONNX.folder}/"):
            (folder / Path(path).name).write_bytes(content)
    return folder


def _wrapper(folder: Path) -> onnx_chat_model.Phi3Model:
    model = onnx_chat_model.Phi3Model()
    model.load_context(SimpleNamespace(artifacts={"phi3-mini-onnx": str(folder)}, model_config={}))
    return model


def test_the_folder_of_2024_answers_as_the_same_model_in_todays_layout(of_2024: Path, tiny_int4: Path):
    old, new = _wrapper(of_2024), _wrapper(tiny_int4)
    chats = [PHI3.messages(question) for question in ("Why is the sky blue?", "Hi", "1, 2, 3,")]
    answers = [
        [model.apply_chat_template(chat) for chat in chats]
        + [row.result().text for row in model.generate([model.encode_messages(c) for c in chats])]
        for model in (old, new)
    ]
    assert answers[0] == answers[1]


def test_the_tokenizers_of_2024_agree_between_the_runtimes(of_2024: Path, hub: LocalHub, tmp_path: Path):
    for name, content in hub.repositories[published.CHECKPOINT.repo].items():
        if name.endswith(".json"):
            (tmp_path / name).write_bytes(content)
    transformers, genai = AutoTokenizer.from_pretrained(tmp_path), og.Tokenizer(og.Model(str(of_2024)))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tschüß  👋, 1 2"}]
    text = transformers.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert genai.apply_chat_template(json.dumps(chat), add_generation_prompt=True) == text
    assert genai.encode(text).tolist() == transformers(text)["input_ids"]


def test_the_folder_of_2024_takes_prompts_longer_than_the_sliding_window(of_2024: Path):
    """Its genai_config.json names no window, so genai 0.18 has none to fail past.

    It answers, no more: past 2,047 tokens ONNX Runtime's greedy tokens are no longer those of Transformers.
    """
    (row,) = _wrapper(of_2024).generate(["The quick brown fox. " * 400], {"max_new_tokens": 8})
    assert row.result().prompt_tokens > 2047
    assert row.completion_tokens == 8
