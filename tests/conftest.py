"""What tests share: real models, fetched or built once into the normal weights folder."""

from pathlib import Path

import pytest

from helpers.models import catalog, export, fetch


@pytest.fixture(scope="session")
def tiny_phi3_checkpoint() -> Path:
    """A Transformers folder with Phi-3's architecture at toy size and random weights."""
    return fetch.checkpoint(catalog.find("tiny-phi3"))


@pytest.fixture(scope="session")
def tiny_phi3_onnx() -> Path:
    """The same model as an fp32 ONNX folder."""
    return export.onnx_folder(catalog.find("tiny-phi3"), "fp32")


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Path:
    """A Transformers folder with the embedded chat model, float32."""
    return fetch.checkpoint(catalog.find("smollm2-135m"))


@pytest.fixture(scope="session")
def smollm2_onnx() -> Path:
    """The embedded chat model as an int4 ONNX folder."""
    return export.onnx_folder(catalog.find("smollm2-135m"), "int4")
