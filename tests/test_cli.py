"""The command line explains itself and ends with an exit code."""

import subprocess

import pytest

from helpers.__main__ import main
from helpers.environment import ROOT


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for command in ("setup", "lock", "fetch", "run", "save"):
        assert command in shown


def test_make_lists_its_targets():
    shown = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0
    assert "run" in shown.stdout


def test_an_unknown_model_is_one_sentence_and_exit_code_2(capsys):
    assert main(["fetch", "no-such-model"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
