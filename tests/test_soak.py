"""A short soak of the OpenAI endpoint; `make soak` is the long one, which also looks for growth."""

import json
import subprocess
import sys

import pytest

from helpers.environment import ROOT


def soak(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / "soak.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.mark.slow
def test_eight_clients_for_a_minute_get_no_wrong_answer_and_leave_nothing_behind(tmp_path):
    # In so short a time memory still settles, so growth is told and not judged.
    tiny = ("--model", "tiny-phi3", "--precision", "fp32", "--growth", "inf")
    run = soak("--minutes", 1, *tiny, "--output", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    figures = json.loads((tmp_path / "soak.json").read_text())["figures"]
    for name in ("wrong answers", "stack traces leaked", "answered 5xx"):
        assert figures[name] == 0
    assert figures["requests left in progress"] == figures["processes left after SIGTERM"] == 0
    assert figures["compared with the greedy reference"] > 100
    assert figures["refused 4xx"] > 10
    assert figures["left by the client"] > 10
    for name in ("whole answer, s", "streamed answer, s", "first streamed text, s"):
        assert 0 < figures[f"{name}: p50"] <= figures[f"{name}: p95"] <= figures[f"{name}: p99"]
    assert len(figures["memory, MB, by quarter"]) == len(figures["handles, by quarter"]) == 4


@pytest.mark.slow
def test_a_soak_that_finds_growth_fails_and_says_so(tmp_path):
    tiny = ("--model", "tiny-phi3", "--precision", "fp32")
    run = soak("--minutes", 0.1, *tiny, "--growth", 0.1, "--output", tmp_path)
    assert run.returncode == 1
    assert "FAILED: memory, MB, last ÷ first quarter: " in run.stderr
    assert json.loads((tmp_path / "soak.json").read_text())["failed"]


def test_impossible_settings_are_refused(tmp_path):
    run = soak("--minutes", 0, "--output", tmp_path)
    assert run.returncode == 2
    assert "--minutes must be above 0" in run.stderr
    assert not any(tmp_path.iterdir())
