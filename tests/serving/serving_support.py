"""What the tests of the servers share, fixtures apart."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
import psutil

from helpers import tracking

SYSTEM_MESSAGE = "You are a stand-up comedian."


@contextmanager
def connected(uri: str) -> Iterator[None]:
    """Use a store, and the former one again afterwards."""
    before = mlflow.get_tracking_uri()
    tracking.connect(uri, "models")
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        mlflow.set_workspace(None)


def left(processes: list[psutil.Process], seconds: float = 120) -> list[psutil.Process]:
    """Those that still run after a while; one that only waits to be reaped by the first process does not."""
    deadline = time.monotonic() + seconds
    while True:
        _gone, rest = psutil.wait_procs(processes, timeout=0.1)
        rest = [process for process in rest if process.status() != psutil.STATUS_ZOMBIE]
        if not rest or time.monotonic() > deadline:
            return rest
