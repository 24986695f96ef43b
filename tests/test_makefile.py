"""What a reader puts on make's line stays text: no shell, and not make itself, takes it for code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.__main__ import main
from helpers.environment import ROOT

# Shows how a target calls a program: its words, and what it finds in the environment.
SHOW = f"""#!{sys.executable}
import json, os, sys
print(json.dumps({{"words": sys.argv[1:], "store": os.environ.get("MLFLOW_BACKEND_STORE_URI")}}))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """A folder with programs that only show how they were called."""
    folder = tmp_path_factory.mktemp("programs")
    for name in ("python", "mlflow"):
        (folder / name).write_text(SHOW)
        (folder / name).chmod(0o755)
    return folder


def called(programs: Path, target: str, **given: str) -> dict:
    """How `make TARGET NAME=VALUE …` calls its program; what the values start would run in `programs`."""
    values = [f"{name}={value}" for name, value in given.items()]
    command = ["make", "-C", str(ROOT), "-s", "-o", "setup", target, f"VENV={programs}", *values]
    own = {
        name: value for name, value in os.environ.items() if name not in ("MODEL", "TRACKING_URI", "PARAMS")
    }
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
    assert called(programs, "run", PARAMS=value)["words"][3:] == ["--words", value]
    assert not (programs / "pwned").exists()


def test_without_values_the_targets_take_their_defaults(programs):
    assert called(programs, "run")["words"] == ["-m", "helpers", "run", "--words", ""]
    assert called(programs, "weights")["words"] == ["-m", "helpers", "fetch"]
    ui = called(programs, "ui")
    assert ui["words"] == ["ui", "--host", "127.0.0.1", "--port", "5000"]
    assert ui["store"] == f"sqlite:///{ROOT}/mlflow.db"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(min_size=1).filter(lambda text: not text.startswith("-")), min_size=1, max_size=3))
def test_words_are_split_as_a_shell_does_and_run_by_none(words):
    import shlex

    from helpers import __main__ as cli

    assert cli._spread(["run", "--words", shlex.join(words)]) == ["run", *words]


def test_words_that_end_in_the_middle_are_told(capsys):
    assert main(["run", "--words", "-p question 'Why"]) == 2
    assert capsys.readouterr().err.startswith('error: PARAMS="-p question \'Why" cannot be split into words')
