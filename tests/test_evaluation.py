import json
import math

import mlflow
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import candidates, evaluation, tracking
from helpers.models import catalog, export, onnx_chat_model

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


def test_there_are_a_hundred_different_questions_spread_evenly_over_five_subjects():
    questions = evaluation.questions()
    assert questions["question"].is_unique
    assert questions["subject"].value_counts().tolist() == [20] * 5


@pytest.mark.parametrize("count", [1, 7, 20, 99])
def test_fewer_questions_are_spread_evenly_over_the_subjects(count):
    fewer = evaluation.questions(count)
    assert len(fewer) == fewer["question"].nunique() == count
    assert set(fewer["question"]) < set(evaluation.questions()["question"])
    each = fewer["subject"].value_counts()
    assert len(each) == min(5, count)
    assert each.max() - each.min() <= 1


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


# --- the measures


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_an_interval_is_that_of_wilson(right, asked, low, high):
    # The first is Newcombe's example (Statistics in Medicine 17, 1998, page 861), without continuity.
    assert evaluation.interval(right / asked, asked) == pytest.approx((low, high), abs=5e-5)


def test_kl_divergence_and_the_likeliest_token_are_right_in_a_case_done_by_hand():
    reference = np.array([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]])
    other = np.array([[0.25, 0.5, 0.25], [0.9, 0.05, 0.05]])
    kl, same = candidates.divergence(reference, other).T
    # 0.5 log(0.5 / 0.25) + 0.25 log(0.25 / 0.5) + 0 = 0.25 log 2
    assert kl == pytest.approx([0.25 * math.log(2), 0], abs=1e-12)
    assert same.tolist() == [0, 1]


def test_a_token_that_cannot_come_costs_nothing_where_the_reference_never_takes_it():
    reference, other = np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]])
    assert candidates.divergence(reference, other)[0].tolist() == pytest.approx([math.log(2), 1])


# --- the gate


