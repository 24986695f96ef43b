"""The MLflow store a notebook writes to, and what one answer costs."""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def default_uri() -> str:
    """The store used when none is named: `MLFLOW_TRACKING_URI`, or `mlflow.db` beside this project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{ROOT / 'mlflow.db'}"


def connect(tracking_uri: str, experiment: str) -> str:
    """Point MLflow at a store and an experiment, making both when they are missing.

    Args:
        tracking_uri: a server or database URI; empty for `default_uri()`.
        experiment: name of the experiment that the runs belong to.
    Returns:
        The URI now in use.
    """
    import mlflow
    from filelock import FileLock

    uri = tracking_uri or default_uri()
    _quiet()
    # `mlflow run` starts a run for the project and hands it on; the notebook's runs are its own.
    os.environ.pop("MLFLOW_RUN_ID", None)
    mlflow.set_tracking_uri(uri)
    if not uri.startswith("sqlite:"):
        mlflow.set_experiment(experiment)
        return uri
    # MLflow would put artifacts under the working directory, which differs between papermill and Jupyter;
    # and two notebooks that start at once would both create the database's tables.
    database = Path(uri.removeprefix("sqlite:///"))
    with FileLock(f"{database}.lock"):
        if mlflow.get_experiment_by_name(experiment) is None:
            mlflow.create_experiment(experiment, artifact_location=(database.parent / "mlruns").as_uri())
        mlflow.set_experiment(experiment)
    return uri


def requirements(*packages: str) -> list[str]:
    """Pin packages to what is installed, without a build tag: nobody else's index has `torch==2.13.0+cpu`."""
    return [f"{package}=={version(package).partition('+')[0]}" for package in packages]


def _quiet() -> None:
    """Keep confirmations out of saved notebooks; warnings and errors still show."""
    from mlflow.store.model_registry import abstract_store
    from mlflow.tracking._model_registry import fluent

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for module in (fluent, abstract_store):  # "Created version 1 …" goes to stderr past every logger (3.17)
        module.eprint = lambda *_: None
