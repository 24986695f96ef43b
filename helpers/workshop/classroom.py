"""One MLflow server for a class: PostgreSQL keeps what is logged, a folder the artifacts. Linux and macOS.

PostgreSQL has no TCP port and no password: it listens on a Unix socket in a folder that only its own user
(and root) can enter. MLflow listens on loopback unless another address is given.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from helpers import processes

# Debian, PostgreSQL's own RPMs and Homebrew keep initdb and postgres outside PATH.
PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
)
NOT_INSTALLED = (
    "PostgreSQL is not installed. Install it with `sudo apt-get install postgresql`, "
    "`sudo dnf install postgresql-server` or `brew install postgresql`, then start again."
)
EVERY_ADDRESS = ("0.0.0.0", "::")
# Each worker of MLflow keeps up to 15 connections to each of its stores.
CONNECTIONS_PER_WORKER = 60
# The server counts as gone after this many seconds without an answer.
SILENCE = 30


def serve(folder: Path, *, host: str, port: int, **options) -> None:
    """Run the server until Ctrl-C or SIGTERM. Arguments and errors are those of `running`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running(folder, host=host, port=port, **options) as uri:
            print(_instructions(uri, folder, host), flush=True)
            _wait_until_gone(_local_url(host, port))
    except KeyboardInterrupt:
        print(f"\nStopped. What was logged stays in {folder}; the same command goes on with it.")
        return
    raise RuntimeError(f"MLflow's server has not answered for {SILENCE} s; see {folder / 'mlflow.log'}")


@contextlib.contextmanager
def running(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = 5000,
    workers: int = 4,
    allowed_hosts: str = "",
) -> Iterator[str]:
    """Start PostgreSQL and MLflow over `folder`, and stop both at the end of the block.

    Args:
        folder: database, artifacts and logs; made when it is missing, continued when it is there.
        host: address to listen on. Any other than loopback is open to all who can reach it: there is no
            log-in and no encryption.
        port: of MLflow; None takes a free one.
        workers: processes that answer requests.
        allowed_hosts: names and addresses, separated by commas, under which learners reach the server.
            MLflow refuses requests for any other name.
    Yields:
        The URI that learners set as `tracking_uri`.
    Raises:
        ValueError: for a host that needs `allowed_hosts`, or a number out of range.
        RuntimeError: when something is missing, in use or does not start; the text says what to do.
    """
    from filelock import FileLock, Timeout

    if not hasattr(os, "geteuid"):
        raise RuntimeError("The classroom needs Linux or macOS: its database listens on a Unix socket.")
    names = _names(host, allowed_hosts)
    if workers < 1:
        raise ValueError(f"workers={workers} is less than 1. Two for each core is plenty.")
    port = port or processes.free_port()
    _check_free(host, port)
    postgres = binaries()
    if not postgres:
        raise RuntimeError(NOT_INSTALLED)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    url = _local_url(host, port)
    try:
        with FileLock(folder / "lock", timeout=0), _database(postgres, folder, workers) as store:
            command = _mlflow_command(store, folder, (host, port), workers, names)
            with processes.running(command, port, "MLflow", 300, url=url, log_file=folder / "mlflow.log"):
                yield f"http://{names[-1]}:{port}" if host in EVERY_ADDRESS else url
    except Timeout:
        raise RuntimeError(f"A classroom server already runs over {folder}. Stop it first.") from None


def binaries() -> Path | None:
    """The folder with initdb and postgres of the newest version installed; None without one."""
    found = [Path(path).parent for place in PLACES for path in glob.glob(f"{place}/initdb")]
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).resolve().parent)
    return max(found, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], default=None)


