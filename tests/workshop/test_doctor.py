"""The doctor says what is here and what is missing, before and after set-up, and ends with 1 for a need."""

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from helpers import ROOT, environment, processes
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
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        (library(clone) / path.name).symlink_to(path)
    # The last step of a set-up; in the clone, as the place is part of it.
    code = (
        "from helpers import environment;"
        "stamp = environment.ROOT / '.venv' / environment.STAMP;"
        "stamp.write_text(environment._fingerprint(stamp.parent, environment.LOCK))"
    )
    subprocess.run([clone / ".venv/bin/python", "-c", code], cwd=clone, check=True)
    return clone


def library(clone: Path) -> Path:
    home = str(clone / ".venv")
    return Path(sysconfig.get_path("purelib", "venv", vars={"base": home, "installed_base": home}))


def doctor(clone: Path, *arguments: str, start: tuple = (sys.executable,), **variables) -> dict[str, tuple]:
    """{topic: (state, text)} of a doctor that knows none of the settings here.

    Args:
        start: the Python that asks, and its options; here one with the packages, as conda's is.
    """
    child = subprocess.run(
        [*start, "-B", "-m", "helpers", "doctor", *arguments],
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
    return findings


NO_PACKAGES = (sys.executable, "-S")


def test_before_set_up_a_bare_python_hears_the_next_step_and_nothing_is_written(clone):
    before = sorted(clone.rglob("*"))
    found = doctor(clone, start=NO_PACKAGES)
    assert found["Python"][0] == "OK"
    state, text = found["packages"]
    assert state == "TO DO"
    assert text.startswith("no complete environment here. Run: make setup (it needs 2.5 GB of disk")
    assert sorted(clone.rglob("*")) == before


@pytest.mark.environment
def test_a_complete_machine_hears_so_from_any_python(set_up, smollm2_checkpoint):
    found = doctor(set_up, start=NO_PACKAGES, WEIGHTS_DIR=fetch.weights_dir())
    assert found["packages"] == ("OK", f"{len(environment.locked())} as locked")
    assert {state for state, _ in found.values()} == {"OK"}
    assert "checkpoint" in found["model"][1]


@pytest.mark.environment
def test_a_missing_package_and_another_version_are_named_with_the_fix(set_up):
    (installed,) = library(set_up).glob("tqdm-*.dist-info")
    metadata = (installed / "METADATA").read_text("utf-8")
    installed.unlink()
    installed.mkdir()
    (installed / "METADATA").write_text(
        metadata.replace(f"\nVersion: {environment.locked()['tqdm']}", "\nVersion: 0.1"), encoding="utf-8"
    )
    next(library(set_up).glob("papermill-*.dist-info")).unlink()
    state, text = doctor(set_up, start=NO_PACKAGES)["packages"]
    assert state == "TO DO"
    assert "papermill is missing, not " in text
    assert f"tqdm is 0.1, not {environment.locked()['tqdm']}" in text
    assert "Delete .venv, then run: make setup" in text


@pytest.mark.environment
def test_an_environment_that_was_not_set_up_to_the_end_is_noticed(set_up):
    (set_up / ".venv/setup.stamp").unlink()
    text = "as locked, but set up elsewhere, by another Python or not to the end. Run: make setup"
    assert doctor(set_up, start=NO_PACKAGES)["packages"] == ("TO DO", text)


@pytest.mark.environment
def test_an_environment_whose_python_is_gone_is_noticed(set_up):
    for link in (set_up / ".venv/bin").glob("python*"):
        link.unlink()
        link.symlink_to("/nowhere/python")
    state, text = doctor(set_up, start=NO_PACKAGES)["packages"]
    assert state == "TO DO"
    assert text.startswith("no complete environment here. Delete .venv, then run: make setup")


def test_an_environment_of_conda_needs_no_venv(clone):
    assert doctor(clone)["packages"] == ("OK", f"{len(environment.locked())} as locked")


def test_a_damaged_byte_in_a_copied_model_is_noticed(clone, tmp_path, tiny_phi3_checkpoint):
    copy = shutil.copytree(tiny_phi3_checkpoint, tmp_path / "weights/tiny-phi3/checkpoint")
    asked = ("--model", "tiny-phi3")
    state, text = doctor(clone, *asked, WEIGHTS_DIR=tmp_path / "weights")["model"]
    assert state == "OK"
    assert text.startswith(f"checkpoint in {copy.parent}, checksums right")
    with (copy / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last[0] ^ 1]))
    state, text = doctor(clone, *asked, WEIGHTS_DIR=tmp_path / "weights")["model"]
    assert state == "TO DO"
    assert f"model.safetensors in {copy} is missing or differs" in text


def test_a_model_that_would_have_to_be_fetched_is_missing(clone, tmp_path):
    state, text = doctor(clone, WEIGHTS_DIR=tmp_path / "weights")["model"]
    assert state == "TO DO"
    assert text.startswith(f"smollm2-135m lacks checkpoint in {tmp_path / 'weights'}. Run: make weights")


