"""A registry of its own, with the models that the servers under test serve."""

from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from serving_support import SYSTEM_MESSAGE
from support import connected

from helpers import tracking
from helpers.models import onnx_chat_model


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="session")
def register_python_model(store) -> Callable[..., str]:
    """Register a model from a Python file; gives its URI by the alias `champion`."""

    def register(name: str, code: str | Path, **options) -> str:
        with connected(store), mlflow.start_run():
            info = mlflow.pyfunc.log_model(
                python_model=str(code),
                name="phi3-mlflow-model",
                registered_model_name=name,
                pip_requirements=tracking.requirements("mlflow", "onnxruntime-genai"),
                **options,
            )
            version = info.registered_model_version
            mlflow.MlflowClient().set_registered_model_alias(name, "champion", version)
        return f"models:/{name}@champion"

    return register


@pytest.fixture(scope="session")
def tiny_uri(register_python_model, tiny_phi3_onnx) -> str:
    return register_python_model(
        "slm-onnx",
        onnx_chat_model.__file__,
        artifacts={"phi3-mini-onnx": str(tiny_phi3_onnx)},
        metadata={"system_message": SYSTEM_MESSAGE},
        input_example=({"prompt": ["Hello"]}, {"max_new_tokens": 4, "stop": ["\n"]}),
    )


@pytest.fixture(scope="session")
def smollm2_uri(register_python_model, smollm2_onnx) -> str:
    return register_python_model(
        "smollm2",
        onnx_chat_model.__file__,
        artifacts={"phi3-mini-onnx": str(smollm2_onnx)},
        metadata={"system_message": ""},
    )


@pytest.fixture(scope="session")
def transformers_uri(store, tiny_phi3_checkpoint) -> str:
    from transformers import pipeline

    with connected(store), mlflow.start_run():
        info = mlflow.transformers.log_model(
            pipeline("text-generation", model=str(tiny_phi3_checkpoint)),
            name="phi3-mlflow-model",
            task="llm/v1/chat",
            registered_model_name="slm-transformers",
            model_config={"max_new_tokens": 20, "do_sample": False},
            pip_requirements=tracking.requirements("mlflow", "torch", "transformers"),
        )
    return f"models:/slm-transformers/{info.registered_model_version}"
