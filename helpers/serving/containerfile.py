"""A container context for a registered model: MLflow's own Dockerfile, fit for a language model on a CPU."""

from __future__ import annotations

import filecmp
import re
import tempfile
from pathlib import Path

from helpers import ROOT, tracking

LOCK = ROOT / "requirements.lock"
PORT = 8000  # MLflow's, behind the nginx that is left out here
REQUEST_SECONDS = 600  # a full batch on a slow CPU; MLflow's 60 would answer 504 and go on generating

# MLflow's generator gives: one copy of the model per core; nginx with a fixed limit of 60 s in front, which
# forwards neither /health nor /version; packages in whatever version is newest on the day of the build; root.
INSTALLATION = """\
# Packages before the model: a new version of the model does not install them again
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
COPY constraints.txt {model}/requirements.txt /opt/mlflow/
RUN pip install --no-cache-dir -c constraints.txt -r requirements.txt

COPY {model} /opt/ml/model
"""
# Straight: a proxy in the image's environment must not be asked for its own address.
HEALTH = (
    "import urllib.request as r; "
    f"r.build_opener(r.ProxyHandler({{}})).open('http://127.0.0.1:{PORT}/ping', timeout=25)"
)
SETTINGS = f"""\
ENV MLFLOW_MODELS_WORKERS=1 \\
    MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT={REQUEST_SECONDS} \\
    DISABLE_NGINX=true \\
    UVICORN_HOST=0.0.0.0 \\
    MLFLOW_DISABLE_TELEMETRY=true \\
    ORT_DISABLE_TELEMETRY=true \\
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \\
    HF_HUB_OFFLINE=1

RUN useradd --create-home --uid 10001 mlflow
USER 10001
EXPOSE {PORT}
# While a long prompt is read the server holds Python's lock, so one slow answer is not a dead server.
HEALTHCHECK --interval=30s --timeout=30s --start-period=300s --retries=3 \\
    CMD ["python", "-c", "{HEALTH}"]

"""


def write(model_uri: str, output: Path) -> Path:
    """Write Dockerfile, model and constraints into the folder `output`, all or nothing.

    The same model written again leaves the folder as it is.

    Args:
        model_uri: such as `models:/slm-onnx@champion`, looked up in MLflow's current tracking store.
        output: the folder for `docker build`; made when missing.
    Returns:
        The Dockerfile.
    Raises:
        ValueError: if the model is not there, or `output` holds something else.
        RuntimeError: if MLflow's generator no longer writes what is replaced here.
    """
    output = output.expanduser().resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        context = Path(folder) / "context"
        _generate(model_uri, context)
        model = next(context.rglob("MLmodel")).parent
        (context / "constraints.txt").write_text(_constraints(model / "requirements.txt"), encoding="utf-8")
        dockerfile = context / "Dockerfile"
        installation = INSTALLATION.format(model=model.relative_to(context).as_posix())
        dockerfile.write_text(
            _for_language_models(dockerfile.read_text("utf-8"), installation), encoding="utf-8"
        )
        for path in [context, *context.rglob("*")]:  # the image's user is not the one that wrote the files
            path.chmod(0o755 if path.is_dir() else 0o644)
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            context.replace(output)
        elif not _same(context, output):
            raise ValueError(
                f"{output} exists and holds something else than the context of {model_uri}. "
                "Remove it, or name another folder with --output."
            )
    return output / dockerfile.name


def _generate(model_uri: str, context: Path) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.models import cli

    arguments = ["--model-uri", model_uri, "--output-directory", str(context), "--env-manager", "local"]
    try:
        tracking.refuse_if_gone(model_uri)
        cli.commands.main(["generate-dockerfile", *arguments], standalone_mode=False)
    except (MlflowException, OSError) as error:
        raise ValueError(
            f"No model {model_uri!r} in {mlflow.get_tracking_uri()}: {' '.join(str(error).split())} "
            "Name one with --model models:/slm-onnx@champion."
        ) from None


def _for_language_models(text: str, installation: str) -> str:
    """MLflow's Dockerfile with one pinned installation, without nginx, and with the settings above."""
    text = _replace(text, r"# Fail fast on a stalled package mirror\n.*?nginx\n\s*", "")
    text = _replace(text, r"# Install MLflow\nRUN [^\n]*\n\s*", "")
    text = _replace(text, r"# Copy model to image.*?env_manager='local'\);\"\n", installation)
    return _replace(text, r"# clean up apt cache.*?\n\n(?=ENTRYPOINT)", SETTINGS)


def _replace(text: str, pattern: str, new: str) -> str:
    replaced, count = re.subn(pattern, lambda match: new, text, flags=re.DOTALL)
    if count != 1:
        raise RuntimeError(
            f"MLflow's Dockerfile has {count} places like {pattern!r}, not one. Install the mlflow of "
            "requirements.lock, or write the Dockerfile with `mlflow models generate-dockerfile`."
        )
    return replaced


def _constraints(requirements: Path) -> str:
    """The tested versions of everything but what the model itself asks for by name: its word is the last."""
    names = {_name(line) for line in requirements.read_text("utf-8").splitlines() if line.strip()}
    locked = LOCK.read_text("utf-8").splitlines()
    return "".join(f"{line}\n" for line in locked if not line.startswith("#") and _name(line) not in names)


def _name(requirement: str) -> str:
    return re.match(r"\s*([\w.-]*)", requirement).group(1).lower().replace("_", "-")


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    files = [sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) for root in (one, other)]
    return files[0] == files[1] and not any(filecmp.cmpfiles(one, other, files[0], shallow=False)[1:])