def test_a_model_that_cannot_be_meant_is_one_sentence_and_exit_code_2(clone):
    command = [sys.executable, "-m", "helpers", "doctor", "--model", "phi-33"]
    child = subprocess.run(command, cwd=clone, env=BARE, capture_output=True, text=True)
    assert child.returncode == 2
    assert child.stderr.startswith("error: model='phi-33' is not one of")
    assert child.stderr.count("\n") == 1


def test_disk_is_asked_for_as_the_model_needs_it(clone):
    needed = {}
    for model in ("tiny-phi3", "smollm2-135m", "phi-3-mini"):
        text = doctor(clone, "--model", model, WEIGHTS_DIR=clone / "weights")["disk"][1]
        needed[model] = float(re.search(r"([\d.,]+) GB needed", text)[1])
    # See docs/models.md.
    assert needed == {"tiny-phi3": 0.0, "smollm2-135m": 3.1, "phi-3-mini": 23.5}


def test_a_disk_that_is_too_small_is_noticed(clone, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=1m small {small} && exec "$@"', "sh")
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a small disk (unshare -rm)")
    state, text = doctor(clone, start=(*mount, sys.executable), WEIGHTS_DIR=small / "weights")["disk"]
    assert state == "TO DO"
    assert text.startswith(f"{small} has 0.0 GB free, 3.1 GB needed. Free some, or set WEIGHTS_DIR")


# The store


def test_a_tracking_server_that_is_down_is_missing(clone):
    state, text = doctor(clone, "--tracking-uri", "http://127.0.0.1:9")["store"]
    assert state == "TO DO"
    assert "does not answer" in text


def test_a_store_that_the_environment_names_wrongly_is_refused_in_the_variables_name(clone):
    state, text = doctor(clone, MLFLOW_TRACKING_URI="./mlruns")["store"]
    assert state == "TO DO"
    assert text.startswith("MLFLOW_TRACKING_URI='./mlruns' is not")


@pytest.mark.server
def test_a_tracking_server_is_asked_whether_it_is_one(clone, tmp_path):
    port = processes.free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
    with processes.running(command, port, "a tracking server", 600) as url:
        assert doctor(clone, "--tracking-uri", url)["store"] == ("OK", f"{url} answers")


@pytest.mark.server
def test_what_answers_but_is_no_tracking_server_is_noticed(clone, tmp_path):
    port = processes.free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    (tmp_path / "health").touch()  # so that it looks healthy
    command += ["--directory", str(tmp_path)]
    with processes.running(command, port, "a web server", 600) as url:
        state, text = doctor(clone, MLFLOW_TRACKING_URI=url)["store"]
    assert state == "TO DO"
    assert text.startswith(f"{url} does not answer as MLflow does (HTTP 404)")


def test_a_database_that_cannot_be_written_is_missing(clone, tmp_path):
    file = tmp_path / "mlflow.db"
    uri = f"sqlite:///{file}"
    with contextlib.closing(sqlite3.connect(file)) as other:
        other.execute("create table runs (id)")
        other.commit()
        assert doctor(clone, "--tracking-uri", uri)["store"] == ("OK", f"{file} can be used")
        other.execute("begin exclusive")
        state, text = doctor(clone, "--tracking-uri", uri)["store"]
    assert state == "TO DO"
    assert text.startswith(f"{file}: The database of the MLflow store is locked")
    file.write_bytes(b"not a database, though it is long enough to be taken for one" * 20)
    assert "not a database" in doctor(clone, "--tracking-uri", uri)["store"][1]
    nowhere = f"sqlite:///{tmp_path}/nowhere/mlflow.db"
    assert "folder that does not exist" in doctor(clone, "--tracking-uri", nowhere)["store"][1]


def test_an_unsupported_python_hears_which_ones_are(clone):
    code = (
        "import sys; sys.version_info = (3, 10, 1, 'final', 0)\n"
        "from helpers.__main__ import main; sys.exit(main(['doctor']))"
    )
    child = subprocess.run([*NO_PACKAGES, "-c", code], cwd=clone, env=BARE, capture_output=True, text=True)
    assert child.returncode == 1
    assert "is not 3.11, 3.12 or 3.13. Install one and name it: make setup PYTHON=" in child.stdout


def test_make_doctor_asks_for_no_set_up(clone):
    shutil.copy(ROOT / "Makefile", clone)
    # The Python below this environment, which has none of its packages, also where .venv/bin leads PATH.
    bare = f"PYTHON={Path(sys.base_prefix) / 'bin/python3'}"
    child = subprocess.run(["make", "doctor", bare], cwd=clone, env=BARE, capture_output=True, text=True)
    assert "no complete environment here" in child.stdout
    assert not (clone / ".venv").exists()
