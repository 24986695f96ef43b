"""The lock, environment.yml and pyproject.toml say the same, and pip's settings reach uv."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from helpers import ROOT, environment, processes

pytestmark = pytest.mark.command

LOCK = environment.LOCK.read_text("utf-8")
TELEMETRY = ("MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY", "DO_NOT_TRACK")


def locked() -> list[Requirement]:
    return [Requirement(line) for line in LOCK.splitlines() if line and not line.startswith("#")]


def test_environment_yml_installs_python_pip_the_lock_and_nothing_else():
    text = (ROOT / "environment.yml").read_text("utf-8")
    entries = [entry.split()[0] for entry in re.findall(r"^ +- (.+)$", text, re.MULTILINE)]
    assert entries == ["conda-forge", "nodefaults", "python", "pip", "pip:", "-r", "-e"]
    assert "- -r requirements.lock" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert f"- python {project['requires-python']}\n" in text


def test_every_dependency_is_locked_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a published wheel looks like a compiled one")
def test_no_locked_package_was_compiled_on_this_machine():
    """Published wheels are for manylinux, or for any system; a compiler here makes them for linux alone."""
    tags = {name: distribution(name).read_text("WHEEL") or "" for name in environment.locked()}
    assert not [name for name, text in tags.items() if re.search(r"^Tag: .*-linux_", text, re.MULTILINE)]


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


def test_pip_settings_over_several_lines_are_handed_to_uv(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://one.example/simple\n"
        "extra-index-url =\n    https://two.example/it's\n    https://three.example/simple\n"
        "[install]\nfind-links =\n    /a\n    /b\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    found = environment.uv_settings(environment.pip_configuration(Path(sys.executable)))
    assert found["UV_DEFAULT_INDEX"] == "https://one.example/simple"
    assert found["UV_INDEX"] == "https://two.example/it's https://three.example/simple"
    assert found["UV_FIND_LINKS"] == "/a,/b"


def test_a_setting_made_for_uv_itself_stays(monkeypatch):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mine.example/simple")
    assert "UV_DEFAULT_INDEX" not in environment.uv_settings({"index-url": "https://pip.example/simple"})


@pytest.mark.environment
def test_an_unsupported_python_is_refused_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1, "final", 0))
    with pytest.raises(SystemExit, match=r"is not one of 3\.11, 3\.12, 3\.13"):
        environment.setup(tmp_path / ".venv")
    assert not (tmp_path / ".venv").exists()


# An environment that is not what it was


@pytest.fixture(scope="module")
def small_lock(tmp_path_factory) -> Path:
    """What it takes to install anything at all."""
    lock = tmp_path_factory.mktemp("lock") / "requirements.lock"
    lock.write_text("".join(f"{name}=={version(name)}\n" for name in ("setuptools", "uv")), encoding="utf-8")
    return lock


@pytest.fixture(scope="module")
def prefix(small_lock, tmp_path_factory) -> Iterator[Path]:
    """An environment that has been set up, and that each test leaves whole."""
    prefix = tmp_path_factory.mktemp("place") / ".venv"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WHEELHOUSE", raising=False)
        patch.setenv("TORCH_BACKEND", "cpu")  # no torch is locked that could be looked for
        assert environment.setup(prefix, small_lock)
        assert environment.is_current(prefix, small_lock)
        yield prefix


def _lose_its_python(prefix: Path) -> None:
    for python in (prefix / "bin").glob("python*"):
        python.unlink()
        python.symlink_to("/gone/python")


def _be_of_another_version(prefix: Path) -> None:
    (prefix / "bin" / "python").unlink()
    (prefix / "bin" / "python").write_text("#!/bin/sh\necho 3.10.1\n", encoding="utf-8")
    (prefix / "bin" / "python").chmod(0o755)


def _be_interrupted(prefix: Path) -> None:
    (prefix / environment.STAMP).unlink()


@pytest.mark.environment
@pytest.mark.parametrize("change", [_lose_its_python, _be_of_another_version, _be_interrupted])
def test_an_environment_that_is_not_what_it_was_is_made_again(change, prefix, small_lock):
    change(prefix)
    assert not environment.is_current(prefix, small_lock)
    assert environment.setup(prefix, small_lock)
    assert environment.is_current(prefix, small_lock)
    assert not environment.setup(prefix, small_lock)


@pytest.mark.environment
def test_a_moved_environment_is_made_again_also_by_its_own_python(prefix, small_lock, tmp_path):
    moved = tmp_path / "other place" / ".venv"
    shutil.copytree(prefix, moved, symlinks=True)
    code = (
        "import sys; from pathlib import Path; from helpers import environment;"
        "print(environment.setup(Path(sys.argv[1]), Path(sys.argv[2])))"
    )
    command = [moved / "bin" / "python", "-c", code, moved, small_lock]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.endswith("True\n"), ended.stderr
    assert environment.is_current(moved, small_lock)
    works = subprocess.run([moved / "bin" / "pip", "--version"], capture_output=True, text=True)
    assert str(moved) in works.stdout, works.stderr


def test_the_set_up_code_needs_only_the_standard_library(tmp_path):
    code = (
        "import helpers.__main__, helpers.environment, helpers.workshop.doctor, helpers.workshop.wheelhouse"
    )
    bare = [sys.executable, "-S", "-c", code]  # -S: without site-packages
    assert subprocess.run(bare, cwd=ROOT).returncode == 0


def test_importing_helpers_is_cheap_and_turns_telemetry_off():
    code = (
        "import helpers, helpers.parameters, helpers.tracking, helpers.workshop.notebooks, os, sys;"
        "assert not {'torch', 'transformers', 'mlflow'} & set(sys.modules);"
        "print(*(os.environ[name] for name in sys.argv[1:]))"
    )
    own = {name: value for name, value in os.environ.items() if name not in TELEMETRY}
    command = [sys.executable, "-c", code, *TELEMETRY]
    off = subprocess.run(command, env=own, capture_output=True, text=True)
    assert off.stdout.split() == ["true"] * 4, off.stderr
    mine = subprocess.run(command, env=own | {"DO_NOT_TRACK": "0"}, capture_output=True, text=True)
    assert mine.stdout.split() == ["true", "true", "true", "0"]


def test_variables_are_set_for_a_block_and_what_was_there_comes_back(monkeypatch):
    monkeypatch.setenv("MINE", "kept")
    monkeypatch.delenv("NEW", raising=False)
    with processes.variables(MINE="other", NEW="1"):
        assert (os.environ["MINE"], os.environ["NEW"]) == ("other", "1")
    assert os.environ["MINE"] == "kept"
    assert "NEW" not in os.environ
