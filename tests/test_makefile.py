"""Make's targets are short names: what is given on make's line reaches the command behind them."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from helpers import ROOT

pytestmark = pytest.mark.command


def last_line(*words: str) -> str:
    """The last line that `make TARGET NAME=VALUE …` would run."""
    own = {
        name: value for name, value in os.environ.items() if name not in ("MODEL", "TRACKING_URI", "PARAMS")
    }
    command = ["make", "-C", ROOT, "--no-print-directory", "-n", "-o", "setup", *words]
    made = subprocess.run(command, capture_output=True, text=True, env=own, check=True)
    return " ".join(made.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["run"], "-m helpers run"),
        (
            ["run", "MODEL=tiny-phi3", "TRACKING_URI=http://h:1", "PARAMS=-p question 'Why?'"],
            """-m helpers run -p model "tiny-phi3" -p tracking_uri "http://h:1" -p question 'Why?'""",
        ),
        (
            ["serve", "MODEL=models:/m/1", "PARAMS=--port 8001"],
            '-m helpers serve --model "models:/m/1" --port 8001',
        ),
        (["weights"], "-m helpers fetch"),
        (["weights", "MODEL=a folder/of mine"], '-m helpers fetch "a folder/of mine"'),
        (["ui"], "-m helpers ui --port 5000"),
        (
            ["ui", "PORT=5001", "TRACKING_URI=postgresql://me@db/m"],
            '-m helpers ui --port 5001 --tracking-uri "$TRACKING_URI"',
        ),
        (["doctor", "MODEL=phi-3-mini"], '-m helpers doctor --model "phi-3-mini"'),
        (["classroom", "PARAMS=--port 5050"], "-m helpers classroom --port 5050"),
        (["lab", "NOTEBOOK=out/student/01.ipynb"], 'jupyter lab "out/student/01.ipynb"'),
    ],
)
def test_what_is_given_on_makes_line_reaches_the_command(words, command):
    assert last_line(*words).endswith(command)


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
