"""The command line explains itself and ends with an exit code."""

import re
import subprocess
import sys

import pytest

from helpers import ROOT
from helpers.__main__ import main

pytestmark = pytest.mark.command


def test_help_lists_every_command_with_what_it_does(capsys):
    assert main(["--help"]) == 0
    shown = dict(re.findall(r"^ {2}(\w+)  +(\w.*)", capsys.readouterr().out, re.MULTILINE))
    assert {"doctor", "setup", "fetch", "run", "ui", "serve", "classroom", "student", "save"} <= set(shown)
    assert not [text for text in shown.values() if text.endswith("...")]


def test_make_lists_its_targets():
    shown = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0
    targets = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1]
    described = [line.split()[0] for line in shown.stdout.splitlines()]
    assert sorted([*described, "python"]) == sorted(targets.replace("\\", "").split())  # a step of the others


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("fetch no-such-model", "model='no-such-model' is not one of smollm2-135m, phi-3-mini, tiny-phi3, "),
        ("fetch no-such-model", "Set it with fetch smollm2-135m."),
        ("doctor --model no-such-model", "Set it with --model smollm2-135m."),
        ("fetch tiny-phi3 --precision int3", "precision='int3' is not one of fp32, int8, int4. Set it "),
        ("serve --port 99999", "--port 99999 is not a whole number from 1 to 65,535"),
        ("serve --port 0", "--port 0 is not a whole number from 1 to 65,535. For example: --port 8000"),
        ("serve --port eighty", "--port eighty is not a whole number from 1 to 65,535"),
        ("serve --port", "'--port' requires an argument"),
        ("serve --timeout nan", "--timeout nan is not a number from 0.1 to 86,400"),
        ("serve --timeout inf", "--timeout inf is not a number from 0.1 to 86,400. For example: --timeout "),
        ("serve --trace-sampling -0.1", "--trace-sampling -0.1 is not a number from 0.0 to 1.0"),
        ("classroom --workers 1000", "--workers 1000 is not a whole number from 1 to 64"),
        ("serve --host nowhere.invalid --api-key k", "host='nowhere.invalid'"),
        ("serve --host 203.0.113.1 --api-key k", "host='203.0.113.1'"),
        ("run 03", "There is no notebook '03'"),
        ("run -p seed", "a name and a value are needed, as in: -p max_new_tokens 16"),
        ("run 02 -p seed -1", "seed=-1 is not a whole number from 0"),
        ("run 01 -p model a=b", "model='a=b' is not one of"),
        ("run -p sede 7", "'sede' is not a parameter of"),
        ("ui --tracking-uri mlruns", "--tracking-uri='mlruns' is not"),
        ("no-such-command", "no-such-command"),
        ("serve --no-such-option", "--no-such-option"),
        ("", "Missing command"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, says, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error


def bare(*words: str) -> subprocess.CompletedProcess:
    """A command of the Python below this environment, which has none of its packages."""
    command = [sys.executable, "-S", "-m", "helpers", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("words", [["run"], ["--help"], []])
def test_before_set_up_a_command_names_the_next_step(words):
    ended = bare(*words)
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: this Python lacks the packages. Run make setup, then .venv/bin/python\n",
    )
