"""An export is made once per recipe, answers like its checkpoint, and leaves nothing behind when it fails."""

import json
import shutil
import tempfile
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import onnxruntime_genai as og
import pytest
import safetensors.numpy
import scipy.special

from helpers import errors
from helpers.models import catalog, export, fetch, folders, q4_grid

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


def products(folder: Path) -> dict[str, tuple[int, np.ndarray]]:
    """By name: the bits of each product of an ONNX folder, and its weights [N, K] as the kernel sees them."""
    # onnx refuses a data file with several names, which one in weights/ has when a logged model shares it.
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        graph = onnx.load(Path(copy, "model.onnx")).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in (node for node in graph.node if node.op_type == "MatMulNBits"):
        bits = {attribute.name: attribute.i for attribute in node.attribute}["bits"]
        q, steps = (onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        if bits == 4:
            q = np.stack([q & 15, q >> 4], axis=-1).reshape(*q.shape[:2], -1)
        weights = (q - np.float32(2 ** (bits - 1))) * steps.reshape(*q.shape[:2], 1)
        found[node.name] = bits, weights.reshape(len(q), -1)
    return found


def on_the_grid(weights: np.ndarray) -> np.ndarray:
    """Weights [N, K] after q4_grid rounded them, whole offsets and all."""
    q, steps, offsets = q4_grid.grid(weights)
    return ((q - np.float32(8)) * steps[..., None] + offsets[..., None]).reshape(weights.shape)


def read(folder: Path, sequence: list[int], at_once: bool) -> np.ndarray:
    """The logarithms of the probabilities [positions, vocabulary] of what follows each token.

    Args:
        at_once: read all tokens in one pass; else one by one, as they are when an answer is decoded.
    """
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    config = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
    empty = np.zeros((1, config["num_key_value_heads"], 0, config["head_size"]), np.float32)
    past = {i.name: empty for i in session.get_inputs() if i.name.startswith("past_key_values")}
    names = [output.name for output in session.get_outputs()]
    logits, end = [], 0
    for part in [sequence] if at_once else [[token] for token in sequence]:
        end += len(part)
        asked = {"input_ids": np.array([part], np.int64), "attention_mask": np.ones((1, end), np.int64)}
        got = dict(zip(names, session.run(names, asked | past), strict=True))
        past = {name: got[name.replace("past_key_values", "present")] for name in past}
        logits.append(got["logits"][0].astype(np.float64))
    return scipy.special.log_softmax(np.concatenate(logits), axis=-1)


def test_int4_has_no_zero_points(smollm2_onnx: Path):
    """With them, ONNX Runtime 1.32 computes single rows wrongly on processors without AVX-512."""
    graph = onnx.load(smollm2_onnx / "model.onnx", load_external_data=False).graph
    four_bits = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert four_bits
    assert not [node.name for node in four_bits if len(node.input) > 3 and node.input[3]]


def test_int4_keeps_the_four_bits_of_the_file_the_weights_come_from(
    smollm2_onnx: Path, smollm2_checkpoint: Path
):
    """Its every block of 32 weights lies on a grid of 16 values, and so do ours: q is not rounded twice."""
    checkpoint = safetensors.numpy.load_file(smollm2_checkpoint / "model.safetensors")
    parts = {
        "attn/qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn/o_proj": ("self_attn.o_proj",),
        "mlp/gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp/down_proj": ("mlp.down_proj",),
    }
    ours = products(smollm2_onnx)
    for layer in range(30):
        for name, sources in parts.items():
            weights = np.concatenate([checkpoint[f"model.layers.{layer}.{part}.weight"] for part in sources])
            bits, kept = ours[f"/model/layers.{layer}/{name}/MatMul_Q4"]
            _, sums = ours[f"/model/layers.{layer}/{name}/MatMul/BlockSums"]
            columns = weights.shape[1]
            # The product with [x, sums of x, sums of x] is one with these weights and x.
            effective = kept[:, :columns] + kept[:, columns:] @ sums
            offset = np.abs(kept[:, columns:] @ sums).max(axis=1, keepdims=True)
            assert bits == 4
            assert (np.abs(effective - weights) <= offset / 190).all(), (layer, name)
            assert np.allclose(on_the_grid(weights), weights, rtol=0, atol=1e-6 * np.abs(weights).max())


@pytest.mark.parametrize("columns", [32, 576, 1536])
def test_any_weights_are_rounded_by_half_a_step_at_most(columns: int):
    weights = np.random.default_rng(0).normal(1, 2, (7, columns)).astype(np.float32)
    weights[3] = 0.25  # a row of equal numbers has no step
    q, steps, _ = q4_grid.grid(weights)
    error = np.abs(on_the_grid(weights) - weights).reshape(q.shape)
    assert q.max() <= 15
    assert (error <= 0.5001 * steps[..., None]).all()
    assert not error[3].any()


@pytest.mark.parametrize("at_once", [True, False], ids=["all rows at once", "row by row"])
def test_int4_is_near_to_float32(smollm2_onnx: Path, at_once: bool):
    """Below 0.05 nats; the builder's own int4 is eight times as far. Kernels for one row are others."""
    exact = export.onnx_folder(catalog.find("smollm2-135m"), "fp32")
    text = "The sea is large. It is home to many animals, such as fish, and to plants that need little light."
    sequence = list(og.Tokenizer(og.Model(str(exact))).encode(text))
    wanted, got = read(exact, sequence, at_once), read(smollm2_onnx, sequence, at_once)
    assert (np.exp(wanted) * (wanted - got)).sum(axis=-1).mean() < 0.05


def test_int4_takes_less_than_a_quarter_of_the_checkpoint(smollm2_onnx: Path, smollm2_checkpoint: Path):
    assert folders.total_size(smollm2_onnx) < 0.25 * folders.total_size(smollm2_checkpoint)
    assert folders.total_size(smollm2_onnx) < 160e6


def test_a_product_whose_rows_are_no_whole_blocks_is_left_to_the_builder():
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 48]))
    weights = ir.tensor(np.ones((48, 8), np.float32), name="w")
    constant = ir.Value(name="w", type=x.type, shape=ir.Shape([48, 8]), const_value=weights)
    node = ir.node("MatMul", [x, constant], name="/odd/MatMul")
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[constant])
    q4_grid.rewrite(graph, set(), 4)
    assert [node.op_type for node in graph] == ["MatMul"]


