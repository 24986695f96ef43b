"""A server in the background for as long as a `with` block lasts.

Run as a script, this file is the supervisor between the notebook's kernel and the server: it holds the read
end of a pipe whose other end only the kernel has. However the kernel goes, even by SIGKILL, the operating
system closes that end, and the supervisor takes the server down. Works on Linux and macOS.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

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
    temporary = partial(tempfile.NamedTemporaryFile, prefix="server-", suffix=".log")
    with log_file.open("w", encoding="utf-8") if log_file else temporary() as log:
        supervisor = subprocess.Popen(
            [sys.executable, __file__, *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # Ctrl-C reaches the notebook only; ending the server is this block's job
        )
        try:
            print(f"Starting {name} … ", end="", flush=True)
            probe = healthy or answers
            seconds = _wait_until_healthy(url, supervisor, startup_timeout, name, Path(log.name), probe)
            print(f"ready at {url} after {seconds:.0f} s", flush=True)
            yield url
        finally:
            supervisor.stdin.close()
            supervisor.wait(timeout=2 * STOP_SECONDS)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refuse_if_taken(port: int, host: str = "127.0.0.1") -> None:
    """Raise RuntimeError, with what to do, if a port is in use: its holder could pass for our server."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just closed is free
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise RuntimeError(
                f"port={port} of {host} is in use by another program. End that, or choose another port."
            ) from None


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
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    gone = threading.Event()
    for wait in (_wait_for_stdin, server.wait):
        threading.Thread(target=_end_after, args=(wait, server.pid, gone), daemon=True).start()
    while part := os.read(server.stdout.fileno(), 65536):
        with contextlib.suppress(OSError):  # a full disk costs lines of the log, not the supervision
            os.write(1, part)
    gone.set()
    return server.wait()


def _wait_for_stdin() -> None:
    while os.read(0, 1024):  # not sys.stdin: its lock would be in the way when this process ends
        pass


def _end_after(wait: Callable[[], object], group: int, gone: threading.Event) -> None:
    wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)
        if not gone.wait(STOP_SECONDS):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(_supervise(sys.argv[1:]))
