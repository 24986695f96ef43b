"""What `llm/v1/chat` does with each field in mlflow 3.17 and transformers 5.24; other releases may differ."""

from importlib.metadata import version

import further_cases
import mlflow
import pandas as pd
import pytest

from helpers import chat_contract, tracking
from helpers.chat_contract import FAILS, HONOURED, IGNORED, NOT_SHOWN

# The notebook's table. `further_cases` has more values of the same fields.
TODAY = {
    "messages": HONOURED,
    "temperature": IGNORED,
    "max_tokens": HONOURED,
    "stop": HONOURED,
    "n": FAILS,
    "stream": FAILS,
    "top_p": IGNORED,
    "top_k": IGNORED,
    "frequency_penalty": FAILS,
    "presence_penalty": FAILS,
    "tools": IGNORED,
    "custom_inputs": FAILS,
}
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, tiny_phi3_checkpoint):
    """tiny-phi3 as notebook 01 logs a pipeline, loaded again."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    return mlflow.pyfunc.load_model(info.model_uri)


@pytest.fixture(scope="module")
def table(loaded):
    return chat_contract.chat_contract(loaded)


@pytest.fixture(scope="module")
def complete(loaded, table):
    """The notebook's rows and the further ones, each with its outcome of `today`."""
    return pd.concat([table.assign(today=table["field"].map(TODAY)), further_cases.send(loaded)])


def test_every_value_of_every_field_does_what_it_did(complete):
    changes = [
        f"  {row.field} ({row.sent}): was {row.today}, is {row.outcome}. Observed: {row.observed}"
        for row in complete.itertuples()
        if row.outcome != row.today
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlflow", "transformers"))
    assert not changes, "\n".join([f"The chat contract changed with {versions}:", *changes])


def test_the_table_has_one_row_for_each_field_in_the_signature_s_order(loaded, table):
    assert list(table["field"]) == loaded.metadata.signature.inputs.input_names()


def test_advice_is_given_exactly_where_a_field_is_not_honoured(complete):
    assert ((complete["instead"] == "") == (complete["outcome"] == HONOURED)).all()


def test_a_failing_request_names_its_field(complete):
    failing = complete[complete["outcome"] == FAILS]
    failing = failing[failing["field"].isin(["n", "stream", "custom_inputs"])]
    assert all(row.field in row.observed for row in failing.itertuples())


def test_the_advised_repetition_penalty_changes_the_answer(loaded):
    # Random weights repeat themselves little.
    advised = chat_contract.variant(loaded, repetition_penalty=50.0)
    assert advised.predict(QUESTION)[0]["choices"] != loaded.predict(QUESTION)[0]["choices"]


def test_an_answer_that_is_merely_shorter_does_not_count_as_stopped():
    def reply(text: str) -> list[dict]:
        return [{"choices": [{"message": {"content": text}}]}]

    stopped = chat_contract.ends_at("capital", "The capital of Spain is Madrid.")
    assert stopped(reply("The capital"))
    assert stopped(reply("The "))
    assert not any(stopped(reply(text)) for text in ("", "The cap", "The capital of", "Madrid"))


def test_trying_the_fields_leaves_the_loaded_model_as_it_was(loaded, table):
    answers = {chat_contract.text(loaded.predict(QUESTION)) for _ in range(3)}
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
    assert list(unseen["field"]) == ["max_tokens", "stop"]
    assert set(unseen["instead"]) == {""}
    assert list(table["field"]) == list(TODAY)
