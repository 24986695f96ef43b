"""An export is made once per recipe, answers like its checkpoint, and leaves nothing behind when it fails."""

import json
import shutil
from pathlib import Path

import nbclient
import nbformat
import onnx
import onnxruntime_genai as og
import pytest

from helpers.models import catalog, export, fetch, store

TINY = catalog.find("tiny-phi3")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights folder for this test."""
    monkeypatch.setenv("WEIGHTS_DIR", str(tmp_path / "weights"))
    return tmp_path / "weights"


def answer(folder: Path, model: catalog.Model, question: str, new_tokens: int) -> str:
    """The greedy answer of an ONNX folder."""
    onnx_model = og.Model(str(folder))
    tokenizer = og.Tokenizer(onnx_model)
    chat = tokenizer.apply_chat_template(json.dumps(model.messages(question)), add_generation_prompt=True)
    ids = tokenizer.encode(chat)
    params = og.GeneratorParams(onnx_model)
    params.set_search_options(max_length=len(ids) + new_tokens, do_sample=False)
    generator = og.Generator(onnx_model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return tokenizer.decode(generator.get_sequence(0)[len(ids) :])


def test_int4_still_knows_the_capital_of_spain(smollm2_onnx: Path):
    assert "Madrid" in answer(smollm2_onnx, catalog.find("smollm2-135m"), "What is the capital of Spain?", 16)


def test_int4_has_no_zero_points(smollm2_onnx: Path):
    """With them, ONNX Runtime 1.32 computes single rows wrongly on processors without AVX-512."""
    graph = onnx.load(smollm2_onnx / "model.onnx", load_external_data=False).graph
    four_bits = [
        node
        for node in graph.node
        if node.op_type == "MatMulNBits" and any(a.name == "bits" and a.i == 4 for a in node.attribute)
    ]
    assert four_bits
    assert not [node.name for node in four_bits if len(node.input) > 3 and node.input[3]]


def test_int4_is_the_smallest(smollm2_onnx: Path, smollm2_checkpoint: Path):
    assert store.total_size(smollm2_onnx) < 0.25 * store.total_size(smollm2_checkpoint)


@pytest.mark.parametrize("precision", catalog.PRECISIONS)
def test_every_precision_loads_and_answers(precision: str):
    folder = export.onnx_folder(TINY, precision)
    fetch.verify(folder)
    assert answer(folder, TINY, "Hi", 8)


def test_the_builders_own_int4_can_be_had_for_the_study_but_is_no_precision_to_choose():
    folder = export.onnx_folder(TINY, "int4-default")
    assert folder != export.onnx_folder(TINY, "int4")
    assert answer(folder, TINY, "Hi", 8)
    assert "int4-default" not in catalog.PRECISIONS


def test_licence_and_source_travel_with_the_export(smollm2_onnx: Path, smollm2_checkpoint: Path):
    assert (smollm2_onnx / "LICENSE").read_text() == (smollm2_checkpoint / "LICENSE").read_text()
    assert fetch.source(smollm2_onnx) == fetch.source(smollm2_checkpoint)
    assert "onnxruntime-genai" in store.read_manifest(smollm2_onnx)["recipe"]["builder"]


def test_an_export_alone_is_enough(weights: Path, tiny_phi3_onnx: Path):
    """A machine that only answers needs neither the checkpoint nor a conversion."""
    copied = shutil.copytree(tiny_phi3_onnx, weights / "tiny-phi3" / "onnx-fp32")
    assert export.onnx_folder(TINY, "fp32", offline=True) == copied
    assert not (weights / "tiny-phi3" / "checkpoint").exists()


def test_a_local_checkpoint_is_exported_under_the_weights_folder(
    weights: Path, tmp_path: Path, tiny_phi3_checkpoint: Path
):
    own = shutil.copytree(tiny_phi3_checkpoint, tmp_path / "own")
    model = catalog.find(str(own))
    before = sorted(own.iterdir())
    folder = export.onnx_folder(model, "fp32", offline=True)
    assert folder.is_relative_to(weights)
    assert sorted(own.iterdir()) == before
    wanted = store.read_manifest(folder)["recipe"]
    (own / "model.safetensors").touch()  # newer weights ask for a new export
    assert fetch.recipe(model) != wanted["checkpoint"]


def test_a_local_onnx_folder_is_used_as_it_is(tiny_phi3_onnx: Path):
    model = catalog.find(str(tiny_phi3_onnx))
    assert export.onnx_folder(model, "int4") == tiny_phi3_onnx
    with pytest.raises(fetch.ModelUnavailable, match="is not a Transformers checkpoint"):
        fetch.checkpoint(model)


def test_a_checkpoint_that_cannot_be_exported_says_why_and_leaves_nothing(weights: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "no-such-architecture"}')
    (broken / "model.safetensors").write_bytes(b"")
    model = catalog.find(str(broken))
    with pytest.raises(
        fetch.ModelUnavailable, match=r"(?s)^Converting .* to fp32 failed.*no-such-architecture"
    ):
        export.onnx_folder(model, "fp32")
    assert [path.name for path in (weights / model.key).iterdir()] == [".onnx-fp32.lock"]


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"^precision='int5' is not one of fp32, int8, int4\. Set it with"):
        export.onnx_folder(TINY, "int5")


def test_a_notebook_keeps_one_line_of_the_work_and_none_when_there_is_none(weights: Path):
    call = "folder = fetch.checkpoint(catalog.find('tiny-phi3'))"
    notebook = nbformat.v4.new_notebook()
    sources = ("from helpers.models import catalog, fetch", call, call)
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbclient.NotebookClient(notebook, timeout=300).execute()
    (line,) = notebook.cells[1].outputs
    assert line.output_type == "display_data"
    assert line.data["text/plain"].startswith("tiny-phi3: 0.6 MB, ready in ")
    assert notebook.cells[2].outputs == []
