"""What the notebooks write, a person finds in MLflow's own UI."""

import sys
from collections.abc import Iterator

import mlflow
import pytest

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed; `make setup` installs it")
from playwright.sync_api import expect

from helpers import processes, tracking
from helpers.models import catalog, export, fetch, onnx_chat_model

pytestmark = pytest.mark.browser

COUNTRIES = ("Spain", "France", "Italy", "Japan", "Greece", "Portugal")
LIMITS = (8, 16, 32)
SCALE = 16 / 21  # read by the fixture `page`: tables are 1680 points wide on a picture of 1280 pixels
EXPERIMENT = "small-language-models"


@pytest.fixture(scope="module")
def store(pictures, log_wrapper, tmp_path_factory) -> Iterator[dict]:
    """A store filled as the notebooks do it: a registered champion, traced answers, runs with figures.

    Gives experiment_id, model, precision, tokens (question → total) and runs (limit → metrics).
    """
    name, precision = ("smollm2-135m", "int8") if pictures else ("tiny-phi3", "fp32")
    model = catalog.find(name)
    folder = export.onnx_folder(model, precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGNAME", "reader")  # MLflow notes who ran it; a picture should not
        tracking.connect(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db", EXPERIMENT)
        wrapper = _champion(log_wrapper, model, precision, folder)
        yield {
            "experiment_id": mlflow.get_experiment_by_name(EXPERIMENT).experiment_id,
            "model": model,
            "precision": precision,
            "tokens": _trace_answers(wrapper, model),
            "runs": _length_study(wrapper, model),
        }


def _champion(log_wrapper, model, precision, folder) -> onnx_chat_model.Phi3Model:
    with mlflow.start_run(run_name="custom-python-wrapper"):
        mlflow.log_params({"model": model.key, "precision": precision})
        logged = log_wrapper(folder)
    client, version = mlflow.MlflowClient(), logged.registered_model_version
    client.update_model_version("slm-onnx", version, f"{model.key} in {precision}, behind a Python class.")
    for tag, value in {**fetch.source(folder), "precision": precision}.items():
        client.set_model_version_tag("slm-onnx", version, tag, value)
    client.set_registered_model_alias("slm-onnx", "champion", version)
    return mlflow.pyfunc.load_model("models:/slm-onnx@champion").unwrap_python_model()


def _answer(wrapper, model, question: str, limit: int) -> onnx_chat_model.Completion:
    prompt = wrapper.apply_chat_template(model.messages(question))
    return wrapper.generate([prompt], {"max_new_tokens": limit})[0].result()


def _trace_answers(wrapper, model) -> dict[str, int]:
    tokens = {}

    @mlflow.trace(span_type="CHAT_MODEL")
    def chat(question):
        answer = _answer(wrapper, model, question, 24)
        tokens[question] = answer.prompt_tokens + answer.completion_tokens
        usage = {
            "input_tokens": answer.prompt_tokens,
            "output_tokens": answer.completion_tokens,
            "total_tokens": tokens[question],
        }
        mlflow.get_current_active_span().set_attribute("mlflow.chat.tokenUsage", usage)
        mlflow.update_current_trace(tags={"model_version": "slm-onnx/1"})
        return answer.text

    for country in COUNTRIES:
        chat(f"What is the capital of {country}?")
    mlflow.flush_trace_async_logging()
    return tokens


def _length_study(wrapper, model) -> dict[int, dict[str, float]]:
    runs = {}
    with mlflow.start_run(run_name="length-study"):
        for limit in LIMITS:
            with mlflow.start_run(run_name=f"{limit} tokens", nested=True):
                answer = _answer(wrapper, model, "Tell me a story about a robot.", limit)
                mlflow.log_param("max_tokens", limit)
                runs[limit] = {"completion_tokens": answer.completion_tokens, "seconds": answer.seconds}
                mlflow.log_metrics(runs[limit])
    return runs


@pytest.fixture(scope="module")
def ui(store, page) -> Iterator[str]:
    """The URL of `mlflow server` over the store, with the panel closed that a first visit opens."""
    port = processes.free_port()
    # fmt: off
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", mlflow.get_tracking_uri(),
               "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # fmt: on
    with processes.running(command, port, "MLflow's UI", 600) as url:
        page.goto(url)
        page.locator("[data-component-id='mlflow.assistant.chat_panel.close']").click()
        yield url


def test_the_traces_show_question_tokens_and_version_of_every_answer(store, ui, page, picture):
    page.goto(f"{ui}/#/experiments/{store['experiment_id']}/traces")
    page.get_by_role("button", name="Got it").click()  # a hint that a first visit shows
    for question, tokens in store["tokens"].items():
        row = page.get_by_role("row").filter(has_text=question)
        expect(row.get_by_role("cell", name="OK", exact=True)).to_be_visible()
        expect(row.get_by_role("cell", name=str(tokens), exact=True)).to_be_visible()
        expect(row.get_by_role("button", name="model_version: slm-onnx/1")).to_be_visible()
    picture("mlflow-traces", readme=True)


def test_the_registered_model_shows_version_alias_tags_and_description(store, ui, page, picture):
    page.goto(f"{ui}/#/models/slm-onnx")
    row = page.get_by_role("row").filter(has_text="Version 1")
    expect(row.get_by_text("@ champion")).to_be_visible()
    expect(row.get_by_text("precision")).to_be_visible()
    page.get_by_role("link", name="Version 1").click()
    expect(page.get_by_role("heading", name="Version 1")).to_be_visible()
    expect(page.get_by_text("@ champion")).to_be_visible()
    expect(page.get_by_text(f"{store['model'].key} in {store['precision']}")).to_be_visible()
    tags = page.get_by_role("row").filter(has_text="precision")
    expect(tags.get_by_text(store["precision"], exact=True)).to_be_visible()
    expect(page.get_by_text("source_revision")).to_be_visible()
    picture("mlflow-model", readme=True)


def test_the_runs_of_a_study_stand_side_by_side_with_their_metrics(store, ui, page, picture):
    page.goto(f"{ui}/#/experiments/{store['experiment_id']}/runs")
    study = page.get_by_role("gridcell").filter(has=page.get_by_role("link", name="length-study"))
    study.get_by_role("button").click()  # the plus sign: a study's runs are folded away at first
    page.get_by_role("button", name="Show more columns").click()
    page.get_by_text("Metrics (2)").click()
    page.keyboard.press("Escape")
    for limit in LIMITS:  # the grid draws its fixed and its moving columns apart; a row's number joins them
        run = page.get_by_role("row").filter(has=page.get_by_role("link", name=f"{limit} tokens", exact=True))
        figure = page.locator(f"[row-index='{run.get_attribute('row-index')}'] [col-id*=completion_tokens]")
        expect(figure).to_have_text(str(store["runs"][limit]["completion_tokens"]))
    picture("mlflow-runs")


def test_a_run_shows_its_parameter_and_its_metrics(store, ui, page):
    (run_id,) = mlflow.search_runs(filter_string="params.max_tokens = '16'").run_id
    page.goto(f"{ui}/#/experiments/{store['experiment_id']}/runs/{run_id}")
    expect(page.get_by_role("heading", name="16 tokens")).to_be_visible()
    expect(page.get_by_role("row", name="max_tokens 16")).to_be_visible()
    for name, value in store["runs"][16].items():
        expect(page.get_by_role("row", name=f"{name} {value}")).to_be_visible()
