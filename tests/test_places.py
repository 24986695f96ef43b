"""A store moves with its folder, shares its large files, and is found below any path."""

import contextlib
import ntpath
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import transformers

from helpers import errors, faults, parameters, places, tracking
from helpers.models import folders, logged, onnx_chat_model
from helpers.serving import mlflow_server, openai_server

CANDIDATES = {"models:/slm-transformers@candidate": {"messages": [{"role": "user", "content": "Hi"}]}}
CANDIDATES["models:/slm-onnx@candidate"] = {"prompt": ["Hi"]}


def log_both(weights: Path) -> None:
    """Log tiny-phi3 as the two notebooks do, in the store in use."""
    chatbot = transformers.pipeline("text-generation", model=str(weights / "tiny-phi3/checkpoint"))
    options = {"max_new_tokens": 3, "do_sample": False}
    example = {"prompt": "Hi"}
    signature = mlflow.models.infer_signature(example, ["Hi"], onnx_chat_model.DEFAULT_PARAMS)
    with mlflow.start_run(run_name="of both"):
        pipeline = mlflow.transformers.log_model(
            chatbot, name="m", task="llm/v1/chat", pip_requirements=["mlflow"], model_config=options
        )
        wrapper = mlflow.pyfunc.log_model(
            name="m",
            python_model=onnx_chat_model.__file__,
            artifacts={"phi3-mini-onnx": places.as_uri(weights / "tiny-phi3/onnx-fp32")},
            signature=signature,
            pip_requirements=["mlflow"],
        )
        mlflow.log_text("kept", "note.txt")
    for name, info in {"slm-transformers": pipeline, "slm-onnx": wrapper}.items():
        tracking.share_files(info.model_uri)
        version = mlflow.register_model(info.model_uri, name)
        mlflow.MlflowClient().set_registered_model_alias(name, "candidate", version.version)


@pytest.fixture(scope="module")
def weights(tiny_phi3_checkpoint, tiny_phi3_onnx, tmp_path_factory) -> Path:
    """A weights folder of its own, with tiny-phi3 in it."""
    folder = tmp_path_factory.mktemp("weights")
    for source in (tiny_phi3_checkpoint, tiny_phi3_onnx):
        shutil.copytree(source, folder / "tiny-phi3" / source.name, copy_function=shutil.copyfile)
        os.utime(folder / "tiny-phi3" / source.name / folders.MANIFEST)
    return folder


@pytest.fixture(autouse=True)
def _weights_dir(weights, monkeypatch):
    monkeypatch.setenv("WEIGHTS_DIR", str(weights))


@pytest.fixture(scope="module")
def moved_store(weights, tmp_path_factory) -> Path:
    """A store with both models in it, moved since: the folder that its database names is gone."""
    old = tmp_path_factory.mktemp("checkout") / "old"
    old.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEIGHTS_DIR", str(weights))
        tracking.connect(f"sqlite:///{old}/mlflow.db", "e")
        log_both(weights)
    return old.rename(old.with_name("moved"))


@pytest.fixture
def checkout(moved_store, tmp_path) -> Path:
    return shutil.copytree(moved_store, tmp_path / "new")


def uri(folder: Path) -> str:
    return parameters.sqlite_uri(folder / "mlflow.db")


def answers() -> bool:
    return all(len(mlflow.pyfunc.load_model(name).predict(ask)) == 1 for name, ask in CANDIDATES.items())


def places_in(folder: Path) -> set[Path]:
    """The artifact folders that a database names."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        rows = [
            row
            for table, column, where in places._COLUMNS
            for row in database.execute(f"SELECT {column} FROM {table} WHERE {where}")
        ]
    found = [places.local_path(place) for (place,) in rows if place]
    return {next(p for p in (path, *path.parents) if p.name == places.FOLDER) for path in found if path}


def disk(*folders: Path) -> int:
    """Bytes on disk, each file counted once however many names it has."""
    stats = [path.stat() for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum({(each.st_dev, each.st_ino): each.st_size for each in stats}.values())


@pytest.mark.models
def test_a_store_that_has_moved_is_found_again_and_the_old_folder_is_not_made(checkout, moved_store, capsys):
    tracking.connect(uri(checkout), "e")
    assert f"was moved here from {moved_store.with_name('old')}" in capsys.readouterr().out
    assert answers()
    (run,) = mlflow.search_runs(output_format="list")
    assert mlflow.artifacts.load_text(f"{run.info.artifact_uri}/note.txt") == "kept"
    with mlflow.start_run():
        mlflow.log_text("new", "note.txt")
    # In another process: MLflow keeps in memory where this one has logged to.
    code = f"""
