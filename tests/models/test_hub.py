"""A download from the Hub is whole or not at all, goes on where it was stopped, and says what went wrong.

Every test runs the command a reader runs, `python -m helpers fetch phi-3-mini`, and reads what it prints.
"""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import published
import pytest
from local_hub import COMMIT, LocalHub
from support import wait_until

from helpers.models import fetch, folders

pytestmark = pytest.mark.models

CHECKPOINT, ONNX = published.CHECKPOINT.repo, published.ONNX.repo
LARGE = "model-00002-of-00002.safetensors"
PIECE = 10 * 2**20  # huggingface_hub writes a file in pieces of 10 MiB
TRY_AGAIN = "Try again; if it happens again, something between this machine and the Hub changes files."


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(7).randbytes(25_000_000)


@pytest.fixture
def repositories(content: bytes) -> dict[str, dict[str, bytes]]:
    """What a download needs to see of Phi-3-mini's repositories; nothing here is a model."""
    checkpoint = {"README.md": b"# Phi-3", "LICENSE": b"MIT", "config.json": b"{}", "tokenizer.json": b"{}"}
    checkpoint |= {"model-00001-of-00002.safetensors": b"first", LARGE: content}
    checkpoint |= {"model.safetensors.index.json": b"{}"}
    checkpoint |= {"pytorch_model.bin": b"pickle", "modeling_phi3.py": b"", "onnx/model.safetensors": b""}
    variant = {"genai_config.json": b"{}", published.ONNX_NAME: b"graph", "configuration_phi3.py": b""}
    variant |= {f"{published.ONNX_NAME}.data": b"numbers", "tokenizer.json": b"{}"}
    onnx = {"README.md": b"# ONNX", "LICENSE.txt": b"MIT", "config.json": b"{}"}
    onnx |= {f"{published.ONNX.folder}/{name}": part for name, part in variant.items()}
    onnx |= {f"cuda/cuda-int4-rtn-block-32/{name}": part for name, part in variant.items()}
    return {CHECKPOINT: checkpoint, ONNX: onnx}


@pytest.fixture
def hub(repositories) -> Iterator[LocalHub]:
    with LocalHub(repositories, published.COMMITS).serve() as server:
        yield server


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def command(name: str = "phi-3-mini") -> list[str]:
    return [sys.executable, "-m", "helpers", "fetch", name]