def _mlflow_command(
    store: str, folder: Path, address: tuple[str, int], workers: int, names: list[str]
) -> list[str]:
    host, port = address
    # A workspace chosen in this shell must not become the server's. No background jobs: no lesson uses them.
    environment = ["env", "-u", "MLFLOW_WORKSPACE", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"]
    # fmt: off
    return [*environment, sys.executable, "-m", "mlflow", "server", "--enable-workspaces",
            "--backend-store-uri", store,
            "--serve-artifacts", "--artifacts-destination", (folder / "artifacts").as_uri(),
            "--host", host, "--port", str(port), "--workers", str(workers),
            "--allowed-hosts", ",".join(f"{name}:{port}" for name in names),
            "--cors-allowed-origins", ",".join(f"http://{name}:{port}" for name in names)]
    # fmt: on


@contextlib.contextmanager
def _database(postgres: Path, folder: Path, workers: int) -> Iterator[str]:
    """Run PostgreSQL over folder/database; yields the SQLAlchemy URI of its database."""
    data, log = folder / "database", folder / "postgres.log"
    as_owner = _as_owner()
    if not data.exists():
        _make_database(postgres, data, as_owner)
    with tempfile.TemporaryDirectory(prefix="classroom-", ignore_cleanup_errors=True) as place:
        if as_owner:
            shutil.chown(place, "postgres")
        # fmt: off
        command = [*as_owner, str(postgres / "postgres"), "-D", str(data),
                   "-c", "listen_addresses=", "-c", f"unix_socket_directories={place}",
                   "-c", f"max_connections={20 + CONNECTIONS_PER_WORKER * workers}"]
        # fmt: on

        def healthy(_: str) -> bool:
            return subprocess.run([postgres / "pg_isready", "--quiet", "--host", place]).returncode == 0

        with processes.running(command, 0, "PostgreSQL", 60, url=place, healthy=healthy, log_file=log):
            try:
                yield f"postgresql+psycopg2://mlflow@/postgres?host={place}"
            finally:
                # A clean stop that does not wait for open connections.
                stop = [str(postgres / "pg_ctl"), "stop", "--silent", "--mode", "fast", "-D", str(data)]
                subprocess.run([*as_owner, *stop], capture_output=True)


def _make_database(postgres: Path, data: Path, as_owner: list[str]) -> None:
    """Make an empty database cluster owned by `mlflow`, under another name until it is complete."""
    partial = data.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    if as_owner:
        shutil.chown(partial, "postgres")
    if subprocess.run([*as_owner, "test", "-w", str(partial)]).returncode:
        partial.rmdir()
        raise RuntimeError(
            f"PostgreSQL does not run as root, and its user 'postgres' cannot enter {data.parent}, because a "
            'folder above it is closed. Choose another: make classroom PARAMS="--folder /srv/classroom"'
        )
    options = ["--username=mlflow", "--auth=trust", "--encoding=UTF8", "--locale=C"]
    command = [*as_owner, str(postgres / "initdb"), "-D", str(partial), *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(f"PostgreSQL could not make its database: {done.stderr.strip()}")
    partial.rename(data)


def _as_owner() -> list[str]:
    """What stands before a command of PostgreSQL: nothing, or for root, whom it refuses, a change of user."""
    import pwd

    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv") or "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
        raise RuntimeError("PostgreSQL does not run as root. Start the classroom as an ordinary user.")
    change = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    # Root's working folder may be closed to that user.
    return [*change, "env", "--chdir=/"]


def _names(host: str, allowed_hosts: str) -> list[str]:
    """The names of the server. MLflow compares the headers `Host` and `Origin` of a request with them."""
    own = [name.strip() for name in allowed_hosts.split(",") if name.strip()]
    for name in own:
        if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:]+\]", name):
            raise ValueError(
                f"allowed_hosts={name!r} is not a name or an address alone. Write, for example, "
                "--allowed-hosts teacher.local,192.168.1.20"
            )
    if host in EVERY_ADDRESS and not own:
        raise ValueError(
            f"host={host!r} listens on every address of this machine. Say under which names or addresses "
            "learners reach it: --allowed-hosts teacher.local,192.168.1.20"
        )
    listening = [] if host in EVERY_ADDRESS else [_bracketed(host)]
    return list(dict.fromkeys(["localhost", "127.0.0.1", *listening, *own]))


def _local_url(host: str, port: int) -> str:
    """The server's URL on this machine, which may not know the names that learners use."""
    return f"http://{'127.0.0.1' if host in EVERY_ADDRESS else _bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    """An IPv6 address as a URL has it."""
    return f"[{host}]" if ":" in host else host


def _check_free(host: str, port: int) -> None:
    try:
        processes.refuse_if_taken(port, host)
    except RuntimeError:
        raise RuntimeError(
            f"MLflow cannot listen on port {port} of {host}: another program has it in use. "
            'Choose another: make classroom PARAMS="--port 5050"'
        ) from None


def _instructions(uri: str, folder: Path, host: str) -> str:
    lines = [
        f'Learners set   tracking_uri = "{uri}"   and a name of their own as experiment;',
        f'headless:      make run TRACKING_URI={uri} PARAMS="-p experiment anna"',
        f"The board:     make board TRACKING_URI={uri}",
        f"Everything is kept in {folder}. Ctrl-C stops the server.",
    ]
    if not processes.is_loopback(host):
        lines.append(
            f"Everybody who reaches port {uri.rpartition(':')[2]} can read, change and delete all of it, and "
            "put model files there that run code when loaded: there is no log-in and no encryption. "
            "Keep it to a network you trust, and stop it after the lesson."
        )
    return "\n".join(lines)


def _wait_until_gone(url: str) -> None:
    answered = time.monotonic()
    while time.monotonic() - answered < SILENCE:
        with contextlib.suppress(OSError):
            processes.answers(url)
            answered = time.monotonic()
        time.sleep(2)