@pytest.mark.parametrize("precision", catalog.PRECISIONS)
def test_every_precision_loads_and_answers(precision: str):
    folder = export.onnx_folder(TINY, precision)
    folders.verify(folder)
    assert answer(folder, TINY, "Hi", 8)


def test_the_builders_own_int4_can_be_had_for_the_study_but_is_no_precision_to_choose():
    folder = export.onnx_folder(TINY, "int4-default")
    assert folder != export.onnx_folder(TINY, "int4")
    assert answer(folder, TINY, "Hi", 8)
    assert "int4-default" not in catalog.PRECISIONS


def test_licence_and_source_travel_with_the_export(smollm2_onnx: Path, smollm2_checkpoint: Path):
    assert (smollm2_onnx / "LICENSE").read_bytes() == (smollm2_checkpoint / "LICENSE").read_bytes()
    assert fetch.source(smollm2_onnx) == fetch.source(smollm2_checkpoint)
    assert "onnxruntime-genai" in folders.read_manifest(smollm2_onnx)["recipe"]["builder"]


def test_an_export_alone_is_enough(weights: Path, tiny_phi3_onnx: Path):
    """A machine that only answers needs neither the checkpoint nor a conversion."""
    copied = shutil.copytree(tiny_phi3_onnx, weights / "tiny-phi3" / "onnx-fp32")
    assert export.onnx_folder(TINY, "fp32", offline=True) == copied
    assert not (weights / "tiny-phi3" / "checkpoint").exists()


@pytest.mark.models
def test_a_local_checkpoint_is_exported_under_the_weights_folder(
    weights: Path, tmp_path: Path, tiny_phi3_checkpoint: Path
):
    own = shutil.copytree(tiny_phi3_checkpoint, tmp_path / "own")
    model = catalog.find(str(own))
    before = sorted(own.iterdir())
    folder = export.onnx_folder(model, "fp32", offline=True)
    assert folder.is_relative_to(weights)
    assert sorted(own.iterdir()) == before
    wanted = folders.read_manifest(folder)["recipe"]
    (own / "model.safetensors").touch()  # newer weights ask for a new export
    assert model.origin.recipe() != wanted["checkpoint"]


def test_a_local_onnx_folder_is_used_as_it_is(tiny_phi3_onnx: Path):
    model = catalog.find(str(tiny_phi3_onnx))
    assert export.onnx_folder(model, "int4") == tiny_phi3_onnx
    with pytest.raises(errors.ModelUnavailable, match="is not a Transformers checkpoint"):
        fetch.checkpoint(model)


@pytest.mark.models
def test_a_checkpoint_that_cannot_be_exported_says_why_and_leaves_nothing(weights: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "no-such-architecture"}', encoding="utf-8")
    (broken / "model.safetensors").write_bytes(b"")
    model = catalog.find(str(broken))
    with pytest.raises(
        errors.ModelUnavailable, match=r"cannot be converted to fp32 by .*no-such-architecture"
    ):
        export.onnx_folder(model, "fp32")
    assert [path.name for path in (weights / model.key).iterdir()] == [".onnx-fp32.lock"]


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"^precision='int5' is not one of fp32, int8, int4\. Set it with"):
        export.onnx_folder(TINY, "int5")


@pytest.mark.kernel
def test_a_notebook_keeps_one_line_of_the_work_and_none_when_there_is_none(weights: Path):
    call = "folder = fetch.checkpoint(catalog.find('tiny-phi3'))"
    notebook = nbformat.v4.new_notebook()
    sources = ("from helpers.models import catalog, fetch", call, call)
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbclient.NotebookClient(notebook, timeout=600).execute()
    (line,) = notebook.cells[1].outputs
    assert line.output_type == "display_data"
    assert line.data["text/plain"].startswith("tiny-phi3: 0.6 MB, ready in ")
    assert notebook.cells[2].outputs == []
