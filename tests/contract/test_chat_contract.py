"""What `llm/v1/chat` does with each field in mlflow 3.17 and transformers 5.23; other releases may differ."""

from importlib.metadata import version

import mlflow
import pytest

from helpers import chat_contract, tracking
from helpers.chat_contract import FAILS, HONOURED, IGNORED, NOT_SHOWN

# Field, a part of what the table says was sent, outcome; in the table's order.
TODAY = [
    ("messages", "system and user", HONOURED),
    ("messages", "several turns", HONOURED),
    ("messages", "a turn without content", FAILS),
    ("messages", "empty list", FAILS),
    ("messages", "two rows", HONOURED),
    ("temperature", "0.0", HONOURED),
    ("temperature", "50.0", IGNORED),
    ("temperature", "0.0, sampling on", FAILS),
    ("temperature", "50.0, sampling on", HONOURED),
    ("max_tokens", "", HONOURED),
    ("max_tokens", "0", IGNORED),
    ("max_tokens", "in two rows", IGNORED),
    ("stop", "answer ends there", HONOURED),
    ("stop", "stop text left out", IGNORED),
    ("stop", "inside a token", IGNORED),
    ("stop", "model moved", FAILS),
    ("n", "1", FAILS),
    ("n", "2", FAILS),
    ("stream", "False", FAILS),
    ("stream", "True", FAILS),
    ("top_p", "0.9", IGNORED),
    ("top_p", "sampling on", HONOURED),
    ("top_k", "50", IGNORED),
    ("top_k", "sampling on", HONOURED),
    ("frequency_penalty", "0.0", FAILS),
    ("frequency_penalty", "2.0", FAILS),
    ("presence_penalty", "0.0", FAILS),
    ("presence_penalty", "2.0", FAILS),
    ("tools", "one function", IGNORED),
    ("custom_inputs", "", FAILS),
    ("unknown key", "do_sample", IGNORED),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, tiny_phi3_checkpoint):
    """tiny-phi3 as notebook 01 logs a pipeline, loaded again."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = mlflow.get_tracking_uri()
    tracking.connect(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}", "contract")
    pipeline = transformers.pipeline(
        "text-generation",
        model=AutoModelForCausalLM.from_pretrained(tiny_phi3_checkpoint),
        tokenizer=AutoTokenizer.from_pretrained(tiny_phi3_checkpoint),
    )
    info = mlflow.transformers.log_model(
        pipeline,
        name="phi3-mlflow-model",
        task="llm/v1/chat",
        model_config={"max_new_tokens": 32, "do_sample": False},
        pip_requirements=tracking.requirements("mlflow", "transformers", "torch"),
    )
    yield mlflow.pyfunc.load_model(info.model_uri)
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def table(loaded):
    return chat_contract.chat_contract(loaded)


def test_every_field_of_the_chat_signature_does_what_it_did(table):
    assert len(table) == len(TODAY)
    changes = [
        f"  {row.field} ({row.sent}): was {was}, is {row.outcome}. Observed: {row.observed}"
        for row, (_, _, was) in zip(table.itertuples(), TODAY, strict=True)
        if row.outcome != was
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlflow", "transformers"))
    assert not changes, "\n".join([f"The chat contract changed with {versions}:", *changes])


def test_the_pinned_rows_are_the_rows_of_the_table(table):
    for row, (field, sent, _) in zip(table.itertuples(), TODAY, strict=True):
        assert row.field == field
        assert sent in row.sent


def test_no_field_of_the_signature_is_left_out(loaded, table):
    assert set(loaded.metadata.signature.inputs.input_names()) <= set(table["field"])


def test_advice_is_given_exactly_where_a_field_is_not_honoured(table):
    assert ((table["instead"] == "") == (table["outcome"] == HONOURED)).all()


def test_the_advised_repetition_penalty_changes_the_answer(loaded):
    question = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
    advised = chat_contract._variant(
        loaded, repetition_penalty=50.0
    )  # random weights repeat themselves little
    assert advised.predict(question)[0]["choices"] != loaded.predict(question)[0]["choices"]


def test_an_answer_that_is_merely_shorter_does_not_count_as_stopped():
    def reply(text: str) -> list[dict]:
        return [{"choices": [{"message": {"content": text}}]}]

    stopped = chat_contract._ends_at("capital", "The capital of Spain is Madrid.")
    assert stopped(reply("The capital"))
    assert stopped(reply("The "))
    assert not any(stopped(reply(text)) for text in ("", "The cap", "The capital of", "Madrid"))


def test_a_failing_request_names_its_field(table):
    failing = table[(table["outcome"] == FAILS) & table["field"].isin(["n", "stream", "custom_inputs"])]
    assert all(row.field in row.observed for row in failing.itertuples())


def test_trying_the_fields_leaves_the_loaded_model_as_it_was(loaded, table):
    question = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
    answers = {loaded.predict(question)[0]["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(answers) == 1  # still greedy


def test_the_logged_requests_print_nothing(loaded, capfd):
    chat_contract.chat_contract(loaded)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_model_that_answers_nothing_gets_a_table_too(loaded):
    """The greedy token ends the answer; what can only be seen in a text is said to be not shown."""
    greedy = loaded._model_impl.pipeline.model
    weight, ends = greedy.model.norm.weight, greedy.generation_config.eos_token_id
    before = weight.detach().clone()
    try:
        weight.data.zero_()  # all tokens are equally likely, so that the first is the greedy one
        greedy.generation_config.eos_token_id = [0]
        table = chat_contract.chat_contract(loaded)
    finally:
        weight.data.copy_(before)
        greedy.generation_config.eos_token_id = ends
    unseen = table[table["outcome"] == NOT_SHOWN]
    assert list(unseen["field"]) == ["max_tokens"] * 3 + ["stop"] * 3
    assert set(unseen["instead"]) == {""}
    assert list(table["field"]) == [field for field, *_ in TODAY]
