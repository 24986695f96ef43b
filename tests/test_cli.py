"""The command line explains itself and ends with an exit code."""

import argparse
import re
import subprocess

import pytest

from helpers.__main__ import RANGES, _parser, main
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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("serve --port 99999", "port=99999 is more than 65535"),
        ("serve --port 0", "port=0 is less than 1"),
        ("serve --port -1", "port=-1 is less than 1"),
        ("serve --port eighty", "invalid int value: 'eighty'"),
        ("serve --timeout -1", "timeout=-1.0 is less than 0.1"),
        ("serve --timeout nan", "timeout=nan is less than 0.1"),
        ("serve --timeout inf", "timeout=inf is more than 86400"),
        ("serve --max-queue 0", "max_queue=0 is less than 1"),
        ("serve --max-body 0", "max_body=0 is less than 1"),
        ("serve --grace -1", "grace=-1 is less than 0"),
        ("serve --trace-sampling 2", "trace_sampling=2.0 is more than 1"),
        ("serve --trace-sampling -0.1", "trace_sampling=-0.1 is less than 0"),
        ("classroom --port 70000", "port=70000 is more than 65535"),
        ("classroom --port 0", "port=0 is less than 1"),
        ("classroom --workers 0", "workers=0 is less than 1"),
        ("classroom --workers 1000", "workers=1000 is more than 64"),
        ("classroom --workers two", "invalid int value: 'two'"),
        ("serve --host nowhere.invalid --api-key k", "host='nowhere.invalid'"),
        ("serve --host 203.0.113.1 --api-key k", "host='203.0.113.1'"),
        ("classroom --host nowhere.invalid", "host='nowhere.invalid'"),
        ("no-such-command", "no-such-command"),
        ("serve --no-such-option", "--no-such-option"),
    ],
)
def test_a_bad_option_is_one_sentence_and_exit_code_2(words, says, capsys, monkeypatch):
    monkeypatch.setattr("helpers.workshop.classroom.binaries", lambda: ROOT)  # nothing is to be installed
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error


def test_every_number_of_a_command_has_a_range():
    (commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    actions = [action for command in commands.choices.values() for action in command._actions]
    assert {action.dest for action in actions if action.type in (int, float)} == set(RANGES)
