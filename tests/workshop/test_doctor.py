"""The doctor says what is here and what is missing, before and after set-up, and ends with 1 for a need."""

import contextlib
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import mlflow
import pytest

from helpers import ROOT, environment, processes, tracking
from helpers.models import fetch

pytestmark = pytest.mark.command

BARE = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}


@pytest.fixture
def clone(tmp_path) -> Path:
    """What a fresh clone holds, as far as the doctor looks."""
    shutil.copytree(
        ROOT / "helpers", tmp_path / "clone/helpers", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / "clone")
    return tmp_path / "clone"


@pytest.fixture
def set_up(clone) -> Path:
    """The clone with a .venv of its own, whose packages are links to those installed here."""
    venv.create(clone / ".venv")
    for key in ("purelib", "data"):
        source = Path(sysconfig.get_path(key)) / ("" if key == "purelib" else "share/jupyter")
        for path in source.iterdir():
            link = library(clone, key) / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    (clone / ".venv/bin/pip").touch()  # without it an environment counts as not made to the end
    # The last step of a set-up; in the clone, as the place is part of it.
    code = (
        "from helpers import environment;"
        "stamp = ROOT / '.venv' / environment.STAMP;"
        "stamp.write_text(environment._fingerprint(environment.LOCK))"
    )
    subprocess.run([clone / ".venv/bin/python", "-c", code], cwd=clone, check=True)
    return clone


def library(clone: Path, key: str = "purelib") -> Path:
    home = str(clone / ".venv")
    found = sysconfig.get_path(key, "venv", vars={"base": home, "platbase": home, "installed_base": home})
    return Path(found) / ("share/jupyter" if key == "data" else "")


def doctor(clone: Path, *arguments: str, prefix: tuple = (), **variables) -> tuple[int, dict[str, tuple]]:
    """Exit code and {topic: (state, text)} of a doctor whose own Python sees no packages and no settings."""
    child = subprocess.run(
        [*prefix, sys.executable, "-S", "-B", "-m", "helpers", "doctor", *arguments],
        cwd=clone,
        env=BARE | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
    )
    assert not child.stderr
    lines = child.stdout.splitlines()
    findings = {line[7:19].strip(): (line[:7].strip(), line[19:]) for line in lines[:-1]}
    assert {state for state, _ in findings.values()} <= {"OK", "TO DO", "NOTE"}
    needed = [topic for topic, (state, _) in findings.items() if state == "TO DO"]
    assert lines[-1] == (f"Missing: {', '.join(needed)}." if needed else "Everything needed is here.")
    assert child.returncode == (1 if needed else 0)
    return child.returncode, findings


def test_before_set_up_a_bare_python_is_told_each_next_step_and_nothing_is_written(clone):
    before = sorted(clone.rglob("*"))
    code, found = doctor(clone)
    assert code == 1
    assert found["Python"][0] == found["disk"][0] == found["tracking"][0] == "OK"
    assert found["packages"] == ("TO DO", "no environment yet. Run: make setup")
    assert found["model"][0] == "TO DO"
    assert "make weights" in found["model"][1]
    assert sorted(clone.rglob("*")) == before


@pytest.mark.environment
def test_a_complete_machine_is_told_so(set_up, smollm2_checkpoint):
    code, found = doctor(set_up, WEIGHTS_DIR=fetch.weights_dir())
    assert code == 0, found
    assert found["packages"][1] == f"{len(environment.locked())} as locked"
    assert found["kernel"][0] == found["disk"][0] == found["offline"][0] == "OK"
    assert "checkpoint" in found["model"][1]


@pytest.mark.environment
def test_a_missing_package_and_another_version_are_named_with_the_mend(set_up):
    (installed,) = library(set_up).glob("tqdm-*.dist-info")
    metadata = (installed / "METADATA").read_text("utf-8")
    installed.unlink()
    installed.mkdir()
    (installed / "METADATA").write_text(
        metadata.replace(f"\nVersion: {environment.locked()['tqdm']}", "\nVersion: 0.1"), encoding="utf-8"
    )
    next(library(set_up).glob("papermill-*.dist-info")).unlink()
    code, found = doctor(set_up)
    assert code == 1
    state, text = found["packages"]
    assert state == "TO DO"
    assert f"missing: papermill; tqdm 0.1 instead of {environment.locked()['tqdm']}" in text
    assert "setup.stamp" in text
    assert "packages" in found["offline"][1]


