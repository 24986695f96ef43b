"""Start programs that end with this process: servers for a `with` block, and conversions.

However a process goes, even when it is killed, the operating system closes its pipes. So a child whose
standard input is a pipe from its parent sees the end of that pipe when the parent has gone
(`when_parent_ends`). A small supervisor does this for any program: `python -m helpers.processes PROGRAM …`.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import psutil

from helpers.errors import ChildFailed

MARK = "PROGRAM_MARK"  # In the environment of a program and of all that it starts.
STOP_SECONDS = 10  # How long a program may take to end by itself.
LOG_LINES = 15


@contextlib.contextmanager
def program(command: Sequence[str], **options) -> Iterator[subprocess.Popen]:
    """Run a program until the block or this process ends, and leave nothing of it behind.

    Args:
        options: as of subprocess.Popen.
    Yields:
        The supervisor, which ends with the program's exit code, or with 128 + the signal that ended it.
    """
    supervisor = [sys.executable, "-m", "helpers.processes", *command]
    # In a session of its own, or a group on Windows, so that Ctrl-C reaches this process only.
    alone = {"start_new_session": True, "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    child = subprocess.Popen(supervisor, stdin=subprocess.PIPE, **alone, **options)
    try:
        yield child
    finally:
        child.stdin.close()
        child.wait()


def when_parent_ends(act: Callable[[], object], receive: Callable[[bytes], object] | None = None) -> None:
    """Call `act` when standard input ends, which is a pipe that only the parent can write to.

    Args:
        receive: called with each line that the parent sends. Both are called in a thread.
    """

    def read() -> None:
        # Not sys.stdin: Python's shutdown would wait for its lock, which this thread holds.
        with open(0, "rb", closefd=False) as lines:
            for line in lines:
                if receive:
                    receive(line)
        act()

    threading.Thread(target=read, daemon=True).start()


def _supervise(command: list[str]) -> int:
    """Run a program until it ends or the parent does, and leave nothing of it. Returns its exit code."""
    mark = uuid.uuid4().hex
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=os.environ | {MARK: mark})
    root = psutil.Process(child.pid)
    ended = threading.Event()
    when_parent_ends(ended.set)
    threading.Thread(target=lambda: (child.wait(), ended.set()), daemon=True).start()
    ended.wait()
    end([root, *_marked(mark)])
    code = child.wait()
    return code if code >= 0 else 128 - code


def _marked(mark: str) -> Iterator[psutil.Process]:
    """A program's processes by their environment: once the first has gone, no tree holds its children."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                yield process


def end(roots: Iterable[psutil.Process], seconds: float = STOP_SECONDS) -> None:
    """End processes and all that they started: ask them to, wait, and use force on those that are left.

    psutil's calls work on every system, while Windows has neither process groups nor SIGKILL.

    Args:
        seconds: how long they may take to end by themselves.
    """
    running = set(roots)
    for signal, limit in (("terminate", seconds), ("kill", STOP_SECONDS)):
        for root in list(running):
            with contextlib.suppress(psutil.Error):
                running.update(root.children(recursive=True))
        for process in running:
            with contextlib.suppress(psutil.Error):
                getattr(process, signal)()
        deadline = time.monotonic() + limit
        while (running := set(filter(runs, running))) and time.monotonic() < deadline:
            time.sleep(0.05)


