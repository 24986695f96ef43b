"""MLflow's own server for one model, as long as a `with` block lasts."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager

from helpers import processes
from helpers.models import logged


def serve(
    model_uri: str, *, port: int | None = None, timeout: int = 600, startup_timeout: float = 300
) -> AbstractContextManager[str]:
    """Start `mlflow models serve` for a model and end it with the block, whatever happens in it.

    Args:
        model_uri: such as `models:/slm-onnx@champion`; looked up in the tracking store of this process.
        port: of 127.0.0.1; None takes a free one.
        timeout: seconds after which the server answers a request with 504; MLflow's own default is 60.
        startup_timeout: seconds until the server must be healthy.
    Yields:
        The server's URL; `/invocations`, `/ping`, `/health` and `/version` are there.
    Raises:
        errors.StoreFault: if the model's files are gone from the store.
        errors.ModelUnavailable: if it would be read with pickle.
        RuntimeError: with the last lines of the server's log, if it does not come up.
    """
    port = port or processes.free_port()
    processes.refuse_if_taken(port)
    logged.check(model_uri)
    # fmt: off
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model_uri,
               "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port),
               "--timeout", str(timeout), "--workers", "1"]
    # fmt: on
    return processes.running(command, port, f"MLflow's server for {model_uri}", startup_timeout)