import mlflow
from helpers import tracking
tracking.connect({uri(checkout)!r}, "e")
mlflow.log_text("late", "late.txt", run_id={run.info.run_id!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not moved_store.with_name("old").exists()
    assert list((checkout / "mlruns").rglob("late.txt"))
    assert places_in(checkout) == {checkout / "mlruns"}
    tracking.connect(uri(checkout), "e")
    assert capsys.readouterr().out == ""


def test_a_copy_of_a_checkout_writes_to_its_own_folder_while_the_first_goes_on(checkout, tmp_path):
    tracking.connect(uri(checkout), "e")
    copy = shutil.copytree(checkout, tmp_path / "copy")
    before = sorted(checkout.rglob("*"))
    tracking.connect(uri(copy), "e")
    with mlflow.start_run():
        mlflow.log_text("new", "note.txt")
    assert places_in(copy) == {copy / "mlruns"}
    assert sorted(checkout.rglob("*")) == before
    assert places_in(checkout) == {checkout / "mlruns"}


def test_a_copy_of_the_database_alone_still_finds_what_stayed_behind(checkout, tmp_path):
    tracking.connect(uri(checkout), "e")
    (tmp_path / "backup").mkdir()
    shutil.copy(checkout / "mlflow.db", tmp_path / "backup")
    tracking.open_store(uri(tmp_path / "backup"))
    assert answers()


def test_a_store_reached_through_a_link_has_not_moved(checkout, tmp_path, capsys):
    tracking.connect(uri(checkout), "e")
    (tmp_path / "link").symlink_to(checkout)
    capsys.readouterr()
    tracking.connect(uri(tmp_path / "link"), "e")
    assert capsys.readouterr().out == ""
    assert places_in(checkout) == {checkout / "mlruns"}


def test_an_experiment_with_a_place_of_its_own_keeps_it(checkout, tmp_path):
    tracking.connect(uri(checkout), "e")
    elsewhere = tmp_path / "disk" / "mlruns"
    elsewhere.mkdir(parents=True)
    mlflow.create_experiment("apart", artifact_location=elsewhere.as_uri())
    mlflow.create_experiment("far", artifact_location="s3://bucket/mlruns")
    tracking.connect(uri(checkout), "apart")
    assert mlflow.get_experiment_by_name("apart").artifact_location == elsewhere.as_uri()
    assert mlflow.get_experiment_by_name("far").artifact_location == "s3://bucket/mlruns"
    elsewhere.parent.rename(tmp_path / "unmounted")
    with pytest.raises(errors.StoreFault, match=r"'apart' keeps its files in .* -p experiment apart-2"):
        tracking.connect(uri(checkout), "apart")
    assert mlflow.get_experiment_by_name("apart").artifact_location == elsewhere.as_uri()


@pytest.mark.server
@pytest.mark.parametrize("moved_before", [False, True])
def test_a_model_whose_files_are_gone_is_named_wherever_it_is_asked_for(
    checkout, moved_before, monkeypatch, tmp_path
):
    if not moved_before:
        tracking.connect(uri(checkout), "e")
    shutil.rmtree(checkout / "mlruns")
    tracking.connect(uri(checkout), "e")
    assert not any(tracking.has_files(name) for name in CANDIDATES)
    sentence = f"are gone: .*{checkout.name}/mlruns/models.* rm -rf"
    name = "models:/slm-onnx@candidate"
    with pytest.raises(errors.StoreFault, match=sentence), mlflow_server.serve(name):
        pass
    with pytest.raises(errors.StoreFault, match=sentence):
        logged.check(name)
    with pytest.raises(mlflow.MlflowException) as caught:
        mlflow.pyfunc.load_model(name)
    assert "gone from the MLflow store" in faults.explain(caught.value)
    if moved_before:
        with pytest.raises(RuntimeError, match="are gone"), openai_server.running(name):
            pass


def test_default_and_experiments_of_mlflows_pages_lie_beside_the_database(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    mlflow.set_tracking_uri(uri(tmp_path))
    mlflow.create_experiment("made in a browser", artifact_location="mlflow-artifacts:/7")
    for name in ("Default", "made in a browser"):
        tracking.connect(uri(tmp_path), name)
        with mlflow.start_run() as run:
            mlflow.log_text("hello", "note.txt")
        assert run.info.artifact_uri.startswith((tmp_path / "mlruns").as_uri())
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.models
@pytest.mark.parametrize("name", ["a%2Fb", "a?b#c", "100% 数据 ü"])
def test_a_store_and_a_model_lie_below_any_path(weights, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / name
    shutil.copytree(weights / "tiny-phi3/onnx-fp32", folder / name)
    for given in (uri(folder), f"sqlite:///{folder}/mlflow.db"):
        tracking.connect(given, "e")
    with mlflow.start_run():
        info = mlflow.pyfunc.log_model(
            name="m",
            python_model=onnx_chat_model.__file__,
            artifacts={"phi3-mini-onnx": places.as_uri(folder / name)},
            pip_requirements=["mlflow"],
        )
    assert tracking.has_files(info.model_uri)
    ask = "predict({'prompt': ['Hi']})"
    code = f"import mlflow; print(len(mlflow.pyfunc.load_model({info.model_uri!r}).{ask}))"
    own = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}
    child = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, encoding="utf-8")
    assert child.stdout.splitlines()[-1:] == ["1"], child.stderr
    assert list((folder / "mlruns/models").rglob("model.onnx.data"))
    folder.rename(tmp_path / "plain")
    tracking.connect(uri(tmp_path / "plain"), "e")
    assert mlflow.pyfunc.load_model(info.model_uri)


@pytest.mark.models
def test_logging_again_takes_no_further_room_and_deleting_harms_nothing(weights, tmp_path):
    large = sum(path.stat().st_size for path in weights.rglob("*") if path.stat().st_size > tracking.LARGE)
    tracking.connect(uri(tmp_path), "e")
    sizes = []
    for _ in range(2):
        log_both(weights)
        sizes.append(disk(weights, tmp_path / "mlruns"))
    assert sizes[1] - sizes[0] < large / 4
    assert sizes[0] - disk(weights) < large / 4
    kept = {path: folders.sha256(path) for path in weights.rglob("*") if path.is_file()}
    linked = [
        path for path in (tmp_path / "mlruns").rglob("*") if path.is_file() and path.stat().st_nlink > 1
    ]
    assert {path.name for path in linked} == {"model.safetensors", "model.onnx.data"}
    assert {path.stat().st_mode & 0o777 for path in linked} == {0o444}
    assert {path.stat().st_ino for path in linked} <= {path.stat().st_ino for path in kept}
    for model in mlflow.search_logged_models(output_format="list")[:2]:
        mlflow.MlflowClient().delete_logged_model(model.model_id)
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri(tmp_path)]
    own = os.environ | {"MLFLOW_TRACKING_URI": uri(tmp_path)}
    subprocess.run(command, check=True, capture_output=True, env=own)
    assert len(list((tmp_path / "mlruns/models").glob("*/artifacts/MLmodel"))) == 2
    shutil.rmtree(tmp_path / "mlruns")
    assert {path: folders.sha256(path) for path in kept} == kept
    # What made the weights still finds them whole, and may replace them.
    manifest = folders.read_manifest(weights / "tiny-phi3/checkpoint")
    assert folders.is_complete(weights / "tiny-phi3/checkpoint", manifest["recipe"])
    folders.verify(weights / "tiny-phi3/checkpoint")


def test_deleting_the_weights_leaves_the_logged_models(weights, tmp_path, monkeypatch):
    own = shutil.copytree(weights, tmp_path / "weights")
    monkeypatch.setenv("WEIGHTS_DIR", str(own))
    tracking.connect(uri(tmp_path), "e")
    log_both(own)
    with folders.building(own / "tiny-phi3/checkpoint", {"another": "recipe"}, label="another") as staging:
        (staging.path / "model.safetensors").write_bytes(b"another")
    shutil.rmtree(own)
    assert answers()


def test_without_the_weights_a_second_copy_is_shared_with_the_first(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTS_DIR", str(tmp_path / "none"))
    tracking.connect(uri(tmp_path), "e")
    log_both(weights)
    first = disk(tmp_path / "mlruns")
    log_both(weights)
    assert disk(tmp_path / "mlruns") < 1.25 * first


def test_files_that_only_look_alike_are_not_shared(weights, tmp_path):
    tracking.connect(uri(tmp_path), "e")
    log_both(weights)
    (logged,) = (tmp_path / "mlruns").rglob("model.safetensors")
    content = bytearray(logged.read_bytes())
    content[-1] ^= 1
    logged.unlink()
    logged.write_bytes(content)
    tracking.share_files("models:/slm-transformers@candidate")
    assert logged.read_bytes() == content
    assert logged.stat().st_nlink == 1


def test_where_the_system_refuses_a_link_the_copy_stays(weights, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    # As on a file system without links, or on another disk.
    monkeypatch.setattr(os, "link", refuse)
    tracking.connect(uri(tmp_path), "e")
    log_both(weights)
    assert answers()
    files = [path for path in (tmp_path / "mlruns").rglob("*") if path.is_file()]
    assert {path.stat().st_nlink for path in files} == {1}
    assert not [path for path in files if path.name.endswith(".link")]


def test_a_path_on_another_drive_of_windows_is_shown_whole(monkeypatch):
    assert places.relative(Path.cwd() / "out" / "01.html") == "out/01.html"
    monkeypatch.setattr(os, "path", ntpath)  # the rules of Windows, where this working folder has no drive
    assert places.relative("D:/out/01.html").endswith("D:/out/01.html")
