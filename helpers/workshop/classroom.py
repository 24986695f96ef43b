"""One MLflow server for a room: PostgreSQL keeps what is logged, a folder the artifacts. Linux and macOS.

PostgreSQL listens on a socket in a folder that only its own user (and root) can enter: no port, no password,
no other user of the machine. MLflow listens on loopback unless another address is asked for.
"""

from __future__ import annotations

import contextlib
import ipaddress
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

# Where initdb and postgres are, since few put them on PATH: Debian, PostgreSQL's own RPMs, Homebrew.
PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
)
ANYWHERE = ("0.0.0.0", "::")
# Each of MLflow's workers keeps up to 15 connections to each of its stores.
CONNECTIONS_PER_WORKER = 60
SILENCE = 30  # seconds without an answer after which the server counts as gone


def serve(folder: Path, *, host: str, port: int, **options) -> None:
    """Run the server until Ctrl-C or SIGTERM. Arguments and errors are those of `running`."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if not binaries() and hasattr(os, "geteuid"):
            install()
        with running(folder, host=host, port=port, **options) as uri:
            print(_instructions(uri, folder, host), flush=True)
            _wait_until_gone(_from_here(host, port))
    except KeyboardInterrupt:
        print(f"\nStopped. What was logged stays in {folder}; the same command goes on with it.")
        return
    finally:
        signal.signal(signal.SIGTERM, before)
    raise RuntimeError(f"MLflow's server has not answered for {SILENCE} s; see {folder / 'mlflow.log'}")


@contextlib.contextmanager
def running(
    folder: Path, *, host: str = "127.0.0.1", port: int = 5000, workers: int = 4, allowed_hosts: str = ""
) -> Iterator[str]:
    """Start PostgreSQL and MLflow over `folder`, and end both with the block, whatever happens in it.

    Args:
        folder: database, artifacts and logs; made when it is missing, continued when it is there.
        host: address to listen on. Any other than loopback is open to all who can reach it: MLflow asks for
            no log-in here and encrypts nothing.
        port: of MLflow; None takes a free one.
        workers: processes that answer requests.
        allowed_hosts: names and addresses, separated by commas, under which learners may reach it; their
            browsers and clients send it with every request, and the server refuses all others.
    Yields:
        The URI that learners set as `tracking_uri`.
    Raises:
        ValueError: for a host that needs `allowed_hosts`, or a number out of range.
        RuntimeError: when something is missing, in use or does not come up; it says what to do.
    """
    from filelock import FileLock, Timeout

    if not hasattr(os, "geteuid"):
        raise RuntimeError("The classroom needs Linux or macOS: its database listens on a Unix socket.")
    names = _names(host, allowed_hosts)
    if workers < 1:
        raise ValueError(f"workers={workers} is less than 1. Two for each core is plenty.")
    port = port or processes.free_port()
    here = _from_here(host, port)
    _check_free(host, port)
    postgres = binaries()
    if not postgres:
        raise RuntimeError(f"PostgreSQL is not installed. {_how_to_install()}")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0), _database(postgres, folder, workers) as store:
            # fmt: off
            command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store,
                       "--serve-artifacts", "--artifacts-destination", (folder / "artifacts").as_uri(),
                       "--host", host, "--port", str(port), "--workers", str(workers), "--enable-workspaces",
                       "--allowed-hosts", ",".join(f"{name}:{port}" for name in names),
                       "--cors-allowed-origins", ",".join(f"http://{name}:{port}" for name in names)]
            # fmt: on
            # The server's background jobs (scheduled judges and the like) are no part of the lesson; and a
            # learner's own workspace in this shell must not become the server's.
            command = ["env", "-u", "MLFLOW_WORKSPACE", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", *command]
            log = folder / "mlflow.log"
            with processes.running(command, port, "MLflow", 300, url=here, log_file=log):
                yield f"http://{names[-1]}:{port}" if host in ANYWHERE else here
    except Timeout:
        raise RuntimeError(f"A classroom server already runs over {folder}. Stop it first.") from None


def binaries() -> Path | None:
    """The folder with initdb, postgres and pg_ctl, of the newest version installed; None without one."""
    found = [Path(path) for place in PLACES for path in Path("/").glob(place[1:])]
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).resolve().parent)
    found = [path for path in found if (path / "initdb").exists()]
    return max(found, key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))], default=None)


def install() -> None:
    """Install the distribution's PostgreSQL with apt-get, through sudo where that is needed.

    Raises:
        RuntimeError: where there is no apt-get or it fails; the text says what to do.
    """
    if not shutil.which("apt-get"):
        raise RuntimeError(f"PostgreSQL is not installed. {_how_to_install()}")
    apt = [*([] if os.geteuid() == 0 else ["sudo"]), "apt-get"]
    command = [*apt, "install", "--yes", "--no-install-recommends", "postgresql"]
    print(f"Installing PostgreSQL: {' '.join(command)}", flush=True)
    # A fresh machine has no list of packages yet.
    done = subprocess.run(command).returncode == 0 or (
        subprocess.run([*apt, "update"]).returncode == 0 and subprocess.run(command).returncode == 0
    )
    if not (done and binaries()):
        raise RuntimeError(f"PostgreSQL could not be installed. {_how_to_install()}")


def _how_to_install() -> str:
    return (
        "Install it with `sudo apt-get install postgresql`, `sudo dnf install postgresql-server` "
        "or `brew install postgresql`, then start again."
    )


@contextlib.contextmanager
def _database(postgres: Path, folder: Path, workers: int) -> Iterator[str]:
    """PostgreSQL over folder/database; gives the SQLAlchemy URI of its database."""
    data, user = folder / "database", _user()
    if not (data / "PG_VERSION").exists():
        _make_database(postgres, data, user)
    with tempfile.TemporaryDirectory(prefix="classroom-", ignore_cleanup_errors=True) as place:
        _hand_over(Path(place), user)
        options = {
            "listen_addresses": "",
            "unix_socket_directories": place,
            "max_connections": 20 + CONNECTIONS_PER_WORKER * workers,
        }
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        command = [*_become(user), str(postgres / "postgres"), "-D", str(data), *settings]
        ready = [str(postgres / "pg_isready"), "--quiet", "--host", place]
        with processes.running(
            command,
            0,
            "PostgreSQL",
            60,
            url="a socket of its own",
            healthy=lambda _: subprocess.run(ready).returncode == 0,
            log_file=folder / "postgres.log",
        ):
            try:
                yield f"postgresql+psycopg2://mlflow@/postgres?host={place}"
            finally:  # at once, even if somebody looks at the database with a client of their own
                stop = [postgres / "pg_ctl", "stop", "--silent", "--mode", "fast", "-D", data]
                subprocess.run([*_become(user), *map(str, stop)], capture_output=True)


def _make_database(postgres: Path, data: Path, user: str | None) -> None:
    """Make an empty cluster whose owner is `mlflow`, under another name until it is whole."""
    partial = data.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    _hand_over(partial, user)
    if subprocess.run([*_become(user), "test", "-w", str(partial)]).returncode:
        partial.rmdir()
        raise RuntimeError(
            f"PostgreSQL does not run as root, and its user {user!r} cannot enter {data.parent}, because a "
            'folder above it is closed. Choose another: make classroom PARAMS="--folder /srv/classroom"'
        )
    # fmt: off
    command = [str(postgres / "initdb"), "-D", str(partial), "--username=mlflow", "--auth=trust",
               "--encoding=UTF8", "--locale=C"]
    # fmt: on
    made = subprocess.run([*_become(user), *command], capture_output=True, encoding="utf-8", errors="replace")
    if made.returncode:
        shutil.rmtree(partial)
        raise RuntimeError(f"PostgreSQL could not make its database: {made.stderr.strip()}")
    partial.rename(data)


def _user() -> str | None:
    """Whom PostgreSQL runs as when root starts it; it refuses to run as root itself."""
    import pwd

    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    if not shutil.which("setpriv") or not known & {"postgres", "nobody"}:
        raise RuntimeError("PostgreSQL does not run as root. Start the classroom as an ordinary user.")
    return "postgres" if "postgres" in known else "nobody"


def _become(user: str | None) -> list[str]:
    """What stands before a command that another user is to run, in a folder which that user can enter."""
    import pwd

    if not user:
        return []
    group = str(pwd.getpwnam(user).pw_gid)
    return ["setpriv", "--reuid", user, "--regid", group, "--clear-groups", "env", "--chdir=/"]


def _hand_over(folder: Path, user: str | None) -> None:
    if user:
        shutil.chown(folder, user)


def _names(host: str, allowed_hosts: str) -> list[str]:
    """Under which names the server may be reached; MLflow compares a request's `Host` and `Origin`."""
    own = [name.strip() for name in allowed_hosts.split(",") if name.strip()]
    for name in own:
        if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:]+\]", name):
            raise ValueError(
                f"allowed_hosts={name!r} is not a name or an address alone. Write, for example, "
                "--allowed-hosts teacher.local,192.168.1.20"
            )
    if host in ANYWHERE and not own:
        raise ValueError(
            f"host={host!r} listens on every address of this machine. Say under which names or addresses "
            "learners reach it: --allowed-hosts teacher.local,192.168.1.20"
        )
    listening = [] if host in ANYWHERE else [_bracketed(host)]
    return list(dict.fromkeys(["localhost", "127.0.0.1", *listening, *own]))


def _from_here(host: str, port: int) -> str:
    """The server's URL for this machine, which need not know the names that learners use."""
    return f"http://{'127.0.0.1' if host in ANYWHERE else _bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    """An IPv6 address as a URL has it."""
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
        f"Everything is kept in {folder}. Ctrl-C stops the server.",
    ]
    if not _is_loopback(host):
        lines.append(
            f"Everybody who reaches port {uri.rpartition(':')[2]} can read, change and delete all of it, and "
            "put model files there that run code when loaded: there is no log-in and no encryption. "
            "Keep it to a network you trust, and stop it after the lesson."
        )
    return "\n".join(lines)


def _wait_until_gone(uri: str) -> None:
    heard = time.monotonic()
    while time.monotonic() - heard < SILENCE:
        with contextlib.suppress(OSError):
            processes.answers(uri)
            heard = time.monotonic()
        time.sleep(2)
