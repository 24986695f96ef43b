"""Both images of deploy/Dockerfile, really built, started and asked.

buildah makes them without a daemon, on a base image that is made here of Debian's packages. Each container
has processes of its own, a read-only file system, and a user that it does not know. It shares the network.
"""

import ast
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import openai
import pandas as pd
import psutil
import pytest
from support import wait_until_it_answers

from helpers import ROOT, processes

pytestmark = [pytest.mark.container, pytest.mark.timeout(3600)]

KEY = "a-key-for-tests"
TOKEN = "token-of-the-package-index"
BASE = "docker.io/library/python:3.11-slim-bookworm"
CERTIFICATES = Path("/etc/ssl/certs")
TARGETS = ["scoring", "openai"]
LONG = [{"prompt": f"Tell me story number {number}."} for number in range(400)]
# Makes the mounts of a container in the namespaces of `unshare`, then becomes the server as process 1.
START = """
root=$1; user=$2; folder=$3; shift 3
mount --bind "$root" "$root" && mount -t proc proc "$root/proc" && mount --bind /dev "$root/dev" &&
mount -t tmpfs tmpfs "$root/tmp" && mount -o remount,bind,ro "$root" &&
exec chroot --userspec="$user" --groups= "$root" env --ignore-environment --chdir="$folder" "$@"
"""


@pytest.fixture(scope="module")
def storage() -> Iterator[Path]:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can build and start containers here")
    for name, package in {
        "buildah": "buildah",
        "debootstrap": "debootstrap",
        "unshare": "util-linux",
    }.items():
        if not shutil.which(name):
            pytest.skip(f"no {name} here; try apt-get install {package}")
    folder = Path(tempfile.mkdtemp(prefix="images-"))
    folder.chmod(0o755)
    yield folder
    # The overlay driver mounts its folder once more.
    subprocess.run(["umount", "--lazy", folder / "overlay" / "overlay"], capture_output=True)
    subprocess.run(["timeout", "100", "rm", "-rf", folder])


@pytest.fixture(scope="module")
def buildah(storage) -> Callable[..., str]:
    """Run buildah with images of its own; gives what it printed."""

    def run(*arguments: object, driver: str = "overlay") -> str:
        # fmt: off
        command = ["buildah", "--root", storage / driver, "--runroot", storage / f"run-{driver}",
                   "--storage-driver", driver, *arguments]
        # fmt: on
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=storage)
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
        return done.stdout.strip()

    try:
        run("mount", run("from", "scratch"))
    except AssertionError:
        # Some file systems, such as an overlay, cannot be overlaid. vfs copies every layer.
        return functools.partial(run, driver="vfs")
    return run


@pytest.fixture(scope="module")
def base_image(buildah) -> str:
    """Debian with Python under the name that the Dockerfile asks for, so that no registry is needed."""
    container = buildah("from", "scratch")
    root = buildah("mount", container)
    packages = "--include=python3,python3-venv,ca-certificates"
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", packages, "bookworm", root], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"debootstrap found no Debian here: {done.stdout.strip().splitlines()[-1:]}")
    buildah("umount", container)
    buildah("commit", "--format", "docker", "--rm", container, BASE)
    return BASE


@pytest.fixture(scope="module")
def context(storage, registered_onnx) -> Path:
    """What `docker build` would be given: the files of deploy/, helpers/, and the prepared champion."""
    folder = storage / "context"
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("deploy", "helpers"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    shutil.copy(ROOT / ".dockerignore", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "deploy")
        from prepare_model import prepare
    mlflow.set_tracking_uri(registered_onnx)
    prepare("models:/slm-onnx@champion", folder / "out" / "container")
    (folder / ".env").write_text("of no concern to the image", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pip_secret(storage) -> list[object]:
    """Arguments with which a build asks the package index that this machine uses."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    settings = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = ast.literal_eval(value)
    taken = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "cert")
    lines = [f"{name} = {settings[name]}" for name in taken if name in settings]
    (storage / "pip.conf").write_text("\n".join(["[global]", f"# {TOKEN}", *lines, ""]), encoding="utf-8")
    words = [word.removeprefix("file://") for name in taken for word in settings.get(name, "").split()]
    folders = [Path(word) for word in words if word.startswith("/") and Path(word).is_dir()]
    # The pages of an index in a folder may lead to files beside it.
    folders = {folder.parent if folder.name == "simple" else folder for folder in folders}
    mounts = [part for path in {CERTIFICATES, *folders} for part in ("--volume", f"{path}:{path}:ro")]
    return ["--secret", f"id=pip,src={storage / 'pip.conf'}", *mounts]


@pytest.fixture(scope="module", params=TARGETS)
def image(request, buildah, base_image, context, pip_secret) -> Iterator[tuple[str, dict, Path]]:
    """A target's name, its image as buildah describes it, and the folder of its file system."""
    name = f"slm-{request.param}"
    # fmt: off
    # --layers keeps what both targets share.
    buildah("bud", "--layers", "--isolation", "chroot", "--format", "docker", "--pull-never", *pip_secret,
            "--file", context / "deploy" / "Dockerfile", "--target", request.param,
            "--build-arg", "MODEL=slm-onnx", "--build-arg", "VERSION=1", "--tag", name, context)
    # fmt: on
    container = buildah("from", name)
    try:
        about = json.loads(buildah("inspect", "--type", "image", name))
        yield request.param, about, Path(buildah("mount", container))
    finally:
        buildah("rm", container)


def in_container(image: tuple, command: list[str], port: int, **variables: str) -> list[str]:
    """The command line that runs a command of an image as a user that it does not know, in group 0."""
    _, about, root = image
    config = about["Docker"]["config"]
    given = [f"{name}={value}" for name, value in {"PORT": port, **variables}.items()]
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL"]
    start = ["sh", "-c", START, "start", str(root), "54321:0", config["WorkingDir"]]
    return [*namespaces, *start, *config["Env"], *given, *command]


@contextmanager
def started(image: tuple, **variables: str) -> Iterator[tuple[str, subprocess.Popen, psutil.Process]]:
    """URL, the process that stands for the container, and the server in it, once that is healthy."""
    entry = image[1]["Docker"]["config"]["Entrypoint"]
    port = processes.free_port()
    key = {"OPENAI_SERVER_API_KEY": KEY}
    container = subprocess.Popen(in_container(image, entry, port, **key, **variables))
    root = psutil.Process(container.pid)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}/health", container)
        (server,) = root.children()
        yield f"http://127.0.0.1:{port}", container, server
    finally:
        # All of it: the change of user keeps `--kill-child` from reaching the server.
        processes.end([root], seconds=0)
        container.wait()


def invoke(url: str, rows: list[dict], **params: object) -> list[str]:
    body = json.dumps({"dataframe_records": rows, "params": params}).encode()
    request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["predictions"]


def chat(url: str, text: str, **options: object):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="slm-onnx", messages=messages, **options)