@pytest.mark.environment
def test_an_environment_that_was_not_set_up_to_the_end_is_noticed(set_up):
    (set_up / ".venv/setup.stamp").unlink()
    assert doctor(set_up)[1]["packages"] == (
        "TO DO",
        "as locked, but set up elsewhere, by another Python or not to the end. Run: make setup",
    )


@pytest.mark.environment
def test_an_environment_whose_python_is_gone_is_made_anew(set_up):
    for link in (set_up / ".venv/bin").glob("python*"):
        link.unlink()
        link.symlink_to("/nowhere/python")
    text = "the Python that .venv was made with is gone. Run: make setup"
    assert doctor(set_up)[1]["packages"] == ("TO DO", text)


@pytest.mark.environment
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [(["-S"], "python3 does not start"), ([], "python3 belongs to")],
    ids=["one that dies", "another environment's"],
)
def test_a_kernel_of_that_name_from_elsewhere_is_noticed(set_up, tmp_path, flags, sentence):
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, *flags, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    listed = ", ".join(f'"{part}"' for part in argv)
    (spec / "kernel.json").write_text(
        f'{{"argv": [{listed}], "display_name": "stray", "language": "python"}}', encoding="utf-8"
    )
    state, text = doctor(set_up, JUPYTER_PATH=tmp_path / "jupyter")[1]["kernel"]
    assert state == "TO DO"
    assert text.startswith(sentence)


@pytest.mark.environment
def test_a_damaged_byte_in_a_copied_model_is_noticed(set_up, tmp_path, tiny_phi3_checkpoint):
    copy = shutil.copytree(tiny_phi3_checkpoint, tmp_path / "weights/tiny-phi3/checkpoint")
    assert doctor(set_up, "--model", "tiny-phi3", WEIGHTS_DIR=tmp_path / "weights")[1]["model"][0] == "NOTE"
    with (copy / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last[0] ^ 1]))
    code, found = doctor(set_up, "--model", "tiny-phi3", WEIGHTS_DIR=tmp_path / "weights")
    assert code == 1
    assert found["model"][0] == "TO DO"
    assert f"model.safetensors in {copy} is missing or differs" in found["model"][1]


@pytest.mark.environment
def test_a_model_that_would_have_to_be_fetched_is_missing(set_up, tmp_path):
    code, found = doctor(set_up, WEIGHTS_DIR=tmp_path / "weights")
    assert code == 1
    assert found["model"][1].startswith(
        f"smollm2-135m lacks checkpoint in {tmp_path / 'weights'}. Run: make weights"
    )


def test_an_environment_of_conda_needs_no_venv(clone):
    # Not bare: the Python that asks is the one that has the packages.
    command = [sys.executable, "-m", "helpers", "doctor"]
    shown = subprocess.run(command, cwd=clone, capture_output=True, text=True).stdout
    assert f"{len(environment.locked())} as locked" in shown


def test_a_taken_port_is_a_note_with_the_way_round(clone):
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # someone else has it: taken all the same
            other.bind(("127.0.0.1", 5000))
        other.listen()
        state, text = doctor(clone)[1]["port 5000"]
    assert state == "NOTE"
    assert "make ui PORT=5001" in text
    assert 'make classroom PARAMS="--port 5001"' in text


def test_disk_and_memory_are_asked_for_as_the_model_needs_them(clone):
    needed = {}
    for model in ("tiny-phi3", "smollm2-135m", "phi-3-mini"):
        found = doctor(clone, "--model", model, WEIGHTS_DIR=clone / "weights")[1]
        texts = [found[topic][1] for topic in ("disk", "memory")]
        needed[model] = [float(re.search(r"([\d.,]+) GB needed", text)[1]) for text in texts]
    # 2.5 GB of it are the environment, which this clone lacks; see Phi-3-mini in docs/models.md.
    assert needed == {"tiny-phi3": [2.5, 4.0], "smollm2-135m": [5.6, 4.0], "phi-3-mini": [26.0, 8.7]}