def start(hub: LocalHub | str, weights: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """Begin `python -m helpers fetch phi-3-mini` (or another command) against a Hub."""
    url = hub if isinstance(hub, str) else hub.url
    environment = {"HF_HOME": f"{weights}-hf", "HF_ENDPOINT": url, "WEIGHTS_DIR": str(weights)} | environment
    return subprocess.Popen(
        arguments or command(),
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C reaches it and its children, and not the tests
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored under `pytest &`
    )


def succeed(process: subprocess.Popen, weights: Path) -> None:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert err == ""  # no warning, no debris of a progress bar
    assert [line.rpartition("/")[2] for line in out.splitlines()] == ["checkpoint: whole", "onnx-int4: whole"]
    for name in ("checkpoint", "onnx-int4"):
        folders.verify(weights / "phi-3-mini" / name)
        assert not (weights / "phi-3-mini" / f".{name}.partial").exists()


def fail(process: subprocess.Popen, weights: Path, code: int = 1) -> str:
    """The one sentence it ends with; no folder that could be taken for a finished one is left."""
    _, err = process.communicate(timeout=600)
    assert process.returncode == code
    assert err.count("\n") == 1, err
    assert not (weights / "phi-3-mini" / "checkpoint").exists()
    return err.strip().removeprefix("error: ")


def part_has_arrived(weights: Path) -> bool:
    return any(part.stat().st_size == PIECE for part in weights.glob("*/.*.partial/*.part"))


def every_file_came_once(hub: LocalHub) -> bool:
    return len(hub.fetched) == len({path for path, _ in hub.fetched}) == len(hub.asked)


# What is fetched


@pytest.mark.key
def test_only_weights_tokenizer_configuration_and_licence_are_fetched_and_only_once(hub, weights, content):
    succeed(start(hub, weights), weights)
    checkpoint, onnx = weights / "phi-3-mini" / "checkpoint", weights / "phi-3-mini" / "onnx-int4"
    assert {path.name for path in checkpoint.iterdir()} == {
        *("LICENSE", "config.json", "tokenizer.json", "model-00001-of-00002.safetensors", LARGE),
        *("model.safetensors.index.json", folders.MANIFEST),
    }
    assert {path.name for path in onnx.iterdir()} == {
        *("LICENSE.txt", "genai_config.json", published.ONNX_NAME, f"{published.ONNX_NAME}.data"),
        *("tokenizer.json", folders.MANIFEST),
    }
    assert (checkpoint / LARGE).read_bytes() == content
    assert fetch.source(checkpoint)["source_revision"] == published.CHECKPOINT.revision
    assert fetch.source(onnx)["source_revision"] == published.ONNX.revision
    assert every_file_came_once(hub)
    before = hub.requests
    succeed(start(hub, weights), weights)
    assert hub.requests == before


def test_two_processes_at_once_fetch_every_file_once(hub, weights):
    hub.busy[LARGE] = 1  # so that the first is still at it when the second comes
    first, second = start(hub, weights), start(hub, weights)
    succeed(first, weights)
    succeed(second, weights)
    assert len(hub.fetched) == len({path for path, _ in hub.fetched}) == 11


def test_the_token_goes_to_the_hub_and_not_to_where_large_files_lie(hub, weights):
    succeed(start(hub, weights, HF_TOKEN="hf_aSecretOfTheTests"), weights)  # there it would be answered 400
    assert hub.tokens == {"Bearer hf_aSecretOfTheTests"}


def test_nothing_of_a_repository_is_written_outside_of_its_folder(hub, weights):
    outside = ("LICENSE/../../../evil", "LICENSE\\..\\..\\evil", "LICENSE:/evil", "../evil.json")
    hub.repositories[CHECKPOINT] |= dict.fromkeys(outside, b"evil")
    succeed(start(hub, weights), weights)
    assert not set(outside) & {path for _, _, path in hub.asked}
    assert not list(weights.parent.rglob("*evil*"))


# A download that stops


def test_a_connection_cut_in_the_middle_is_taken_up_where_it_broke(hub, weights):
    hub.cut.add(LARGE)
    succeed(start(hub, weights), weights)
    assert hub.starts(LARGE) == [0, PIECE]
    assert {path for path, start in hub.fetched if start} == {LARGE}


@pytest.mark.parametrize(
    ("kind", "code", "sentence"),
    [(signal.SIGINT, 130, "Interrupted. The same command goes on from here."), (signal.SIGKILL, -9, None)],
)
def test_after_ctrl_c_or_a_kill_the_next_command_goes_on_in_the_middle_of_the_file(
    repositories, weights, kind, code, sentence
):
    with LocalHub(repositories, published.COMMITS).serve() as hub:
        hub.slow.add(LARGE)
        process = start(hub, weights)
        wait_until(lambda: part_has_arrived(weights))
        os.killpg(process.pid, kind)
        if sentence:
            assert fail(process, weights, code) == sentence
        assert process.wait(60) == code
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # no child is left
        assert list(weights.rglob(folders.MANIFEST)) == []
        hub.slow.clear()
        hub.fetched.clear()
        hub.asked.clear()
        succeed(start(hub, weights), weights)
        assert hub.starts(LARGE) == [PIECE]
        assert [path for _, repo, path in hub.asked if repo == CHECKPOINT] == [LARGE]


def test_a_hub_that_goes_away_in_the_middle_is_reported_and_the_next_command_goes_on(repositories, weights):
    with LocalHub(repositories, published.COMMITS).serve() as hub:
        hub.slow.add(LARGE)
        process = start(hub, weights)
        wait_until(lambda: part_has_arrived(weights))
    said = fail(process, weights)
    assert said.startswith(f"{CHECKPOINT} could not be fetched (ConnectError: ")
    assert said.endswith(
        f"HF_ENDPOINT names the Hub {hub.url}. Check the network and try again: it goes on from here."
    )
    with LocalHub(repositories, published.COMMITS).serve() as hub:
        succeed(start(hub, weights), weights)
        assert hub.starts(LARGE) == [PIECE]
        assert hub.starts("config.json") == []


@pytest.fixture
def small_disk(weights: Path) -> list[str]:
    """A shell with 40 MB of disk at `weights`: fills it in the middle of a download, then makes room."""
    weights.mkdir()
    script = (
        'mount -t tmpfs -o size=40m tmpfs "$0" || exit 77; "$@" & '
        'until [ -n "$(find "$0" -size +9000k)" ]; do sleep 0.1; done; '
        'head -c 100m /dev/zero > "$0/filler" 2> "$0-log"; echo full; wait $!; echo "ended with $?" >&2; '
        'rm "$0/filler"; exec "$@"'
    )
    own = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--user", "--map-root-user"])]
    mount = [*own, "mount", "-t", "tmpfs", "x", str(weights)]
    if sys.platform != "linux" or subprocess.run(mount).returncode:
        pytest.skip("needs the right to mount a small disk")
    return [*own, "sh", "-c", script, str(weights), *command()]


def test_a_disk_that_fills_up_is_reported_and_with_room_the_next_command_goes_on(hub, weights, small_disk):
    hub.slow.add(LARGE)
    process = start(hub, weights, *small_disk)
    assert process.stdout.readline() == "full\n"
    hub.slow.clear()
    hub.ended.set()
    out, err = process.communicate(timeout=600)
    sentence = (
        f"The disk of {weights}/phi-3-mini was full before phi-3-mini was whole. "
        "Free some, or set WEIGHTS_DIR to a folder on another disk."
    )
    assert err == f"error: {sentence}\nended with 1\n"
    assert process.returncode == 0
    assert out.count(": whole") == 2
    assert hub.starts(LARGE)[-1] >= PIECE
    assert hub.starts("config.json") == [0]


def test_too_little_room_is_reported_before_anything_is_fetched(hub, weights):
    hub.claimed[LARGE] = 10**15
    said = fail(start(hub, weights), weights)
    assert said.startswith("phi-3-mini needs 1,000,000,000 MB of disk and ")
    assert said.endswith("Free some, or set WEIGHTS_DIR to a folder on another disk.")
    assert hub.asked == []


# A file that is not what it should be


def test_a_truncated_file_that_claims_to_be_whole_is_dropped_and_only_it_is_fetched_again(
    hub, weights, content
):
    hub.short.add(LARGE)
    size = len(content)
    wrong = f"arrived with {size // 2:,} of {size:,} bytes, and was dropped"
    assert fail(start(hub, weights), weights) == f"{LARGE} of {CHECKPOINT} {wrong}. {TRY_AGAIN}"
    hub.short.clear()
    only_it_is_fetched_again(hub, weights, LARGE)


@pytest.mark.parametrize("name", [LARGE, "tokenizer.json"])  # listed with a sha256, and a sha1
def test_a_file_with_a_wrong_checksum_is_dropped_and_only_it_is_fetched_again(hub, weights, name):
    hub.changed.add(name)
    wrong = "arrived with a checksum the Hub does not list, and was dropped"
    assert fail(start(hub, weights), weights) == f"{name} of {CHECKPOINT} {wrong}. {TRY_AGAIN}"
    hub.changed.clear()
    only_it_is_fetched_again(hub, weights, name)


def only_it_is_fetched_again(hub: LocalHub, weights: Path, name: str) -> None:
    hub.fetched.clear()
    succeed(start(hub, weights), weights)
    assert hub.starts(name)[0] == 0
    assert "config.json" not in {path for path, _ in hub.fetched}


def test_a_branch_that_moves_between_two_tries_leaves_no_mixture(hub, weights):
    # The catalogue names commits, so a model that it lacks; and only the checkpoint: it cannot be converted.
    code = f"from helpers.models import catalog, fetch; fetch.checkpoint(catalog.find({CHECKPOINT!r}))"
    hub.status[LARGE] = 500
    assert start(hub, weights, sys.executable, "-c", code).wait(120) == 1
    assert list(weights.rglob("tokenizer.json"))
    hub.status.clear()
    hub.commits = published.COMMITS | {CHECKPOINT: COMMIT}
    del hub.repositories[CHECKPOINT]["tokenizer.json"]
    hub.repositories[CHECKPOINT]["config.json"] = b'{"new": 1}'
    assert start(hub, weights, sys.executable, "-c", code).wait(120) == 0
    (folder,) = weights.rglob("checkpoint")
    assert (folder / "config.json").read_text("utf-8") == '{"new": 1}'
    assert not (folder / "tokenizer.json").exists()
    assert fetch.source(folder)["source_revision"] == COMMIT  # the one that the branch was at


# What the Hub refuses

NO_MODEL = f"The Hub has no model {CHECKPOINT}, or it is private. Check the name, or set HF_TOKEN."
GATED = f"{CHECKPOINT} is gated: accept its terms at https://huggingface.co/{CHECKPOINT} and set HF_TOKEN."
BUSY = "The Hub has had too many requests from here (429). Try again in 3 s, or set HF_TOKEN."
WRONG_TOKEN = (
    "The Hub refuses your token, in HF_TOKEN or of `hf auth login`: it is wrong or has expired. Make "
    "another at https://huggingface.co/settings/tokens, or use none: public models need none."
)


@pytest.mark.parametrize(
    ("place", "status", "sentence"),
    [
        (CHECKPOINT, 401, NO_MODEL),
        (CHECKPOINT, 403, GATED),
        (CHECKPOINT, 429, BUSY),
        (CHECKPOINT, "wrong token", WRONG_TOKEN),
        ("config.json", "no token", GATED),  # anyone may see the list of a gated repository's files
    ],
)
def test_a_refusal_is_reported_with_the_next_step(hub, weights, place, status, sentence):
    hub.status[place] = status
    assert fail(start(hub, weights), weights) == sentence


def test_a_hub_with_too_many_requests_is_asked_again_when_it_says(hub, weights):
    hub.busy["config.json"] = 1
    succeed(start(hub, weights), weights)
    first, second = (at for at, repo, path in hub.asked if (repo, path) == (CHECKPOINT, "config.json"))
    assert second - first >= 3  # its Retry-After


def test_an_unknown_repository_or_revision_is_reported(hub, weights):
    for name, sentence in (
        ("org/none", "The Hub has no model org/none, or it is private. Check the name, or set HF_TOKEN."),
        (
            f"{CHECKPOINT}@v9",
            f"{CHECKPOINT} has no revision 'v9'. "
            f"Name a commit, tag or branch that it has: {CHECKPOINT}@main.",
        ),
    ):
        assert fail(start(hub, weights, *command(name)), weights) == sentence


def test_the_hubs_own_offline_switch_counts(hub, weights):
    said = fail(start(hub, weights, HF_HUB_OFFLINE="1"), weights)
    assert said.startswith(f"HF_HUB_OFFLINE is set and {CHECKPOINT} is not here yet.")


def test_a_repository_without_safetensors_is_refused(hub, weights):
    for name in [name for name in hub.repositories[CHECKPOINT] if name.endswith(".safetensors")]:
        del hub.repositories[CHECKPOINT][name]
    hub.repositories[CHECKPOINT]["other.safetensors"] = b"that transformers would pass over"
    hub.repositories[CHECKPOINT].pop("model.safetensors.index.json")
    said = fail(start(hub, weights), weights)
    assert "holds neither model.safetensors nor model.safetensors.index.json nor the ONNX folder" in said
    assert hub.fetched == []
