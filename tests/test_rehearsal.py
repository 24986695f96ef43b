"""The rehearsal at Phi-3-mini's true size, tried here at toy size: the same steps, in the same processes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import mlflow
import onnx
import pytest

from helpers import tracking
from helpers.models import catalog, export, fetch, onnx_chat_model

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def rehearse(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / "rehearsal.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a finished rehearsal at toy size, its files kept, and its result."""
    folder = tmp_path_factory.mktemp("rehearsal")
    done = rehearse("--geometry", "tiny", "--folder", folder, "--keep", "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.models
def test_every_step_is_measured(place: Path):
    steps = json.loads((place / "rehearsal.json").read_text("utf-8"))["steps"]
    for name, figures in steps.items():
        assert figures["seconds"] > 0, name
        assert figures["memory_bytes"] > 10e6, name
    answering = [name for name, figures in steps.items() if "tokens_per_second" in figures]
    assert answering == ["pipeline", "transformers_answer", "onnx_answer"]
    assert all(steps[name]["bytes_per_token"] < 2e6 for name in answering)


@pytest.mark.models
def test_logging_in_place_adds_the_model_once(place: Path):
    steps = json.loads((place / "rehearsal.json").read_text("utf-8"))["steps"]
    for flow in ("transformers", "onnx"):
        logged = steps[f"{flow}_log_in_place"]
        assert logged["logged_bytes"] == pytest.approx(logged["model_bytes"] + 20_000, abs=20_000)
        # Now and then of the database. A copy of the model is three times as much.
        journal = 100_000
        assert logged["most_disk_bytes"] < logged["logged_bytes"] + journal


@pytest.fixture
def in_place(monkeypatch, tmp_path):
    """The module, in a store of its own."""
    tracking.connect(f"sqlite:///{tmp_path}/mlflow.db", "in place")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("in_place")


def test_a_model_logged_in_place_is_one_like_any_other(in_place, tiny_phi3_onnx: Path):
    with mlflow.start_run() as run, in_place.model("phi3-mlflow-model") as given:
        mlflow.pyfunc.save_model(
            **given,
            python_model=onnx_chat_model.__file__,
            artifacts={"phi3-mini-onnx": str(tiny_phi3_onnx)},
            pip_requirements=tracking.requirements("mlflow-skinny", "pandas", "onnxruntime-genai"),
        )
    version = mlflow.register_model(f"models:/{given['mlflow_model'].model_id}", "slm-onnx")
    (logged,) = mlflow.search_logged_models(output_format="list")
    assert (logged.name, logged.status) == ("phi3-mlflow-model", "READY")
    (output,) = mlflow.get_run(run.info.run_id).outputs.model_outputs
    loaded = mlflow.pyfunc.load_model(f"models:/slm-onnx/{version.version}")
    assert output.model_id == logged.model_id == loaded.metadata.model_id
    assert logged.source_run_id == loaded.metadata.run_id == run.info.run_id
    assert len(loaded.predict({"prompt": "Hi"}, params={"max_new_tokens": 4})) == 1


def test_a_model_that_could_not_be_logged_in_place_is_marked_failed_and_leaves_no_file(in_place, tmp_path):
    def log_half() -> None:
        with in_place.model("phi3-mlflow-model") as given:
            Path(given["path"]).mkdir(parents=True)
            (Path(given["path"]) / "half").write_text("made", encoding="utf-8")
            raise OSError("disk full")

    with mlflow.start_run(), pytest.raises(OSError, match="disk full"):
        log_half()
    (logged,) = mlflow.search_logged_models(output_format="list")
    assert logged.status == "FAILED"
    assert not [path for path in (tmp_path / "mlruns").rglob("*") if path.is_file()]


@pytest.mark.models
def test_what_is_done_is_not_done_again_and_what_was_interrupted_is(place: Path):
    (place / "tiny" / "results" / "onnx_answer.json").unlink()
    written = (place / "tiny" / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    again = rehearse("--geometry", "tiny", "--folder", place, "--keep", "--output", place / "again")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done before") == 10
    assert (place / "tiny" / "checkpoint" / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.command
def test_without_room_it_says_what_it_needs_and_leaves_nothing(tmp_path: Path):
    refused = rehearse("--layers", 10**9, "--folder", tmp_path / "place", "--output", tmp_path)
    assert refused.returncode == 1
    assert "phi-3-mini, 1000000000 of 32 layers needs" in refused.stderr
    assert "GB of disk and" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.models
@pytest.mark.parametrize("precision", ["int8", "int4-default"])  # by one quantiser each
def test_the_lean_builder_writes_what_the_builder_writes(precision: str, tmp_path: Path):
    model = catalog.find("tiny-phi3")
    options = export.OPTIONS[precision]
    command = [sys.executable, BENCHMARKS / "lean_builder.py", "-m", "none", "-i", fetch.checkpoint(model)]
    bits = precision.removesuffix("-default")
    command += ["-o", tmp_path, "-p", bits, "-e", "cpu", "-c", tmp_path / "cache"]
    command += ["--extra_options", *options] if options else []
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    plain = export.onnx_folder(model, precision)
    # The builder stamps the file around the graph with the commit of whatever repository it lies in.
    graphs = [onnx.load(place / "model.onnx", load_external_data=False).graph for place in (tmp_path, plain)]
    assert graphs[0] == graphs[1]
    assert (tmp_path / "model.onnx.data").read_bytes() == (plain / "model.onnx.data").read_bytes()


@pytest.fixture
def rehearsal(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("rehearsal")


@pytest.fixture
def measured() -> dict:
    return json.loads((BENCHMARKS / "results" / "rehearsal.json").read_text("utf-8"))


def test_it_asks_for_as_much_as_it_then_took_and_hardly_more(rehearsal, measured):
    disk, memory = rehearsal.needs(rehearsal.random_phi3.GEOMETRIES["phi-3-mini"])
    kept = taken = 0
    for figures in measured["steps"].values():
        taken = max(taken, kept + figures["most_disk_bytes"])
        kept += figures["disk_bytes"]
    assert taken <= disk <= 1.05 * taken
    most = max(figures["resident_bytes"] for figures in measured["steps"].values())
    assert most <= memory <= 1.2 * most


def test_the_page_s_table_is_the_one_that_was_measured(rehearsal, measured):
    assert measured["geometry"]["parameters"] == 3_821_079_552
    table = rehearsal.table(measured["steps"])
    assert table in (BENCHMARKS / "README.md").read_text("utf-8")
