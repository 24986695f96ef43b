"""A test that starts a process and has no marker is named before any test runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.command

ROOT = Path(__file__).resolve().parents[1]
CONFTEST = """
import pytest
from reasons import pytest_collection_modifyitems

@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        yield playwright.chromium.launch()

@pytest.fixture
def page(browser):
    return browser.new_page()
"""
TESTS = """
import pytest

if False:  # they are read, not run, and their imports take seconds
    import subprocess as sp
    from subprocess import Popen
    import papermill
    from faults_support import HeadlessRun
    from helpers import environment
    from helpers.serving import openai_server as server
    from helpers.workshop import notebooks

def run(*arguments):
    return sp.run(arguments)

SCENES = {"run": lambda: run("true")}

def test_command(): run("true")
def test_command_in_a_table(): SCENES["run"]()
def test_command_of_that_name(): Popen(["true"])
def test_command_in_a_module_beside(): HeadlessRun("folder")
def test_kernel(): papermill.execute_notebook("in", "out")
def test_kernel_of_a_helper(): notebooks.run({}, "out")
def test_server():
    with server.running("models:/slm-onnx@champion"):
        pass
def test_browser(page): page.goto("about:blank")
def test_environment(): environment.setup("folder")
class TestAll:
    def test_command_in_a_class(self): run("true")

@pytest.mark.command
def test_server_that_says_command(): server.running("models:/slm-onnx@champion")

@pytest.mark.key
def test_kernel_that_says_key(): notebooks.run({}, "out")

@pytest.mark.command
def test_right_command(): run("true")
@pytest.mark.faults
def test_right_faults(): HeadlessRun("folder")
@pytest.mark.key
@pytest.mark.server
def test_right_key_case(): server.running("models:/slm-onnx@champion")
def test_right_without_a_process(): server._interrupt(), sp.PIPE, notebooks.declared("01.ipynb")
"""


@pytest.fixture
def collect(tmp_path):
    """Collect tests in a folder of their own with some arguments; what pytest printed, and its exit code."""

    def run(tests: str, *arguments: str) -> subprocess.CompletedProcess:
        (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
        (tmp_path / "test_it.py").write_text(tests, encoding="utf-8")
        path = os.pathsep.join(map(str, [ROOT / "tests", ROOT / "tests" / "notebooks"]))
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-c", ROOT / "pyproject.toml"]
        # Only the plugin that pyproject.toml's options need: the others take seconds to import.
        command += ["-p", "pytest_timeout"]
        return subprocess.run(
            [*command, "--rootdir", tmp_path, *arguments, tmp_path / "test_it.py"],
            env=os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
        )

    return run


def test_a_test_that_starts_a_process_and_does_not_say_so_fails_the_collection(collect):
    collected = collect(TESTS, "-m", "not slow")  # it is named though it would not run
    assert collected.returncode == pytest.ExitCode.USAGE_ERROR
    named = dict(re.findall(r"::(\w+) starts a process \(.+\) and has no marker: (\w+)\.", collected.stderr))
    named["test_command_in_a_class"] = named.pop("TestAll", named.get("test_command_in_a_class"))
    wrong = re.findall(r"def (test_(?!right)\w+)", TESTS)
    assert named == {name: name.split("_")[1] for name in wrong}
    assert "The reasons are attempts, browser, " in collected.stderr


def test_key_cases_and_commands_are_fast_and_all_other_reasons_slow(collect):
    right = TESTS.partition("def test_command()")[0] + TESTS[TESTS.rindex("\n@pytest.mark.command") :]
    fast = collect(right, "-m", "not slow").stdout
    slow = collect(right, "-m", "slow").stdout
    assert re.findall(r"::test_right_(\w+)", fast) == ["command", "key_case", "without_a_process"]
    assert re.findall(r"::test_right_(\w+)", slow) == ["faults"]