def runs(process: psutil.Process) -> bool:
    """Whether a process runs. One that has ended and waits for its parent to notice does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.is_running()
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def running(
    command: list[str],
    port: int,
    name: str,
    startup_timeout: float,
    *,
    url: str | None = None,
    healthy: Callable[[str], bool] | None = None,
    log_file: Path | None = None,
    secrets: dict[str, str] | None = None,
) -> Iterator[str]:
    """Start a server that answers `/health` on 127.0.0.1, and end it with the block, whatever happens in it.

    Args:
        command: the server, with the tracking store of this process in its environment.
        name: what the progress line calls it.
        startup_timeout: seconds until it must be healthy.
        url: where it is, if that is not the port of 127.0.0.1.
        healthy: tells whether a URL is served, if not `/health` does; an OSError means not yet.
        log_file: where its output is kept; otherwise it goes with the block.
        secrets: for the server's environment; a command line can be read by every user of the machine.
    Yields:
        Its URL.
    Raises:
        RuntimeError: if the port is taken; with the last lines of the server's log, if it does not come up.
        ValueError: if this machine cannot listen on the port.
    """
    import mlflow

    refuse_if_taken(port)
    url = url or f"http://127.0.0.1:{port}"
    env = {**os.environ, **(secrets or {})} | {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
        # MLflow calls `uvicorn` by its name, and a kernel need not have its environment on PATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    with (
        tempfile.TemporaryDirectory(prefix="server-", ignore_cleanup_errors=True) as folder,
        (log_file or Path(folder) / "server.log").open("wb") as log,
        program(command, stdout=log, stderr=subprocess.STDOUT, env=env) as server,
    ):
        print(f"Starting {name} … ", end="", flush=True)
        probe = healthy or answers
        seconds = _wait_until_healthy(url, server, startup_timeout, name, Path(log.name), probe)
        print(f"ready at {url} after {seconds:.0f} s", flush=True)
        yield url


def _wait_until_healthy(
    url: str,
    server: subprocess.Popen,
    limit: float,
    name: str,
    log: Path,
    healthy: Callable[[str], bool],
) -> float:
    """Ask `healthy` again and again; seconds until it said yes."""
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < limit:
        if server.poll() is not None:
            reason = f"ended with exit code {server.returncode}"
            break
        with contextlib.suppress(OSError):
            if healthy(url):
                return elapsed
        time.sleep(0.1)
    else:
        reason = f"was not healthy within {limit:g} s"
    print("failed", flush=True)
    last_lines = "\n".join(log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:])
    raise RuntimeError(f"{name[0].upper()}{name[1:]} {reason}. Its last log lines:\n{last_lines}")


def answers(url: str) -> bool:
    """True when `/health` of a server is answered, asked past any proxy; raises OSError when not."""
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5).close()
    return True


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on right now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def refuse_if_taken(port: int, host: str = "127.0.0.1") -> None:
    """Make sure that a server can listen on a port: another program there could pass for it.

    Raises:
        RuntimeError: if the port is in use.
        ValueError: if there is no such host or port on this machine, or this user may not have it.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise RuntimeError(
                f"port={port} of {host} is in use by another program. End that, or choose another port."
            ) from None
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise ValueError(
            f"host={host!r} with port={port} is not an address that this user can listen on ({reason}). "
            "Choose one of this machine, such as 127.0.0.1, and a port from 1024 to 65535."
        ) from None


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run_module(
    module: str, *arguments: object, log: Path, watch: Callable[[str], None], what: str, **environment: str
) -> None:
    """Run `python -m module arguments` to its end, unless this process ends before.

    Args:
        log: takes its output; deleted if all went well.
        watch: called five times a second with the new output, for a progress bar.
        what: what it does, for the error.
        environment: variables to set for it.
    Raises:
        ChildFailed: with its exception, or the last lines of its output.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"} | environment
    with (
        log.open("wb") as sink,
        log.open("r", encoding="utf-8", errors="replace") as output,
        program(command, stdout=sink, stderr=subprocess.STDOUT, env=environment) as child,
    ):
        while child.poll() is None:
            time.sleep(0.2)
            watch(output.read())
    if 128 < child.returncode < 192:
        number = child.returncode - 128
        reason = f"its process was ended by signal {number}, as the system does when memory runs out"
        raise ChildFailed(what, reason)
    if child.returncode:
        raise ChildFailed(what, _last_lines(log))
    log.unlink()


def _last_lines(log: Path) -> str:
    """The exception that ended a child, or the end of its log without progress bars, a line for each."""
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))
    kept = [line for line in lines if line.strip() and "it/s]" not in line]
    if "Traceback (most recent call last):" in kept:
        last = len(kept) - kept[::-1].index("Traceback (most recent call last):")
        if exception := next((line for line in kept[last:] if not line.startswith(" ")), None):
            return exception
    kept = kept[-LOG_LINES:]
    return kept[0] if len(kept) == 1 else "\n".join(["the last lines of its output are", *kept])


@contextlib.contextmanager
def variables(**values: str) -> Iterator[None]:
    """Set environment variables for the length of a block, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


if __name__ == "__main__":
    sys.exit(_supervise(sys.argv[1:]))
