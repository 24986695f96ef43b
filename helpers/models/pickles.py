"""Code yes, pickles no: a look into a logged model before anything in it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from helpers.errors import ModelUnavailable

# Files that Python, joblib or PyTorch reads with pickle. Models made here have none of them.
PICKLES = (".pkl", ".pickle", ".joblib", ".bin", ".pt", ".pth", ".ckpt")


def refuse_pickle(model_uri: str) -> None:
    """Refuse a logged model that would be read with pickle, which runs any code that is in it.

    MLflow's own switch, MLFLOW_ALLOW_PICKLE_DESERIALIZATION, is deprecated since 3.18, and its successor
    refuses models from code as well. So this reads the MLmodel file and the names of all files itself.

    Args:
        model_uri: of a logged model, or a folder with one.
    Raises:
        ModelUnavailable: naming the model, the pickle, and how to log it instead.
        mlflow.exceptions.MlflowException: if the store cannot say. A model that is not there is not refused:
            whoever loads it says so.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        about = Model.load(model_uri)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return
        raise
    # A class that was logged as a file stands under `model_code_path`, a pickled one under `python_model`.
    if "python_model" in about.flavors.get("python_function", {}):
        raise ModelUnavailable(
            f"{model_uri} is a pickled Python class, and a pickle runs any code that is in it. "
            "Log the class as a file: log_model(python_model='my_model.py')."
        )
    for name in _files(model_uri):
        if PurePosixPath(name).suffix.lower() in PICKLES:
            raise ModelUnavailable(
                f"{model_uri} holds {name}, which is read with pickle, and a pickle runs any code that is in "
                "it. Log the model again with its weights as safetensors or ONNX."
            )


def _files(model_uri: str) -> Iterator[str]:
    """The path of every file of a model, as its store lists them."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.tracking.artifact_utils import _get_root_uri_and_artifact_path

    # Private, because mlflow.artifacts.list_artifacts (3.17) takes no folder below `models:/name@alias`.
    root, path = _get_root_uri_and_artifact_path(model_uri)
    repository = get_artifact_repository(root)
    folders = [path]
    while folders:
        for entry in repository.list_artifacts(folders.pop() or None):
            if entry.is_dir:
                folders.append(entry.path)
            else:
                yield entry.path
