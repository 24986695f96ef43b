"""A table scored by `mlflow.pyfunc.spark_udf`: the model's own answers, keys kept, one load per worker."""

import json
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import nbformat
import pandas as pd
import pytest

from helpers import tracking
from helpers.models import catalog, onnx_chat_model

CHAMPION = "models:/slm-onnx@champion"
PARAMS = {"max_new_tokens": 9}
ROWS = [
    [f"key {number}", f'Say "{number}" in {city}: 1 + 1 = ?']
    for number, city in enumerate(["Rom", "Łódź", "東京", "Oslo", "Köln"] * 8)
]
SCORE = """
import json, sys
import mlflow, pandas as pd
from helpers import scoring

store, model, rows, params, cores = json.load(sys.stdin)
mlflow.set_tracking_uri(store)
session = scoring.spark_session(f"local[{cores}]")
session.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", 4)
answer = mlflow.pyfunc.spark_udf(
    session, model, env_manager="local", result_type="string", params=params, model_config={"threads": 1}
)
table = pd.DataFrame(rows, columns=["key", "prompt"]).reset_index(names="row")
spread = session.createDataFrame(table).repartition(cores)
scored = spread.withColumn("answer", answer("prompt")).toPandas().sort_values("row")
session.stop()
print(json.dumps(scored.drop(columns="row").values.tolist()))
"""
COUNTED = """

class Counted(Phi3Model):
    def load_context(self, context):
        super().load_context(context)
        with open({log!r}, "a") as log:
            print(os.getpid(), context.model_config["threads"], file=log)


mlflow.models.set_model(Counted())
"""

pytestmark = pytest.mark.spark


@pytest.fixture
def score(with_pyspark, tmp_path):
    """Score rows in another process, as notebook 02 does; a list of [key, prompt, answer]."""
    (tmp_path / "score.py").write_text(SCORE, encoding="utf-8")

    def run(*asked) -> list[list[str]]:
        command = [sys.executable, tmp_path / "score.py"]
        result = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, env=with_pyspark
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


def test_rows_keep_order_and_keys_answers_are_the_models_own_and_each_worker_loads_it_once(
    score, tiny_phi3_onnx, tmp_path
):
    store = tracking.connect(f"sqlite:///{tmp_path}/mlflow.db", "count the loads")
    wrapper = Path(onnx_chat_model.__file__).read_text("utf-8")
    (tmp_path / "counted.py").write_text(
        wrapper + COUNTED.format(log=str(tmp_path / "loads.log")), encoding="utf-8"
    )
    with mlflow.start_run():
        model = mlflow.pyfunc.log_model(
            name="counted",
            python_model=str(tmp_path / "counted.py"),
            artifacts={"phi3-mini-onnx": str(tiny_phi3_onnx)},
            signature=mlflow.models.infer_signature({"prompt": "Hi"}, ["Ho"], onnx_chat_model.DEFAULT_PARAMS),
            model_config={"threads": 2},
            pip_requirements=tracking.requirements("mlflow", "onnxruntime-genai"),
        )
    (tmp_path / "loads.log").write_text("", encoding="utf-8")
    scored = score(store, model.model_uri, ROWS, PARAMS, 2)
    loads = (tmp_path / "loads.log").read_text("utf-8").splitlines()  # 40 rows came in ten batches of four
    assert len(loads) == len({load.split()[0] for load in loads}) == 2
    assert {load.split()[1] for load in loads} == {"1"}  # threads, as the call has it
    prompts = pd.DataFrame(ROWS, columns=["key", "prompt"])[["prompt"]]
    answers = mlflow.pyfunc.load_model(model.model_uri).predict(prompts, params=PARAMS)
    assert scored == [[*row, answer] for row, answer in zip(ROWS, answers, strict=True)]


def test_notebook_02_scores_its_table_with_spark_and_shows_the_champions_answers_in_order(
    with_pyspark, tiny_phi3_onnx, tmp_path
):
    """Of an ONNX folder, which leaves the notebook one candidate to measure."""
    model = str(tiny_phi3_onnx)
    switches = {"model": model, "max_new_tokens": "9", "serve": "False", "spark": "True", "questions": "20"}
    given = [part for name, value in switches.items() for part in ("-p", name, value)]
    store = f"sqlite:///{tmp_path}/mlflow.db"
    given += ["-p", "tracking_uri", store, "--output", str(tmp_path)]
    command = [sys.executable, "-m", "helpers", "run", "02", *given]
    result = subprocess.run(command, capture_output=True, text=True, env=with_pyspark)
    assert result.returncode == 0, result.stderr
    book = nbformat.read(tmp_path / "02_CustomPythonWrapper.ipynb", as_version=4)
    (cell,) = (cell for cell in book.cells if "spark_udf" in cell.source and cell.cell_type == "code")
    (table,) = (output.data["text/html"] for output in cell.outputs if "data" in output)
    mlflow.set_tracking_uri(store)
    champion, countries = mlflow.pyfunc.load_model(CHAMPION), ["Spain", "France", "Italy", "Japan"]
    messages = catalog.find(model).messages
    chats = [messages(f"What is the capital of {country}?") for country in countries]
    prompts = [champion.unwrap_python_model().apply_chat_template(chat) for chat in chats]
    answers = champion.predict(pd.DataFrame({"prompt": prompts}), params={"max_new_tokens": 24})
    assert all(answers)
    expected = pd.DataFrame({"country": countries, "answer": answers})
    assert cells(table) == cells(expected._repr_html_())


def cells(table: str) -> list[str]:
    """What stands in the body of an HTML table, row by row, without the row's label."""
    return re.findall("<td>(.*?)</td>", table, re.DOTALL)
