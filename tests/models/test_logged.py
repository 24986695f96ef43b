"""A logged model that holds a pickle is refused before anything in it is loaded."""

import mlflow
import pytest

from helpers.errors import ModelUnavailable
from helpers.models import logged


class Pickled(mlflow.pyfunc.PythonModel):
    """A model logged the old way: as an instance, hence as a pickle."""

    def predict(self, context, model_input: list[str], params=None) -> list[str]:
        return model_input


def test_a_pickled_class_is_refused_whatever_mlflow_s_own_switch_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    mlflow.pyfunc.save_model(tmp_path / "model", python_model=Pickled(), pip_requirements=[])
    with pytest.raises(ModelUnavailable, match="is a pickled Python class, and a pickle runs") as refused:
        logged.check(str(tmp_path / "model"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["model.pkl", "data/pytorch_model.BIN", "artifacts/deep/scaler.joblib"])
def test_a_pickle_beside_a_model_from_code_is_refused_by_its_name(name, tmp_path):
    code = tmp_path / "echo.py"
    code.write_text(
        "import mlflow\nclass Echo(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input, params=None): return model_input\n"
        "mlflow.models.set_model(Echo())\n",
        encoding="utf-8",
    )
    folder = tmp_path / "model"
    mlflow.pyfunc.save_model(folder, python_model=str(code), pip_requirements=[])
    logged.check(str(folder))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    with pytest.raises(ModelUnavailable, match=rf"holds .*{name}, which is read with pickle"):
        logged.check(str(folder))


def test_what_the_notebooks_log_is_let_through_under_each_of_its_names(registered_onnx):
    mlflow.set_tracking_uri(registered_onnx)
    for uri in ("models:/slm-onnx@champion", "models:/slm-onnx/1"):
        logged.check(uri)
        logged.check(f"models:/{mlflow.models.get_model_info(uri).model_id}")