def test_a_disk_that_is_too_small_is_noticed(clone, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=1m small {small} && exec "$@"', "sh")
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a small disk (unshare -rm)")
    code, found = doctor(clone, prefix=mount, WEIGHTS_DIR=small / "weights")
    assert code == 1
    assert found["disk"][0] == "TO DO"
    assert f"{small} has 0.0 GB free, 1.5 GB needed. Free some, or set WEIGHTS_DIR" in found["disk"][1]


def test_a_tracking_server_that_is_down_is_missing(clone):
    code, found = doctor(clone, "--tracking-uri", "http://127.0.0.1:9")
    assert code == 1
    assert found["tracking"][0] == "TO DO"
    assert "does not answer" in found["tracking"][1]


@pytest.mark.server
def test_a_tracking_server_is_asked_for_experiments_and_artifacts_and_keeps_nothing(clone, tmp_path):
    port, artifacts = processes.free_port(), tmp_path / "artifacts"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        artifacts,
    ]
    with processes.running([*map(str, command)], port, "a tracking server", 600) as url:
        findings = doctor(clone, "--tracking-uri", url)[1]
    assert findings["tracking"] == ("OK", f"{url} answers, finds experiments and takes artifacts")
    assert not [path for path in artifacts.rglob("*") if path.is_file()]
    with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
        assert database.execute("select count(*) from experiments").fetchone() == (1,)
        assert database.execute("select count(*) from runs").fetchone() == (0,)


@pytest.mark.server
def test_what_answers_but_is_no_tracking_server_is_noticed(clone, tmp_path):
    port = processes.free_port()
    command = [
        sys.executable,
        "-m",
        "http.server",
        str(port),
        "--bind",
        "127.0.0.1",
        "--directory",
        str(tmp_path),
    ]
    (tmp_path / "health").touch()  # so that it looks healthy
    with processes.running(command, port, "a web server", 600) as url:
        state, text = doctor(clone, MLFLOW_TRACKING_URI=url)[1]["tracking"]
    assert (state, text) == (
        "TO DO",
        f"{url} answers 501 to /api/2.0/mlflow/experiments/search. Ask who runs it",
    )


def test_a_database_that_cannot_be_written_is_missing(clone, tmp_path):
    file = tmp_path / "mlflow.db"
    uri = f"sqlite:///{file}"
    with contextlib.closing(sqlite3.connect(file)) as other:
        other.execute("create table runs (id)")
        other.commit()
        assert doctor(clone, "--tracking-uri", uri)[1]["tracking"] == ("OK", f"{file} can be written")
        other.execute("begin exclusive")
        state, text = doctor(clone, "--tracking-uri", uri)[1]["tracking"]
    assert state == "TO DO"
    assert text.startswith(f"{file}: The database of the MLflow store is locked")
    file.write_bytes(b"not a database, though it is long enough to be taken for one" * 20)
    assert "not a database" in doctor(clone, "--tracking-uri", uri)[1]["tracking"][1]
    nowhere = f"sqlite:///{tmp_path}/nowhere/mlflow.db"
    assert "folder that does not exist" in doctor(clone, "--tracking-uri", nowhere)[1]["tracking"][1]


@pytest.fixture
def store(tmp_path, log_wrapper, tiny_phi3_onnx) -> Path:
    """The folder of a store in which a model is registered."""
    before = mlflow.get_tracking_uri()
    (tmp_path / "store").mkdir()
    tracking.connect(f"sqlite:///{tmp_path}/store/mlflow.db", "small-language-models")
    with mlflow.start_run():
        tracking.share_files(log_wrapper(tiny_phi3_onnx).model_uri)
    mlflow.set_tracking_uri(before)
    return tmp_path / "store"


def test_what_a_store_takes_what_moved_and_what_is_gone_is_told(clone, store):
    uri = f"sqlite:///{store}/mlflow.db"
    assert doctor(clone, "--tracking-uri", uri)[1]["tracking"] == ("OK", f"{store}/mlflow.db can be written")
    state, text = doctor(clone, "--tracking-uri", uri)[1]["store"]
    assert state == "NOTE"
    assert re.match(rf"{store}/mlruns takes 0 MB of disk, and shares 1 MB with weights/\. To free some", text)
    assert f"mlflow gc --backend-store-uri {uri}" in text
    assert f"rm -rf {store}/mlflow.db* {store}/mlruns" in text

    moved = store.rename(store.with_name("moved"))
    before = sorted(moved.parent.rglob("*"))
    state, text = doctor(clone, "--tracking-uri", f"sqlite:///{moved}/mlflow.db")[1]["tracking"]
    assert state == "NOTE"
    assert f"it was moved here from {store}, and is set right when next used" in text
    assert sorted(moved.parent.rglob("*")) == before

    shutil.rmtree(moved / "mlruns")
    state, text = doctor(clone, "--tracking-uri", f"sqlite:///{moved}/mlflow.db")[1]["tracking"]
    assert state == "NOTE"
    assert f"the files of slm-onnx/1 are gone from {moved}/mlruns" in text
    assert "rm -rf" in text


