"""Prepare a registered model for deploy/Dockerfile: a copy of it without paths of this machine.

    python deploy/prepare_model.py models:/slm-onnx@champion

Writes out/container/: the model, and the tested versions of the packages that the model does not pin itself.
Then prints the command that builds the image. The same command again replaces the folder.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer
import yaml

from helpers import ROOT, tracking
from helpers.models import logged

import mlflow  # isort: skip

OUTPUT = ROOT / "out" / "container"
# Two batches of so many tokens are in memory at most. One token takes 45 KiB with SmolLM2-135M.
MAX_BATCH_TOKENS = 8192


def main(
    model: Annotated[str, typer.Argument(help="model URI")] = "models:/slm-onnx@champion",
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="bound of memory")] = MAX_BATCH_TOKENS,
) -> None:
    """Copy a registered model into out/container/, for deploy/Dockerfile."""
    try:
        tracking.open_store()
        name, version = prepare(model, OUTPUT, max_batch_tokens)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    arguments = f"--build-arg MODEL={name} --build-arg VERSION={version} --tag {name}"
    print(f"Build it: docker build --file deploy/Dockerfile --target openai {arguments} .")


def prepare(model_uri: str, output: Path, max_batch_tokens: int = MAX_BATCH_TOKENS) -> tuple[str, str]:
    """Write what deploy/Dockerfile copies into the folder `output`, in place of what is there.

    Args:
        model_uri: such as `models:/slm-onnx@champion`, looked up in MLflow's current tracking store.
        output: holds `model/` and `constraints.txt` afterwards.
        max_batch_tokens: the setting of that name, for a model that is made of onnx_chat_model.py.
    Returns:
        Name and version of the registered model; for another URI its last part, and an empty version.
    Raises:
        ValueError: if the model is not there.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        staging = Path(folder) / "container"
        staging.mkdir()
        model = _download(model_uri, Path(folder) / "download").replace(staging / "model")
        _rewrite(model / "MLmodel", max_batch_tokens)
        constraints = _constraints(model / "requirements.txt")
        (staging / "constraints.txt").write_text(constraints, encoding="utf-8")
        # The user in the container is not the one that wrote the files.
        for path in [staging, *staging.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(output, ignore_errors=True)
        staging.replace(output)
    registered = output / "model" / "registered_model_meta"
    if not registered.exists():
        return model_uri.rstrip("/").rpartition("/")[2], ""
    about = yaml.safe_load(registered.read_text("utf-8"))
    return about["model_name"], str(about["model_version"])


def _download(model_uri: str, folder: Path) -> Path:
    folder.mkdir()
    try:
        logged.check(model_uri)
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri, dst_path=str(folder)))
    except (mlflow.MlflowException, OSError) as error:
        raise ValueError(
            f"No model {model_uri!r} in {mlflow.get_tracking_uri()}: {' '.join(str(error).split())} "
            "Name one, such as models:/slm-onnx@champion."
        ) from None


def _rewrite(mlmodel: Path, max_batch_tokens: int) -> None:
    """Cut the ties of a file `MLmodel` to the machine it comes from, and bound the memory of a batch."""
    about = without_paths(yaml.safe_load(mlmodel.read_text("utf-8")))
    # MLflow (3.17) looks a model with an id up in its store to describe it; the image has no such store.
    about.pop("model_id", None)
    function = about["flavors"]["python_function"]
    if function.get("model_code_path") == "onnx_chat_model.py":
        function["config"] = (function.get("config") or {}) | {"max_batch_tokens": max_batch_tokens}
    mlmodel.write_text(yaml.safe_dump(about, sort_keys=False, allow_unicode=True), encoding="utf-8")


def without_paths(value: Any) -> Any:
    """The same value, in which the last part stands for each absolute path or file URI.

    MLflow records where the files of a model came from, and reads none of it when it loads the model.
    """
    if isinstance(value, dict):
        return {name: without_paths(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    # A single "/word" may be text, such as a command to the model.
    if isinstance(value, str) and re.match(r"file:|/[^/\s]+/\S|[A-Za-z]:[\\/]", value):
        return PurePosixPath(value.replace("\\", "/")).name
    return value


def _constraints(requirements: Path) -> str:
    """The lines of requirements.lock, except for the packages that the model pins itself."""
    own = {_package(line) for line in requirements.read_text("utf-8").splitlines()}
    locked = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    return "".join(f"{line}\n" for line in locked if _package(line) not in {"", *own})


def _package(requirement: str) -> str:
    """The normalized name in a line of requirements; empty for a comment."""
    return re.match(r"[\w.-]*", requirement.strip())[0].lower().replace("_", "-")


if __name__ == "__main__":
    typer.run(main)
