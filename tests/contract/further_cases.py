"""More values of the fields of `llm/v1/chat`, and what mlflow 3.17 and transformers 5.24 do with them."""

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import torch

from helpers import chat_contract
from helpers.chat_contract import (
    FAILS,
    HONOURED,
    HOT,
    IGNORED,
    LOG_PENALTY,
    OMIT,
    Case,
    Plain,
)


class Further(NamedTuple):
    """A request, what becomes of it, and which model it is sent to: see `models`."""

    today: str
    case: Case
    model: str = "greedy"


def models(loaded) -> dict:
    """The same weights greedy, sampling, and with the folder gone that they were logged from."""
    moved = chat_contract.variant(loaded)
    moved._model_impl.flavor_config = moved._model_impl.flavor_config | {"source_model_name": "/gone/model"}
    return {
        "greedy": chat_contract.variant(loaded, do_sample=False),
        "sampling": chat_contract.variant(loaded, do_sample=True),
        "moved": moved,
    }


def send(loaded, question: str = "What is the capital of Spain?") -> pd.DataFrame:
    """Send all, and add what is expected today as a column to what `chat_contract.run` says."""
    served = models(loaded)
    rows = []
    with chat_contract.quiet():
        for further in cases(Plain(served["greedy"], question, "")):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                row = chat_contract.run(further.case, served[further.model])
            rows.append(row | {"today": further.today})
    return pd.DataFrame(rows)


def cases(plain: Plain) -> list[Further]:
    return [
        *of_messages(plain),
        *of_sampling(plain),
        *of_length(plain),
        *of_stop(plain),
        *of_other_fields(plain),
    ]


def tokens(*counts: int) -> Callable[[list[dict]], bool]:
    return lambda reply: [row["usage"]["completion_tokens"] for row in reply] == list(counts)


def of_messages(plain: Plain) -> list[Further]:
    turns = [
        *plain.messages,
        {"role": "assistant", "content": "Madrid."},
        {"role": "user", "content": "Sure?"},
    ]
    no_content = plain.ask(messages=[plain.messages[0], {"role": "user"}])
    rows = pd.DataFrame({"messages": [plain.messages] * 2})
    several = plain.ask(messages=turns, max_tokens=1)
    return [
        Further(HONOURED, Case("messages", "several turns", several, plain.longer_prompt)),
        Further(FAILS, Case("messages", "no content", no_content, plain.same, "always send a content")),
        Further(FAILS, Case("messages", "[]", plain.ask(messages=[]), plain.same, "send a turn")),
        Further(HONOURED, Case("messages", "two rows", rows, tokens(plain.tokens, plain.tokens))),
    ]


def of_sampling(plain: Plain) -> list[Further]:
    def greedy(reply: list[dict]) -> bool:
        return plain.answer.startswith(chat_contract.text(reply))

    def case(sent: str, works: Callable, instead: str = "", **fields: float) -> Case:
        (field, *_) = fields
        return Case(field, sent, plain.ask(max_tokens=plain.limit, **fields), works, instead)

    zero = case("0.0, sampling on", greedy, "send top_k=1, or log a greedy model", temperature=0.0)
    hot = case("50.0, sampling on", lambda reply: not greedy(reply), temperature=HOT)
    likeliest = case("0.000001, sampling on", greedy, top_p=1e-6, temperature=1.0)
    first = case("1, sampling on", greedy, top_k=1, temperature=HOT)
    unknown = plain.ask(do_sample=True, temperature=HOT)
    read = "read the signature: MLflow drops other names with a warning"
    return [
        Further(HONOURED, Case("temperature", "0.0", plain.ask(temperature=0.0), plain.same)),
        Further(FAILS, zero, "sampling"),
        Further(HONOURED, hot, "sampling"),
        Further(HONOURED, likeliest, "sampling"),
        Further(HONOURED, first, "sampling"),
        Further(IGNORED, Case("unknown key", "do_sample=True", unknown, plain.differs, read)),
    ]


def of_length(plain: Plain) -> list[Further]:
    rows = pd.DataFrame({"messages": [plain.messages] * 2, "max_tokens": [1, plain.limit + 1]})
    alone = "one request per row: the first row's fields rule all"
    own = tokens(1, plain.limit + 1)
    zero = plain.ask(max_tokens=0)
    return [
        Further(IGNORED, Case("max_tokens", "0", zero, tokens(0), "send 1 or more", plain.shows)),
        Further(IGNORED, Case("max_tokens", "another in each row", rows, own, alone, plain.shows)),
    ]


def of_stop(plain: Plain) -> list[Further]:
    stop = plain.stop
    inside = stop[1:-1] or stop
    request = plain.ask(stop=[stop])
    cut = "cut the answer at the stop text"
    omit = "leave it out where the folder the model was logged from is gone"

    def left_out(reply: list[dict]) -> bool:
        return stop not in chat_contract.text(reply)

    inner = Case(
        "stop",
        "inside a token",
        plain.ask(stop=[inside]),
        chat_contract.ends_at(inside, plain.answer),
        cut,
        plain.shows,
    )
    return [
        Further(IGNORED, Case("stop", "stop text left out", request, left_out, cut, plain.shows)),
        Further(IGNORED, inner),
        Further(
            FAILS,
            Case(
                "stop", "model moved", request, chat_contract.ends_at(stop, plain.answer), omit, plain.shows
            ),
            "moved",
        ),
    ]


def of_other_fields(plain: Plain) -> list[Further]:
    def two(reply: list[dict]) -> bool:
        return len(reply[0]["choices"]) == 2

    def chunks(reply: list[dict]) -> bool:
        return "chunk" in str(reply[0]["object"])

    penalties = [
        Case(field, "2.0", plain.ask(**{field: 2.0}), plain.differs, LOG_PENALTY, plain.shows)
        for field in ("frequency_penalty", "presence_penalty")
    ]
    return [
        Further(FAILS, Case("n", "2", plain.ask(n=2), two, "send the question in n rows")),
        Further(FAILS, Case("stream", "True", plain.ask(stream=True), chunks, OMIT)),
        *[Further(FAILS, case) for case in penalties],
    ]
