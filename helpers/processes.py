"""A server in the background for as long as a `with` block lasts.

Run as a script, this file is the supervisor between the notebook's kernel and the server: it holds the read
end of a pipe whose other end only the kernel has. However the kernel goes, even when it is killed, the
operating system closes that end, and the supervisor takes the server down.
"""

from __future__ import annotations

import contextlib
import errno
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

from helpers.errors import ChildFailed

MARK = "SERVER_MARK"  # in the environment of a server and of all that it starts
STOP_SECONDS = 10  # how long the server may take to end by itself
LOG_LINES = 15


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
        # MLflow calls `uvicorn` by its name, and a kernel need not have its environment on PATH
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    with (
        tempfile.TemporaryDirectory(prefix="server-", ignore_cleanup_errors=True) as folder,
        (log_file or Path(folder) / "server.log").open("wb") as log,
    ):
        supervisor = subprocess.Popen(
            [sys.executable, __file__, *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # Ctrl-C reaches the notebook only; ending the server is this block's job
        )
        root = psutil.Process(supervisor.pid)
        try:
            print(f"Starting {name} … ", end="", flush=True)
            probe = healthy or answers
            seconds = _wait_until_healthy(url, supervisor, startup_timeout, name, Path(log.name), probe)
            print(f"ready at {url} after {seconds:.0f} s", flush=True)
            yield url
        finally:
            supervisor.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                supervisor.wait(timeout=2 * STOP_SECONDS)
            end([root], seconds=0)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def end(roots: Iterable[psutil.Process], seconds: float = STOP_SECONDS) -> None:
    """End processes and all that they started: ask them to, wait, and use force on those that are left.

    psutil's calls work on every system, while Windows has neither process groups nor SIGKILL.

    Args:
        seconds: how long they may take to end by themselves.
    """
    for process in (family := _with_children(roots)):
        with contextlib.suppress(psutil.Error):
            process.terminate()
    for process in (rest := _with_children(_wait_for(family, seconds))):
        with contextlib.suppress(psutil.Error):
            process.kill()
    _wait_for(rest, STOP_SECONDS)


def _with_children(roots: Iterable[psutil.Process]) -> set[psutil.Process]:
    family = set(roots)
    for root in roots:
        with contextlib.suppress(psutil.Error):
            family.update(root.children(recursive=True))
    return family


def _wait_for(processes: set[psutil.Process], seconds: float) -> set[psutil.Process]:
    """Those that still run after a while. One that only waits to be reaped by its parent does not run."""
    deadline = time.monotonic() + seconds
    while (processes := set(filter(_runs, processes))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return processes


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.is_running()
    except psutil.NoSuchProcess:
        return False


def answers(url: str) -> bool:
    """True when `/health` of a server is answered, asked past any proxy; raises OSError when not."""
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5).close()
    return True


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


def _supervise(command: list[str]) -> int:
    """Run `command` until it ends or stdin does, and leave nothing of it behind. Returns its exit code.

    Its output is passed on, because that tells when the last process has gone: MLflow starts another one,
    and only with the last holder of the pipe does the output end.
    """
    mark = uuid.uuid4().hex
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {MARK: mark},
    )
    first = psutil.Process(server.pid)
    for wait in (_wait_for_stdin, server.wait):
        threading.Thread(target=_end_after, args=(wait, first, mark), daemon=True).start()
    while part := os.read(server.stdout.fileno(), 65536):
        with contextlib.suppress(OSError):  # a full disk costs lines of the log, not the supervision
            os.write(1, part)
    return server.wait()


def _wait_for_stdin() -> None:
    while os.read(0, 1024):  # not sys.stdin: its lock would be in the way when this process ends
        pass


def _end_after(wait: Callable[[], object], first: psutil.Process, mark: str) -> None:
    wait()
    end([first, *_marked(mark)])


def _marked(mark: str) -> Iterator[psutil.Process]:
    """A server's processes by their environment: once the first has gone, no tree holds its children."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                yield process


def run_module(
    module: str, *arguments: object, log: Path, watch: Callable[[str], None], what: str, **environment: str
) -> None:
    """Run `python -m module arguments` in a child process that ends when this one does, however it ends.

    Args:
        log: takes the child's output; deleted if all went well.
        watch: called five times a second with the new output, for a progress bar.
        what: what the child does, for the error.
        environment: variables to set for the child.
    Raises:
        ChildFailed: with its exception, or the last lines of its output.
    """
    command = [sys.executable, "-c", _CHILD, module, *map(str, arguments)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"} | environment
    with log.open("wb") as sink, log.open("r", encoding="utf-8", errors="replace") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=sink, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while child.poll() is None:
                time.sleep(0.2)
                watch(output.read())
        finally:
            child.kill()
            child.wait()
            child.stdin.close()
    if child.returncode < 0:
        reason = (
            f"its process was ended by signal {-child.returncode}, as the system does when memory runs out"
        )
        raise ChildFailed(what, reason)
    if child.returncode:
        raise ChildFailed(what, _last_lines(log))
    log.unlink()


# A blocking read in a thread ends with the pipe, hence with the parent, even if that was killed. os.read,
# because a reader that holds sys.stdin's lock would crash the interpreter's shutdown.
_CHILD = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def _last_lines(log: Path, count: int = 12) -> str:
    """The exception that ended a child, or the end of its log without progress bars, a line for each."""
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))
    kept = [line for line in lines if line.strip() and "it/s]" not in line]
    if "Traceback (most recent call last):" in kept:
        last = len(kept) - kept[::-1].index("Traceback (most recent call last):")
        if exception := next((line for line in kept[last:] if not line.startswith(" ")), None):
            return exception
    kept = kept[-count:]
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
