"""The command line explains itself and ends with an exit code."""

import argparse
import re
import subprocess

import pytest

from helpers.__main__ import _parser, main
from helpers.environment import ROOT

pytestmark = pytest.mark.command


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = re.findall(r"^ {4}(\w+)", capsys.readouterr().out, re.MULTILINE)
    (commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert shown == list(commands.choices)
    assert {"setup", "run", "serve", "classroom", "containerfile"} <= set(shown)


def test_make_lists_its_targets():
    shown = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0
    targets = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1]
    described = [line.split()[0] for line in shown.stdout.splitlines()]
    assert sorted([*described, "python"]) == sorted(targets.replace("\\", "").split())  # a step of the others


def test_an_unknown_model_is_one_sentence_and_exit_code_2(capsys):
    assert main(["fetch", "no-such-model"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