def _table(kl=None, **accuracies):
    speeds = {"fp32": 48.0, "int8": 137.0, "int4": 157.0, "transformers": 17.0}
    rows = {
        name: {
            "accuracy": accuracy,
            "kl_divergence": (kl or {}).get(name, 0.0),
            "tokens_per_second": speeds[name],
        }
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


@pytest.mark.parametrize(
    ("kl", "passes"), [(0.0, True), (0.05, True), (0.0501, False), (float("inf"), False), (math.nan, False)]
)
def test_exactly_the_allowed_kl_passes_and_more_does_not(kl, passes):
    table = _table(fp32=0.6, int4=0.9, kl={"int4": kl})
    assert evaluation.gate(table).loc["int4", "passes"] == passes


def test_other_bounds_may_be_allowed():
    table = _table(fp32=0.675, int4=0.6, kl={"int4": 0.2})
    assert evaluation.gate(table, max_drop=0.1, max_kl=0.2).loc["int4", "winner"]
    assert not evaluation.gate(table, max_drop=0.1).loc["int4", "passes"]
    assert not evaluation.gate(table, max_kl=0.2).loc["int4", "passes"]


def test_the_reference_wins_when_nothing_else_passes():
    assert evaluation.gate(_table(fp32=0.7, int8=0.1, int4=0.1)).loc["fp32", "winner"]


def test_every_row_says_its_values_and_the_bounds():
    table = _table(fp32=0.675, int8=0.725, int4=0.6, transformers=0.675, kl={"int8": 0.0045, "int4": 0.312})
    assert evaluation.gate(table)["reason"].to_dict() == {
        "fp32": "accuracy 67.5%, the reference; slower than int8 (48 against 137 tokens/s)",
        "int8": "accuracy 72.5%, 5.0 points above fp32 (5 allowed); KL 0.0045 nats (0.05 allowed); "
        "the fastest of those that pass",
        "int4": "accuracy 60.0%, 7.5 points below fp32: more than the 5 allowed; "
        "KL 0.31 nats: more than the 0.05 allowed",
        "transformers": "accuracy 67.5%, level with fp32 (5 allowed); KL 0 nats (0.05 allowed); "
        "slower than int8 (17 against 137 tokens/s)",
    }


def test_the_baseline_has_its_row_and_never_wins():
    table = _table(transformers=0.7, int4=0.68).rename({"transformers": evaluation.BASELINE})
    table.loc[evaluation.BASELINE, "tokens_per_second"] = 500
    gated = evaluation.gate(table.assign(kl_divergence=math.nan))
    assert gated["reason"].to_dict() == {
        evaluation.BASELINE: "accuracy 70.0%, the reference; the baseline, not for shipping",
        "int4": f"accuracy 68.0%, 2.0 points below {evaluation.BASELINE} (5 allowed); "
        "KL not measured, for lack of fp32; the fastest of those that pass",
    }
    assert gated.index[gated["winner"]].tolist() == ["int4"]
    with pytest.raises(evaluation.GateError, match=r"not promoted to @champion: .* not for shipping"):
        evaluation.promote(table, evaluation.BASELINE, version=None)


def test_a_study_in_which_only_the_baseline_passes_ships_nothing():
    table = _table(transformers=0.7, int4=0.6).rename({"transformers": evaluation.BASELINE})
    with pytest.raises(evaluation.GateError, match=r"No candidate passes.*\n.*\nint4: .*more than the 5"):
        evaluation.gate(table)


def test_a_candidate_that_says_nothing_has_no_speed_and_still_a_verdict():
    table = _table(fp32=0.0, int4=0.0).assign(tokens_per_second=math.nan)
    assert evaluation.gate(table)["winner"].sum() == 1
    table.loc["fp32", "tokens_per_second"] = 48
    assert evaluation.gate(table).loc["fp32", "winner"]


@pytest.mark.parametrize(("tokens", "seconds", "rate"), [(25, 2.5, 12), (1, 0.5, None), (0, 0.4, None)])
def test_a_rate_needs_a_second_token(tokens, seconds, rate):
    measured = candidates.Answer("", tokens, 0.5, seconds).rate(0.5)
    assert measured == rate or (rate is None and math.isnan(measured))


# --- scoring, comparing and promoting, in a store of their own


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tracking.connect(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}", "evaluation")


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
    right = [accepted[0] for accepted in questions["answers"]]
    return pd.DataFrame({"knows": right, "unsure": right}, index=questions["question"])


def test_accuracy_is_the_share_of_questions_answered_right_with_its_interval(store, right_answers):
    right_answers.iloc[:25, 1] = "no idea"
    with mlflow.start_run() as run:
        scores = evaluation.score(right_answers)
    assert scores["accuracy"].to_dict() == {"knows": 1.0, "unsure": 0.75}
    assert scores.loc["unsure", ["accuracy_low", "accuracy_high"]].tolist() == pytest.approx(
        [0.657, 0.825], abs=5e-4
    )
    metrics = mlflow.get_run(run.info.run_id).data.metrics
    assert (metrics["knows/mean"], metrics["unsure/mean"]) == (1.0, 0.75)


def test_every_question_leaves_a_trace_with_all_answers_and_verdicts(store, right_answers, capfd):
    right_answers = right_answers.loc[evaluation.questions(20)["question"]]
    right_answers.iloc[0, 1] = ""  # a random model says nothing
    with mlflow.start_run() as run:
        evaluation.score(right_answers)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    traces = mlflow.search_traces(run_id=run.info.run_id, return_type="list")
    kept = {trace.data.spans[0].inputs["question"]: trace.data.spans[0].outputs for trace in traces}
    assert kept == right_answers.to_dict(orient="index")
    first = next(t for t in traces if t.data.spans[0].inputs["question"] == right_answers.index[0])
    verdicts = {one.name: one.value for one in first.info.assessments}
    assert verdicts["knows"] is True
    assert verdicts["unsure"] is False


@pytest.mark.models
def test_the_same_weights_are_no_nat_away_from_themselves(study):
    table, answers = study
    assert table["kl_divergence"].tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert table.loc[["fp32", "copy"], "top1_agreement"].tolist() == [1.0, 1.0]
    assert table.loc["transformers", "top1_agreement"] > 0.99
    assert (answers["copy"] == answers["fp32"]).all()


@pytest.mark.models
def test_the_pipeline_answers_every_question_like_the_onnx_model(study):
    _, answers = study
    assert answers.index.tolist() == evaluation.questions()["question"].tolist()
    # Random weights emit chat tokens inside an answer; after one, onnxruntime-genai's decoder drops a space.
    without_spaces = answers.map(lambda text: "".join(text.split()))
    assert (without_spaces["transformers"] == without_spaces["fp32"]).all()


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
        assert json.loads(dataset.dataset.profile)["num_rows"] == 100
        assert [given.model_id for given in run.inputs.model_inputs] == [row["model_id"]]
        assert run.data.params["candidate"] == name
        assert run.data.params["max_new_tokens"] == "8"
        for measured in evaluation.MEASURED:
            assert run.data.metrics[measured] == pytest.approx(row[measured])
    assert len(digests) == 1  # equal questions, equal digest


@pytest.mark.models
def test_the_logged_model_shows_the_figures_too(study):
    table, _ = study
    row = table.loc["copy"]
    metrics = {metric.key: metric.value for metric in mlflow.get_logged_model(row["model_id"]).metrics}
    assert metrics == pytest.approx({name: row[name] for name in evaluation.MEASURED})


@pytest.mark.models
def test_a_promoted_version_has_the_alias_and_the_evidence(study):
    table = study[0].assign(accuracy=0.6)
    version = mlflow.register_model(f"models:/{table.loc['copy', 'model_id']}", "promoted")
    promoted = evaluation.promote(table, "copy", version)
    assert promoted.aliases == ["champion"]
    assert promoted.tags["candidate"] == "copy"
    assert promoted.tags["accuracy"] == "0.6"
    assert promoted.tags["kl_divergence"] == "0"
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
        candidates.footprints({"fp32": tmp_path}, [{"role": "user", "content": "Hello"}])


KILLS = """
import os, signal, mlflow
class Model(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        os.kill(os.PROCESS(), signal.SIGKILL)
    def predict(self, context, model_input, params=None):
        return model_input
mlflow.models.set_model(Model())
"""


@pytest.mark.command
@pytest.mark.parametrize(
    ("process", "sentence"),
    [
        ("getpid", "saved could not be loaded and asked: its process was killed"),
        ("getppid", r"The models' memory was not measured \(exit code -9\): "),
    ],
)
def test_a_model_whose_process_is_killed_is_named(tmp_path, process, sentence):
    (tmp_path / "model.py").write_text(KILLS.replace("PROCESS", process), encoding="utf-8")
    folder = tmp_path / "saved"
    mlflow.pyfunc.save_model(folder, python_model=str(tmp_path / "model.py"), pip_requirements=["mlflow"])
    with pytest.raises(RuntimeError, match=sentence):
        candidates.footprints({"fp32": folder}, [{"role": "user", "content": "Hello"}])


# --- the embedded model


def test_a_careless_int4_is_compared_where_models_are_converted_and_never_offered(tmp_path):
    (tmp_path / "genai_config.json").write_text("{}", encoding="utf-8")
    assert export.compared(catalog.find("smollm2-135m")) == ("fp32", "int8", "int4", "int4-default")
    assert export.compared(catalog.find("phi-3-mini")) == ("int4",)  # published
    assert export.compared(catalog.find(str(tmp_path))) == ()  # ONNX already
    with pytest.raises(ValueError, match="precision='int4-default' is not one of fp32, int8, int4"):
        catalog.check_precision("int4-default")


@pytest.fixture(scope="module")
def embedded(store):
    """smollm2-135m behind the wrapper, in what the study compares."""
    model = catalog.find("smollm2-135m")
    return {
        name: mlflow.pyfunc.load_model(_log_onnx(export.onnx_folder(model, name)).model_uri)
        for name in export.compared(model)
    }


@pytest.mark.models
def test_the_embedded_model_knows_some_of_the_answers_and_not_all(embedded):
    questions = evaluation.questions()
    chats = [catalog.find("smollm2-135m").messages(question) for question in questions["question"]]
    texts = [answer.text for answer in candidates.answer(embedded["fp32"], chats, max_new_tokens=16)]
    right = [evaluation.is_correct(*pair) for pair in zip(texts, questions["answers"], strict=True)]
    assert 0.4 <= sum(right) / len(right) <= 0.8


@pytest.fixture(scope="module")
def written(embedded):
    """A chat with what fp32 wrote, a chat that it was told to say nothing in, and their token ids."""
    model = catalog.find("smollm2-135m")
    chats = [
        model.messages(prompt) for prompt in ("What is the capital of Spain?", *evaluation.open_prompts()[:2])
    ]
    texts = [answer.text for answer in candidates.answer(embedded["fp32"], chats, max_new_tokens=24)]
    return [*zip(chats, texts, strict=True), (chats[0], "")]


def test_what_is_read_is_what_fp32_wrote(embedded, written):
    wrapper = embedded["fp32"].unwrap_python_model()
    for chat, text in written:
        prompt, answer = wrapper.encode_messages(chat), wrapper.tokenizer.encode(text)
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        read = candidates.next_token_probabilities(embedded["fp32"], ids, len(prompt) - 1)
        assert read.sum(axis=-1) == pytest.approx(np.ones(len(answer) + 1))
        assert read.argmax(axis=-1)[:-1].tolist() == answer.tolist()


def test_careful_int8_is_nearer_to_fp32_than_careless_int4(embedded, written):
    far = candidates.divergences(embedded, "fp32", written)
    assert far["fp32"] == {"kl_divergence": 0.0, "top1_agreement": 1.0}
    assert 0 < far["int8"]["kl_divergence"] < evaluation.MAX_KL < far["int4-default"]["kl_divergence"]
    assert far["int8"]["top1_agreement"] > far["int4-default"]["top1_agreement"]
