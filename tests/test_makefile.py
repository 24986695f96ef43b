"""What a reader puts on make's line stays text: no shell, and not make itself, takes it for code."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.__main__ import main
from helpers.environment import ROOT

pytestmark = pytest.mark.command

# Shows how a target calls a program: its words, and what it finds in the environment.
SHOW = f"""#!{sys.executable}
import json, os, sys
print(json.dumps({{"words": sys.argv[1:], "store": os.environ.get("MLFLOW_BACKEND_STORE_URI")}}))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """A folder with programs that only show how they were called."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("python", "mlflow", "jupyter"):
        (folder / name).write_text(SHOW, encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def called(programs: Path, target: str, **given: str) -> dict:
    """How `make TARGET NAME=VALUE …` calls its program; what the values start would run in `programs`."""
    values = [f"{name}={value}" for name, value in given.items()]
    command = ["make", "-C", str(ROOT), "-s", "-o", "setup", target, f"VENV={programs}", *values]
    lent = ("MODEL", "TRACKING_URI", "PARAMS", "NOTEBOOK")
    own = {name: value for name, value in os.environ.items() if name not in lent}
    made = subprocess.run(command, capture_output=True, text=True, env=own)
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout.replace(f"make: Entering directory '{ROOT}'\n", "").splitlines()[0])


def attacks(folder: Path) -> list[str]:
    mark = folder / "pwned"
    return [
        f"x'; touch {mark}; '",
        f'x"; touch {mark}; "',
        f"$(touch {mark})",
        f"$(shell touch {mark})",
        f"`touch {mark}`",
        f"x; touch {mark} #",
        f"x && touch {mark} | cat > {mark}",
        "$HOME $$HOME ${HOME} %s \\n \\ 'a' \"b\" {c}",
        "--help",
    ]


@pytest.mark.parametrize("number", range(9))
def test_a_value_on_makes_line_is_handed_on_as_it_is(programs, number):
    value = attacks(programs)[number]
    assert called(programs, "run", MODEL=value, TRACKING_URI=value) == {
        "words": ["-m", "helpers", "run", "-p", "model", value, "-p", "tracking_uri", value, "--words", ""],
        "store": None,
    }
    serve = called(programs, "serve", MODEL=value, TRACKING_URI=value)["words"]
    assert serve[3:] == [f"--tracking-uri={value}", f"--model={value}", "--words", ""]
    assert called(programs, "weights", MODEL=value)["words"][2:] == ["fetch", "--", value]
    assert called(programs, "ui", TRACKING_URI=value)["store"] == value
    assert called(programs, "lab", NOTEBOOK=value)["words"] == ["lab", value]
    assert called(programs, "run", PARAMS=value)["words"][3:] == ["--words", value]
    assert not (programs / "pwned").exists()


def test_without_values_the_targets_take_their_defaults(programs):
    assert called(programs, "run")["words"] == ["-m", "helpers", "run", "--words", ""]
    assert called(programs, "weights")["words"] == ["-m", "helpers", "fetch"]
    assert called(programs, "lab")["words"] == ["lab", "notebooks/01_TransformerPipeline.ipynb"]
    ui = called(programs, "ui")
    assert ui["words"] == ["ui", "--host", "127.0.0.1", "--port", "5000"]
    assert ui["store"] == f"sqlite:///{ROOT}/mlflow.db"


def test_clean_removes_what_was_made_here_and_spares_what_learners_wrote(tmp_path):
    kept = ["Makefile", "mlflow.db", "out/student/01.ipynb", "weights/tiny-phi3/manifest.json"]
    gone = [".venv/bin/python", "out/01.html", "out/.01.lock", "out/full/01.ipynb", "out/site/index.html"]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    for _ in range(2):  # again, with nothing left to remove
        subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
        assert [
            str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*")) if path.is_file()
        ] == kept
    shutil.rmtree(tmp_path / "out")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(min_size=1).filter(lambda text: not text.startswith("-")), min_size=1, max_size=3))
def test_words_are_split_as_a_shell_does_and_run_by_none(words):
    import shlex

    from helpers import __main__ as cli

    assert cli._spread(["run", "--words", shlex.join(words)]) == ["run", *words]


def test_words_that_end_in_the_middle_are_told(capsys):
    assert main(["run", "--words", "-p question 'Why"]) == 2
    assert capsys.readouterr().err.startswith('error: PARAMS="-p question \'Why" cannot be split into words')


@pytest.mark.parametrize("own", [{}, {"MLFLOW_DISABLE_TELEMETRY": "false"}])
def test_what_make_starts_reports_to_nobody_unless_told_so(own, tmp_path):
    (tmp_path / "mlflow").write_text(
        "#!/bin/sh\necho $MLFLOW_DISABLE_TELEMETRY $DO_NOT_TRACK\n", encoding="utf-8"
    )
    (tmp_path / "mlflow").chmod(0o755)
    names = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    given = {name: value for name, value in os.environ.items() if name not in names} | own
    command = ["make", "-C", str(ROOT), "-s", "-o", "setup", "ui", f"VENV={tmp_path}"]
    shown = subprocess.run(command, capture_output=True, text=True, env=given).stdout.splitlines()
    assert f"{own.get('MLFLOW_DISABLE_TELEMETRY', 'true')} true" in shown


def test_make_takes_the_environment_s_python_and_another_when_that_does_not_start(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    own = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]])

    def chosen(script: str) -> str:
        for name in ("python", "python3", f"python3.{sys.version_info.minor}"):
            (tmp_path / ".venv" / "bin" / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
            (tmp_path / ".venv" / "bin" / name).chmod(0o755)
        command = ["make", "-C", str(tmp_path), "--no-print-directory", "-n", "setup"]
        shown = subprocess.run(command, capture_output=True, text=True, env=own).stdout
        return shown.splitlines()[-1].removesuffix(" -m helpers setup")

    assert chosen(f'exec {sys.executable} "$@"') == ".venv/bin/python"
    assert Path(chosen("exit 1")).parent == Path(sys.executable).parent


def test_the_ui_opens_postgresql_with_the_driver_that_is_locked(programs):
    store = called(programs, "ui", TRACKING_URI="postgresql://me@db/mlflow")["store"]
    assert store == "postgresql+psycopg2://me@db/mlflow"


def test_make_test_ends_with_every_reason_for_which_a_test_is_left_out_and_how_to_run_it():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"]
    shown = subprocess.run(
        ["make", "-n", "-o", "setup", "test"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    last = shown.rpartition("pytest")[2].partition("\n")[2]
    for reason in {line.partition(":")[0] for line in settings["markers"]} - {"command", "key", "slow"}:
        assert reason in last
    assert "make test-slow" in last


@pytest.mark.parametrize(("fast", "slow", "code"), [(0, 0, 0), (1, 0, 2), (0, 1, 2), (1, 1, 2)])
def test_make_test_all_runs_both_parts_and_fails_if_either_does(fast, slow, code, tmp_path):
    (tmp_path / "ruff").write_text("#!/bin/sh\n", encoding="utf-8")
    (tmp_path / "pytest").write_text(
        f'#!/bin/sh\ncase "$*" in *"not slow"*) echo fast; exit {fast};; *) echo slow; exit {slow};; esac\n',
        encoding="utf-8",
    )
    for name in ("ruff", "pytest"):
        (tmp_path / name).chmod(0o755)
    command = ["make", "-C", ROOT, "-s", "-o", "setup", "test-all", f"VENV={tmp_path}"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == code
    assert re.findall("^(?:fast|slow)$", made.stdout, re.MULTILINE) == ["fast", "slow"]
