"""Two endpoints behind a stock nginx with deploy/nginx.conf: one is killed, and the other goes on."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from support import wait_until_it_answers

from helpers import ROOT, processes

pytestmark = pytest.mark.server

KEY = "a-key-for-tests"
CLIENTS = 8
SECONDS_BEFORE, SECONDS_AFTER = 5, 10


@dataclass
class Asked:
    """One request: when it began and ended, in seconds, and the text it was answered with."""

    streamed: bool
    began: float
    ended: float
    text: str | None


@pytest.fixture(scope="module")
def nginx(tmp_path_factory) -> str:
    return shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or pytest.skip(
        "no nginx here; try apt-get install nginx-light"
    )


@contextmanager
def process(command: list, url: str, **variables: str) -> Iterator[psutil.Process]:
    """A server as a process of its own, once it answers."""
    started = subprocess.Popen(list(map(str, command)), env=os.environ | variables)
    try:
        wait_until_it_answers(f"{url}/health", started)
        yield psutil.Process(started.pid)
    finally:
        processes.end([psutil.Process(started.pid)], seconds=10)
        started.wait()


def endpoint(store: str, port: int):
    command = [sys.executable, "-m", "helpers", "serve", "--model", "models:/slm-onnx@champion"]
    options = ["--tracking-uri", store, "--port", port]
    return process([*command, *options], f"http://127.0.0.1:{port}", OPENAI_SERVER_API_KEY=KEY)


def configuration(folder: Path, ports: dict[int, int]) -> Path:
    """deploy/nginx.conf with other ports, and with its files in a folder of its own."""
    text = (ROOT / "deploy" / "nginx.conf").read_text("utf-8")
    for documented, port in ports.items():
        assert f"127.0.0.1:{documented}" in text
        text = text.replace(f"127.0.0.1:{documented}", f"127.0.0.1:{port}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {folder / kind};\n" for kind in kinds)
    path = folder / "nginx.conf"
    path.write_text(text.replace("http {\n", f"http {{\n{places}"), encoding="utf-8")
    return path


def ask(client: openai.OpenAI, streamed: bool) -> str | None:
    """The text of a whole answer; None for a stream without an end."""
    messages = [{"role": "user", "content": "Tell me a story."}]
    answer = client.chat.completions.create(
        model="slm-onnx", messages=messages, max_tokens=300, stream=streamed
    )
    if not streamed:
        return answer.choices[0].message.content
    chunks = list(answer)
    if not chunks or not chunks[-1].choices[0].finish_reason:
        return None
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def keep_asking(url: str, until: threading.Event, asked: list[Asked], streamed: bool) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
    while not until.is_set():
        began = time.monotonic()
        text = None
        with suppress(openai.OpenAIError, httpx.HTTPError):
            text = ask(client, streamed)
        asked.append(Asked(streamed, began, time.monotonic(), text))


def test_when_one_endpoint_is_killed_only_its_streams_in_progress_are_cut(nginx, registered_onnx, tmp_path):
    proxy, one, other = (processes.free_port() for _ in range(3))
    path = configuration(tmp_path, {8080: proxy, 8001: one, 8002: other})
    settings = f"daemon off; pid {tmp_path / 'pid'}; error_log stderr;"
    url = f"http://127.0.0.1:{proxy}"
    asked: list[Asked] = []
    until = threading.Event()
    with ExitStack() as stack:
        killed = stack.enter_context(endpoint(registered_onnx, one))
        stack.enter_context(endpoint(registered_onnx, other))
        stack.enter_context(process([nginx, "-p", tmp_path, "-c", path, "-g", settings], url))
        clients = [
            threading.Thread(target=keep_asking, args=(url, until, asked, number % 2 == 0))
            for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        time.sleep(SECONDS_BEFORE)
        at = time.monotonic()
        for member in [killed, *killed.children(recursive=True)]:
            member.kill()
        time.sleep(SECONDS_AFTER)
        until.set()
        for client in clients:
            client.join(120)
    lost = [one for one in asked if one.text is None]
    after = [one for one in asked if one.began > at]
    print(f"{len(asked)} asked, {len(after)} of them after the kill, {len(lost)} cut")
    assert all(one.streamed and one.began < at < one.ended for one in lost)
    assert len(lost) <= CLIENTS // 2
    assert len(after) > CLIENTS
    assert len({one.text for one in asked if one.text is not None}) == 1
