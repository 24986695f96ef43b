"""The kit: what each kind of laptop needs, and a set-up from it without a network."""

import hashlib
import platform
import re
import runpy
import shutil
from pathlib import Path

import pytest
from test_without_network import clone, cut_off  # noqa: F401 (cut_off is a fixture)

from helpers import ROOT, environment
from helpers.workshop import kit

HERE = next(
    (name for name, facts in kit.SYSTEMS.items() if facts[:2] == (platform.system(), platform.machine())),
    None,
)
PYTHON = environment.python_version()
TORCH = environment.locked()["torch"]
find_python = runpy.run_path(str(ROOT / "tools" / "elsewhere.py"))["find_python"]


def pins(text: str) -> dict[str, str]:
    return kit.Target.parse(text).pins()


@pytest.mark.skipif(HERE is None, reason="kits are made for other systems than this one")
def test_this_machines_pins_are_those_that_are_installed_here():
    assert pins(f"{HERE}:{PYTHON}") == environment.locked()


def test_markers_are_read_for_the_laptop_and_not_for_this_machine():
    linux, macos, windows = pins("linux-x86_64:3.11"), pins("macos-arm64:3.12"), pins("windows-amd64:3.12")
    assert {"pywinpty", "waitress", "colorama"} <= windows.keys() - linux.keys() - macos.keys()
    assert "gunicorn" in linux.keys() & macos.keys() - windows.keys()
    assert "appnope" in macos.keys() - linux.keys() - windows.keys()
    assert linux["numpy"] != macos["numpy"] == windows["numpy"]


@pytest.mark.command
@pytest.mark.parametrize("text", ["macos-arm64", "macos-arm64:3.10", "amiga-68000:3.12", ""])
def test_a_kind_that_is_not_known_is_refused_with_those_that_are(text, tmp_path):
    with pytest.raises(
        ValueError, match=r"The systems are linux-x86_64, .*make kit PLATFORMS=macos-arm64:3\.12"
    ):
        kit.make(["linux-x86_64:3.11", text], tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


@pytest.mark.network
@pytest.mark.timeout(1800)  # every wheel is fetched and installed
@pytest.mark.skipif(HERE is None, reason="kits are made for other systems than this one")
@pytest.mark.parametrize("version", environment.PYTHONS)
def test_a_kit_sets_up_a_laptop_without_a_network(version, cut_off, tmp_path, capsys):  # noqa: F811
    """With each Python of this machine; fetching a checkpoint's files offline compares every checksum."""
    python = find_python(version) or pytest.skip(f"Python {version} is not on this machine")
    made = tmp_path / "kit"
    if kit.make([f"{HERE}:{version}"], made):
        # Another wheel that is missing fails the test.
        assert re.findall(r"no wheel for (.+)", capsys.readouterr().out) == [f"torch=={TORCH}+cpu"]
        shutil.rmtree(made)  # pytest keeps what a skipped test wrote
        pytest.skip(f"torch's CPU build for Python {version} cannot be had here")
    assert "models 1," in capsys.readouterr().out
    here = "the kind of the machine that made this kit" in (made / "README.txt").read_text("utf-8")
    assert here == (version == PYTHON)
    for line in (made / "SHA256SUMS").read_text("utf-8").splitlines()[:50]:
        digest, _, name = line.partition("  ")
        assert hashlib.sha256(Path(made, name).read_bytes()).hexdigest() == digest
    laptop = tmp_path / "laptop"
    laptop.mkdir()
    clone(laptop)
    variables = {"WEIGHTS_DIR": made / "weights", "UV_CACHE_DIR": tmp_path / "cache"}
    variables["UV_COMPILE_BYTECODE"] = "0"  # what two commands import is compiled sooner than all packages
    folder = made / f"{HERE}-{version}"
    ready = cut_off("make", "setup", f"WHEELHOUSE={folder}", f"PYTHON={python}", cwd=laptop, **variables)
    assert ready.returncode == 0, ready.stderr
    for model in kit.MODELS:
        command = (laptop / ".venv/bin/python", "-m", "helpers", "fetch", "--offline", model)
        checked = cut_off(*command, cwd=laptop, **variables)
        assert checked.returncode == 0, checked.stderr
        assert checked.stdout.count("whole") >= 4


@pytest.mark.command
def test_a_package_without_a_wheel_is_named(tmp_path, monkeypatch):
    """The real pip asks an empty folder. What constraints its settings name changes nothing."""
    (tmp_path / "index").mkdir()
    (tmp_path / "constraints.txt").write_text("pywinpty<9\n", encoding="utf-8")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    target = kit.Target.parse("windows-amd64:3.12")
    assert kit._download(target, tmp_path, ["pywinpty==3.1.2"]) == "pywinpty"
