"""The lock, environment.yml and pyproject.toml say the same, and pip's settings reach uv."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from helpers import environment

ROOT = environment.ROOT
LOCK = environment.LOCK.read_text()


def locked() -> list[Requirement]:
    return [Requirement(line) for line in LOCK.splitlines() if line and not line.startswith("#")]


def test_environment_yml_installs_python_pip_the_lock_and_nothing_else():
    text = (ROOT / "environment.yml").read_text()
    entries = [entry.split()[0] for entry in re.findall(r"^ +- (.+)$", text, re.MULTILINE)]
    assert entries == ["conda-forge", "nodefaults", "python", "pip", "pip:", "-r", "-e"]
    assert "- -r requirements.lock" in text


def test_every_dependency_is_locked_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    pins = {}
    for requirement in locked():
        pins.setdefault(requirement.name, []).append(str(requirement.specifier).removeprefix("=="))
    for requirement in map(Requirement, wanted):
        assert all(requirement.specifier.contains(pin) for pin in pins[requirement.name]), requirement


def test_every_locked_package_is_pinned_by_name_and_version_only():
    for requirement in locked():
        assert re.fullmatch(r"==[^,*+]+", str(requirement.specifier)), requirement
    assert "--find-links" not in LOCK
    assert "://" not in LOCK


def test_nothing_that_needs_a_compiler_or_cuda_is_locked():
    names = {requirement.name for requirement in locked()}
    assert "llama-cpp-python" not in names
    assert not [name for name in names if environment.CUDA_PACKAGES.match(f"{name}==")]


def test_what_is_installed_here_is_what_is_locked():
    marked = [r for r in locked() if r.marker is None or r.marker.evaluate(default_environment())]
    different = {
        r.name: version(r.name) for r in marked if version(r.name).partition("+")[0] != str(r.specifier)[2:]
    }
    assert not different


def test_pip_settings_are_handed_to_uv(monkeypatch):
    for name in ("UV_FIND_LINKS", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_STRATEGY"):
        monkeypatch.delenv(name, raising=False)
    pip = {
        "find-links": "/a /b",
        "index-url": "https://one.example/simple",
        "extra-index-url": "https://two.example",
    }
    assert environment.uv_settings(pip) == {
        "UV_FIND_LINKS": "/a,/b",
        "UV_DEFAULT_INDEX": "https://one.example/simple",
        "UV_INDEX": "https://two.example",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_a_setting_made_for_uv_itself_stays(monkeypatch):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mine.example/simple")
    assert "UV_DEFAULT_INDEX" not in environment.uv_settings({"index-url": "https://pip.example/simple"})


def test_an_unsupported_python_is_refused_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1, "final", 0))
    with pytest.raises(SystemExit, match=r"is not one of 3\.11, 3\.12, 3\.13"):
        environment.setup(tmp_path / ".venv")
    assert not (tmp_path / ".venv").exists()


def test_the_set_up_code_needs_only_the_standard_library(tmp_path):
    code = "import helpers.environment, sys; assert 'mlflow' not in sys.modules"
    bare = [sys.executable, "-S", "-c", code]  # -S: without site-packages
    assert subprocess.run(bare, cwd=ROOT).returncode == 0


def test_importing_helpers_is_cheap_and_turns_telemetry_off():
    code = (
        "import helpers, helpers.parameters, helpers.tracking, helpers.workshop.notebooks, os, sys;"
        "assert not {'torch', 'transformers', 'mlflow'} & set(sys.modules);"
        "assert os.environ['MLFLOW_DISABLE_TELEMETRY'] == os.environ['DO_NOT_TRACK'] == 'true'"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "environment.yml", "MLproject"])
def test_what_tools_look_for_stands_at_the_root(name):
    assert Path(ROOT, name).is_file()