@pytest.mark.environment
def test_a_deleted_experiment_a_newer_mlflow_and_damage_are_noticed(clone, set_up, store):
    file = store / "mlflow.db"
    uri = f"sqlite:///{file}"

    def change(statement: str) -> None:
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute(statement)
            database.commit()

    change("UPDATE experiments SET lifecycle_stage = 'deleted' WHERE name = 'small-language-models'")
    state, text = doctor(clone, "--tracking-uri", uri)[1]["tracking"]
    assert state == "TO DO"
    assert "'small-language-models' was deleted, and its name stays taken" in text
    assert f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id 1" in text
    change("UPDATE experiments SET name = 'a learner', lifecycle_stage = 'deleted' WHERE experiment_id = 1")
    assert doctor(clone, "--tracking-uri", uri)[1]["tracking"][0] == "NOTE"
    change("UPDATE alembic_version SET version_num = 'f00dfeed0001'")
    state, text = doctor(set_up, "--tracking-uri", uri)[1]["tracking"]
    assert state == "TO DO"
    assert f"{file} was written by a newer MLflow than" in text
    content = bytearray(file.read_bytes())
    content[4096 * 3 : 4096 * 4] = b"?" * 4096
    file.write_bytes(content)
    state, text = doctor(clone, "--tracking-uri", uri)[1]["tracking"]
    assert state == "TO DO"
    assert f"{file} is damaged (" in text


def test_the_experiments_that_the_doctor_looks_for_are_the_notebooks_own():
    from helpers.serving import model_process
    from helpers.workshop import doctor as module
    from helpers.workshop import notebooks

    used = {
        notebooks.declared(path)["experiment"]["default"].strip('"') for path in notebooks.NOTEBOOKS.values()
    }
    assert {*used, model_process.TRACES} == set(module.EXPERIMENTS)


def test_a_store_that_the_environment_names_wrongly_is_refused_in_the_variables_name(clone):
    state, text = doctor(clone, MLFLOW_TRACKING_URI="./mlruns")[1]["tracking"]
    assert state == "TO DO"
    assert text.startswith("MLFLOW_TRACKING_URI='./mlruns' is not")


def test_a_wheelhouse_for_another_python_is_a_note(clone):
    (clone / "wheelhouse").mkdir()
    (clone / "wheelhouse" / environment.CONTENTS).write_text(
        "# Plan9 z80 with Python 3.99\n# requirements.lock 0\n", encoding="utf-8"
    )
    state, text = doctor(clone)[1]["wheelhouse"]
    assert state == "NOTE"
    assert "was made for Plan9 z80 with Python 3.99, and this is" in text


def test_an_unsupported_python_is_told_which_ones_are(clone):
    code = (
        "import sys; sys.version_info = (3, 10, 1, 'final', 0)\n"
        "from helpers.__main__ import main; sys.exit(main(['doctor']))"
    )
    child = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=clone, env=BARE, capture_output=True, text=True
    )
    assert child.returncode == 1
    assert "is not 3.11, 3.12 or 3.13. Install one and name it: make setup PYTHON=" in child.stdout


def test_a_model_that_cannot_be_meant_is_one_sentence_and_exit_code_2(clone):
    command = [sys.executable, "-S", "-m", "helpers", "doctor", "--model", "phi-33"]
    child = subprocess.run(command, cwd=clone, env=BARE, capture_output=True, text=True)
    assert child.returncode == 2
    assert child.stderr.startswith("error: model='phi-33' is not one of")
    assert child.stderr.count("\n") == 1


def test_make_doctor_asks_for_no_set_up(clone):
    shutil.copy(ROOT / "Makefile", clone)
    # The Python below this environment, which has none of its packages, also where .venv/bin leads PATH.
    bare = f"PYTHON={Path(sys.base_prefix) / 'bin/python3'}"
    child = subprocess.run(["make", "doctor", bare], cwd=clone, env=BARE, capture_output=True, text=True)
    assert "no environment yet" in child.stdout
    assert not (clone / ".venv").exists()