def test_it_answers_as_the_model_does_on_a_read_only_disk_and_with_a_user_it_does_not_know(image):
    champion = mlflow.pyfunc.load_model("models:/slm-onnx@champion")
    with started(image) as (url, _, _):
        health = image[1]["Docker"]["config"]["Healthcheck"]["Test"]
        assert health[0] == "CMD"
        port = int(url.rpartition(":")[2])
        subprocess.run(in_container(image, health[1:], port), check=True)
        if image[0] == "scoring":
            expected = champion.predict(pd.DataFrame(LONG[:3]), params={"max_new_tokens": 9})
            assert invoke(url, LONG[:3], max_new_tokens=9) == expected
            return
        template = champion.unwrap_python_model().apply_chat_template
        prompt = template([{"role": "user", "content": "Hello"}])
        (expected,) = champion.predict(pd.DataFrame({"prompt": [prompt]}), params={"max_new_tokens": 9})
        assert chat(url, "Hello", max_tokens=9).choices[0].message.content == expected
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in chat(url, "Hello", max_tokens=9, stream=True)
        ]
        assert "".join(pieces) == expected
        request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=30) as response:
            assert b"chat_requests_total" in response.read()


def test_it_says_what_it_is_and_keeps_neither_the_indexs_secret_nor_a_folder_of_this_machine(image, context):
    _, about, root = image
    config = about["Docker"]["config"]
    assert config["User"] == "10001:0"
    assert config["Labels"]["org.opencontainers.image.title"] == "slm-onnx"
    assert config["Labels"]["org.opencontainers.image.version"] == "1"
    for folder in (context, ROOT, Path.home()):
        assert f"{folder}/" not in json.dumps(config)
    assert TOKEN not in json.dumps(about)
    secret = root / "etc" / "pip.conf"
    assert not secret.exists() or TOKEN not in secret.read_text("utf-8")
    assert not list((root / "opt" / "app").rglob(".env"))


def test_a_stopped_container_finishes_the_answers_in_progress(image):
    with started(image, GRACE="120") as (url, container, server):
        if image[0] == "scoring":
            answers = []
            asking = threading.Thread(target=lambda: answers.extend(invoke(url, LONG, max_new_tokens=1000)))
            asking.start()
            time.sleep(1)
            assert not answers, "the answers came before the signal"
            server.send_signal(signal.SIGTERM)
            asking.join(300)
            assert len(answers) == len(LONG)
        else:
            stream = chat(url, "Tell me a long story.", max_tokens=1500, stream=True)
            next(stream)
            server.send_signal(signal.SIGTERM)
            *_, last = stream
            assert last.choices[0].finish_reason in ("length", "stop")
        assert container.wait(60) == 0


def test_a_server_that_is_killed_makes_the_container_fail(image):
    with started(image) as (_, container, server):
        server.kill()
        assert container.wait(60) != 0


def test_a_killed_process_with_the_model_makes_the_container_fail(image):
    with started(image) as (_, container, server):
        family = [server, *server.children(recursive=True)]
        max(family, key=lambda process: process.memory_info().rss).kill()
        assert container.wait(60) != 0


def test_a_container_without_a_key_says_so_and_ends(image):
    if image[0] == "scoring":
        pytest.skip("MLflow's scoring server knows no key")
    entry = image[1]["Docker"]["config"]["Entrypoint"]
    done = subprocess.run(
        in_container(image, entry, processes.free_port()), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "set OPENAI_SERVER_API_KEY" in done.stderr
