import json
import math

import mlflow
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.genai import datasets

from helpers import evaluation, tracking
from helpers.models import catalog, onnx_chat_model

# --- the questions and how an answer is judged


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("The capital of Spain is Madrid.", ["Madrid"]),
        ("MADRID!", ["Madrid"]),
        ("Plants take in CO₂.", ["carbon dioxide", "CO2"]),
        ("It is São Paulo", ["Sao Paulo"]),
        ("leonardo\nda  vinci", ["da Vinci"]),
        ("The answer is **8**.", ["8", "eight"]),
        ("South-America", ["South America"]),
    ],
)
def test_an_accepted_answer_counts_whatever_its_case_accents_and_marks(text, accepted):
    assert evaluation.is_correct(text, accepted)


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("Madridista", ["Madrid"]),
        ("There are 18.", ["8"]),
        ("Vinci da Leonardo", ["da Vinci"]),
        ("", ["Madrid"]),
        ("Mad rid", ["Madrid"]),
        ("This is nice", ["ice"]),
    ],
)
def test_an_accepted_answer_counts_only_as_whole_words(text, accepted):
    assert not evaluation.is_correct(text, accepted)


@given(st.text(), st.text())
def test_an_accepted_answer_counts_wherever_it_stands(before, after):
    assert evaluation.is_correct(f"{before} Madrid, {after}", ["Madrid"])


def test_there_are_forty_different_questions_spread_evenly_over_five_subjects():
    questions = evaluation.questions()
    assert questions["question"].is_unique
    assert questions["subject"].value_counts().tolist() == [8] * 5


def test_every_accepted_answer_has_a_word_in_it():
    for accepted in evaluation.questions()["answers"]:
        assert accepted
        assert all(evaluation.is_correct(answer, [answer]) for answer in accepted)


def test_repeating_a_question_never_answers_it():
    for row in evaluation.questions().itertuples():
        assert not evaluation.is_correct(row.question, row.answers), row.question


def test_the_question_set_says_its_licence_and_how_it_was_chosen():
    content = json.loads(evaluation.QUESTIONS.read_text(encoding="utf-8"))
    assert "MIT" in content["licence"]
    assert "before any model was asked" in content["chosen"]


# --- the gate


def _table(**accuracies):
    speeds = {"fp32": 48.0, "int8": 137.0, "int4": 157.0, "transformers": 17.0}
    rows = {
        name: {"accuracy": accuracy, "tokens_per_second": speeds[name]}
        for name, accuracy in accuracies.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def test_the_fastest_of_those_that_pass_wins():
    gated = evaluation.gate(_table(fp32=0.675, int8=0.65, int4=0.6, transformers=0.675))
    assert gated["passes"].to_dict() == {"fp32": True, "int8": True, "int4": False, "transformers": True}
    assert gated.index[gated["winner"]].tolist() == ["int8"]


@pytest.mark.parametrize(
    ("accuracy", "passes"), [(0.625, True), (0.6, False), (0.675, True), (1.0, True), (float("nan"), False)]
)
def test_exactly_the_allowed_drop_passes_and_more_does_not(accuracy, passes):
    assert evaluation.gate(_table(fp32=0.675, int4=accuracy)).loc["int4", "passes"] == passes


def test_another_drop_may_be_allowed():
    assert evaluation.gate(_table(fp32=0.675, int4=0.6), max_drop=0.1).loc["int4", "winner"]


def test_the_reference_wins_when_nothing_else_passes():
    assert evaluation.gate(_table(fp32=0.7, int8=0.1, int4=0.1)).loc["fp32", "winner"]


def test_every_row_says_why():
    reasons = evaluation.gate(_table(fp32=0.675, int8=0.725, int4=0.6, transformers=0.675))["reason"]
    assert reasons.to_dict() == {
        "fp32": "accuracy 67.5%, the reference; slower than int8 (48 against 137 tokens/s)",
        "int8": "accuracy 72.5%, 5.0 points above fp32; the fastest of those that pass",
        "int4": "accuracy 60.0%, 7.5 points below fp32: more than the 5 allowed",
        "transformers": "accuracy 67.5%, level with fp32; slower than int8 (17 against 137 tokens/s)",
    }


def test_the_baseline_has_its_row_and_never_wins():
    table = _table(transformers=0.7, int4=0.68).rename({"transformers": evaluation.BASELINE})
    table.loc[evaluation.BASELINE, "tokens_per_second"] = 500
    gated = evaluation.gate(table)
    assert gated["reason"].to_dict() == {
        evaluation.BASELINE: "accuracy 70.0%, the reference; the baseline, not for shipping",
        "int4": f"accuracy 68.0%, 2.0 points below {evaluation.BASELINE}; the fastest of those that pass",
    }
    assert gated.index[gated["winner"]].tolist() == ["int4"]
    with pytest.raises(evaluation.GateError, match=r"not promoted to @champion: .* not for shipping"):
        evaluation.promote(table, evaluation.BASELINE, version=None)


def test_a_study_in_which_only_the_baseline_passes_ships_nothing():
    table = _table(transformers=0.7, int4=0.6).rename({"transformers": evaluation.BASELINE})
    expected = "at most 5 points less accurate than slm-transformers: slm-transformers 70.0%, int4 60.0%"
    with pytest.raises(evaluation.GateError, match=expected):
        evaluation.gate(table)


@pytest.mark.parametrize(("tokens", "seconds", "rate"), [(25, 2.5, 12), (1, 0.5, None), (0, 0.4, None)])
def test_a_rate_needs_a_second_token(tokens, seconds, rate):
    measured = evaluation.Answer("", tokens, 0.5, seconds).rate(0.5)
    assert measured == rate or (rate is None and math.isnan(measured))


def test_without_fp32_the_first_candidate_is_the_reference():
    gated = evaluation.gate(_table(transformers=0.7, int4=0.68))
    assert gated.loc["transformers", "reason"].startswith("accuracy 70.0%, the reference")
    assert gated.index[gated["winner"]].tolist() == ["int4"]


# --- scoring, comparing and promoting, in a store of their own


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    before = mlflow.get_tracking_uri()
    yield tracking.connect(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}", "evaluation")
    mlflow.set_tracking_uri(before)


def _log_onnx(folder):
    return mlflow.pyfunc.log_model(
        name="phi3-mlflow-model",
        python_model=onnx_chat_model.__file__,
        artifacts={"phi3-mini-onnx": str(folder)},
        pip_requirements=tracking.requirements("mlflow", "onnxruntime-genai"),
        model_config={"threads": 1},
    )


def _log_pipeline(checkpoint):
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pipeline = transformers.pipeline(
        "text-generation",
        model=AutoModelForCausalLM.from_pretrained(checkpoint),
        tokenizer=AutoTokenizer.from_pretrained(checkpoint),
    )
    return mlflow.transformers.log_model(
        pipeline,
        name="phi3-mlflow-model",
        task="llm/v1/chat",
        pip_requirements=tracking.requirements("mlflow", "transformers", "torch"),
    )


@pytest.fixture(scope="module")
def study(store, tiny_phi3_onnx, tiny_phi3_checkpoint):
    """The table and the answers of the same weights three times: twice in ONNX, once in Transformers."""
    uris = {
        "fp32": _log_onnx(tiny_phi3_onnx).model_uri,
        "copy": _log_onnx(tiny_phi3_onnx).model_uri,
        "transformers": _log_pipeline(tiny_phi3_checkpoint).model_uri,
    }
    with mlflow.start_run(run_name="study"):
        return evaluation.compare(uris, catalog.find("tiny-phi3"), max_new_tokens=8, rounds=1)


@pytest.fixture
def right_answers():
    questions = evaluation.questions()
    return pd.Series([accepted[0] for accepted in questions["answers"]], index=questions["question"])


def test_accuracy_and_agreement_are_shares_of_the_questions(store, right_answers):
    answers = right_answers.copy()
    answers.iloc[:10] = "no idea"
    with mlflow.start_run() as run:
        scores = evaluation.score(answers, reference=right_answers)
    assert scores == {"accuracy": 0.75, "agreement": 0.75}
    metrics = mlflow.get_run(run.info.run_id).data.metrics
    assert metrics["accuracy/mean"] == metrics["agreement/mean"] == 0.75


def test_a_right_answer_in_other_words_is_accurate_without_agreeing(store, right_answers):
    with mlflow.start_run():
        scores = evaluation.score("It is " + right_answers, reference=right_answers)
    assert scores == {"accuracy": 1.0, "agreement": 0.0}


def test_every_question_leaves_a_trace_with_its_answer(store, right_answers):
    with mlflow.start_run() as run:
        evaluation.score(right_answers, right_answers)
    traces = mlflow.search_traces(run_id=run.info.run_id, return_type="list")
    told = {trace.data.spans[0].inputs["question"]: trace.data.spans[0].outputs for trace in traces}
    assert told == right_answers.to_dict()


def test_questions_that_two_runs_made_at_once_or_one_left_half_made_stop_nobody(right_answers, tmp_path):
    before = mlflow.get_tracking_uri()
    tracking.connect(f"sqlite:///{tmp_path}/mlflow.db", "evaluation")
    try:
        name = _score_and_name_the_data(right_answers)
        datasets.delete_dataset(dataset_id=datasets.get_dataset(name=name).dataset_id)
        datasets.create_dataset(name=name)  # its maker was killed here
        assert _score_and_name_the_data(right_answers) == name
        datasets.create_dataset(name=name).merge_records([{"inputs": {"question": "Which?"}}])
        assert _score_and_name_the_data(right_answers) == name
        digests = {
            dataset.digest for run in mlflow.search_runs(output_format="list") for dataset in _data(run)
        }
        assert len(digests) == 2  # one before the first was deleted, one after
    finally:
        mlflow.set_tracking_uri(before)


def _data(run) -> list:
    return [given.dataset for given in run.inputs.dataset_inputs]


def _score_and_name_the_data(answers) -> str:
    with mlflow.start_run() as run:
        assert evaluation.score(answers, answers) == {"accuracy": 1.0, "agreement": 1.0}
    (dataset,) = _data(mlflow.get_run(run.info.run_id))
    assert json.loads(dataset.profile)["num_records"] == 40
    return dataset.name


def test_scoring_prints_nothing(store, right_answers, capfd):
    with mlflow.start_run():
        evaluation.score(right_answers, right_answers)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.models
def test_the_same_weights_agree_with_themselves(study):
    table, answers = study
    assert table.loc[["fp32", "copy"], "agreement"].tolist() == [1.0, 1.0]
    assert (answers["copy"] == answers["fp32"]).all()


@pytest.mark.models
def test_the_pipeline_answers_like_the_onnx_model(study):
    _, answers = study
    # Random weights emit chat tokens inside an answer; after one, onnxruntime-genai's decoder drops a space.
    without_spaces = answers.map(lambda text: "".join(text.split()))
    assert (without_spaces["transformers"] == without_spaces["fp32"]).all()


@pytest.mark.models
def test_the_answers_stand_beside_their_questions(study):
    _, answers = study
    assert answers.index.tolist() == evaluation.questions()["question"].tolist()
    assert answers.columns.tolist() == ["fp32", "copy", "transformers"]


@pytest.mark.models
def test_every_cost_is_a_positive_number(study):
    table, _ = study
    costs = table[["tokens_per_second", "first_token_ms", "load_seconds", "memory_mb", "size_mb"]]
    assert (costs > 0).all(axis=None)


@pytest.mark.models
def test_a_run_holds_model_data_and_figures_together(study):
    table, _ = study
    digests = set()
    for name, row in table.iterrows():
        run = mlflow.get_run(row["run_id"])
        (dataset,) = run.inputs.dataset_inputs
        digests.add((dataset.dataset.name, dataset.dataset.digest))
        assert json.loads(dataset.dataset.profile)["num_records"] == 40
        assert [given.model_id for given in run.inputs.model_inputs] == [row["model_id"]]
        assert run.data.params["candidate"] == name
        assert run.data.params["max_new_tokens"] == "8"
        assert run.data.metrics["accuracy/mean"] == row["accuracy"]
        assert run.data.metrics["size_mb"] == pytest.approx(row["size_mb"])
    assert len(digests) == 1  # equal questions, equal digest


@pytest.mark.models
def test_the_logged_model_shows_the_figures_too(study):
    table, _ = study
    row = table.loc["copy"]
    metrics = {metric.key: metric.value for metric in mlflow.get_logged_model(row["model_id"]).metrics}
    assert metrics["accuracy/mean"] == row["accuracy"]
    assert metrics["tokens_per_second"] == pytest.approx(row["tokens_per_second"])


@pytest.mark.models
def test_a_promoted_version_has_the_alias_and_the_evidence(study):
    table = study[0].assign(accuracy=0.6)
    version = mlflow.register_model(f"models:/{table.loc['copy', 'model_id']}", "promoted")
    promoted = evaluation.promote(table, "copy", version)
    assert promoted.aliases == ["champion"]
    assert promoted.tags["candidate"] == "copy"
    assert promoted.tags["accuracy"] == "0.6"
    assert promoted.tags["evaluation_run"] == table.loc["copy", "run_id"]
    assert "level with fp32" in promoted.tags["gate"]


@pytest.mark.models
def test_a_candidate_that_fails_the_gate_is_refused_and_changes_nothing(study):
    table = study[0].assign(accuracy=[0.7, 0.6, 0.7])
    version = mlflow.register_model(f"models:/{table.loc['copy', 'model_id']}", "refused")
    with pytest.raises(
        evaluation.GateError, match=r"copy is not promoted to @champion: .*10\.0 points below fp32"
    ):
        evaluation.promote(table, "copy", version)
    after = mlflow.MlflowClient().get_model_version("refused", version.version)
    assert (after.aliases, after.tags) == ([], {})


@pytest.mark.models
def test_figures_of_one_model_cannot_promote_another(study):
    table = study[0].assign(accuracy=0.6)
    version = mlflow.register_model(f"models:/{table.loc['fp32', 'model_id']}", "mistaken")
    with pytest.raises(evaluation.GateError, match=r"but copy was measured on m-.* Register that one\."):
        evaluation.promote(table, "copy", version)


def test_only_what_was_measured_can_be_promoted():
    with pytest.raises(evaluation.GateError, match="'int5' was not measured; there are fp32, int8"):
        evaluation.promote(_table(fp32=0.6, int8=0.6), "int5", version=None)


@pytest.mark.command
def test_comparing_nothing_is_a_clear_error():
    with pytest.raises(ValueError, match="There is no candidate"):
        evaluation.compare({}, catalog.find("tiny-phi3"))


@pytest.mark.command
def test_a_folder_that_is_no_model_is_one_clear_sentence(tmp_path):
    with pytest.raises(RuntimeError, match=r"could not be loaded and asked: .*MLmodel"):
        evaluation.footprint(tmp_path, [{"role": "user", "content": "Hello"}])


def test_the_embedded_model_knows_some_of_the_answers_and_not_all(store, smollm2_onnx):
    loaded = mlflow.pyfunc.load_model(_log_onnx(smollm2_onnx).model_uri)
    questions = evaluation.questions()
    chats = [catalog.find("smollm2-135m").messages(question) for question in questions["question"]]
    texts = [answer.text for answer in evaluation.answer(loaded, chats, max_new_tokens=24)]
    right = [evaluation.is_correct(*pair) for pair in zip(texts, questions["answers"], strict=True)]
    assert 0.4 <= sum(right) / len(right) <= 0.8
