"""What a chat model logged with `mlflow.transformers` does with each field its signature lists.

The signature of `llm/v1/chat` follows OpenAI's chat completions, but MLflow hands most fields to the
Transformers pipeline as they are. Nothing in the table is written down beforehand: every outcome comes
from a request and its answer, so a new release of MLflow or Transformers changes the table by itself.
`tests/contract/` sends more values of these fields.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.pyfunc import PyFuncModel

HONOURED, IGNORED, FAILS, NOT_SHOWN = "honoured", "ignored", "request fails", "not shown"
# So high a temperature that a sampled answer cannot be the greedy one by luck.
HOT = 50.0
OMIT = "leave it out"
TELL = "describe the tool in the system message"
LOG_SAMPLING = "log or load the model with model_config={'do_sample': True}"
LOG_PENALTY = "leave it out; log or load the model with model_config={'repetition_penalty': 1.2}"
_CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": _CITY}}


@dataclass(frozen=True)
class Case:
    """One request, and how to tell from its reply that the field did what it asks for."""

    field: str
    sent: str
    request: Any
    works: Callable[[list[dict]], bool]
    instead: str = ""
    # False: the model's answer is too short for the field to show in it.
    shows: bool = True
    note: Callable[[list[dict]], str] | None = None


class Plain:
    """A request without any field, its greedy answer, and what tells another reply from it."""

    def __init__(self, model: PyFuncModel, question: str, system_message: str) -> None:
        self.messages = [{"role": "system", "content": system_message}, {"role": "user", "content": question}]
        reply = model.predict({"messages": self.messages})
        self.answer = text(reply)
        self.prompt_tokens = reply[0]["usage"]["prompt_tokens"]
        self.tokens = reply[0]["usage"]["completion_tokens"]
        self.limit = max(1, self.tokens // 2)
        # A word from the middle of the answer.
        words = [word for word in self.answer.split() if word.isalpha() and len(word) > 2]
        self.stop = words[len(words) // 2] if words else self.answer[len(self.answer) // 2 :] or "."
        self.shows = self.tokens > self.limit and self.stop in self.answer

    def ask(self, **fields: Any) -> dict:
        return {"messages": self.messages} | fields

    def same(self, reply: list[dict]) -> bool:
        return text(reply) == self.answer

    def differs(self, reply: list[dict]) -> bool:
        return not self.same(reply)

    def longer_prompt(self, reply: list[dict]) -> bool:
        return reply[0]["usage"]["prompt_tokens"] > self.prompt_tokens

    def note_prompt(self, reply: list[dict]) -> str:
        return f"prompt of {reply[0]['usage']['prompt_tokens']} tokens; {self.prompt_tokens} without"


def chat_contract(
    loaded: PyFuncModel, question: str = "What is the capital of Spain?", system_message: str = ""
) -> pd.DataFrame:
    """Send every field of the chat signature once, and report what became of it.

    Args:
        loaded: `mlflow.pyfunc.load_model` of a pipeline logged with task `llm/v1/chat`; it is asked with
            `do_sample` off.
        question: the user's turn of every request; a short answer makes a quick table.
        system_message: the system turn of every request.
    Returns:
        One row a field, in the signature's order: `field`; `sent`; `outcome`, one of "honoured" (the answer
        shows that the field did what it asks for), "ignored" (it does not), "request fails" (an exception)
        and "not shown" (the model's answer is too short to tell); `observed`; `instead`, what to do where it
        was not honoured.
    """
    import pandas as pd

    model = variant(loaded, do_sample=False)
    with quiet():
        cases = one_for_each_field(Plain(model, question, system_message))
        return pd.DataFrame([run(case, model) for case in cases])


def one_for_each_field(plain: Plain) -> list[Case]:
    """The requests, each with the evidence that would show its field at work."""
    ask, limit, stop = plain.ask, plain.limit, plain.stop
    brief = [{"role": "system", "content": "Be very brief and kind."}, plain.messages[1]]

    def stops_at_limit(reply: list[dict]) -> bool:
        return reply[0]["usage"]["completion_tokens"] == limit

    ends = ends_at(stop, plain.answer)
    anna = {"user": "anna"}
    prompt = {"note": plain.note_prompt}
    long_enough = {"shows": plain.shows}
    return [
        Case("messages", "system and user", ask(messages=brief, max_tokens=1), plain.longer_prompt, **prompt),
        Case("temperature", f"{HOT}", ask(temperature=HOT), plain.differs, LOG_SAMPLING),
        Case("max_tokens", f"{limit}", ask(max_tokens=limit), stops_at_limit, **long_enough),
        Case("stop", f"[{stop!r}]: answer ends there", ask(stop=[stop]), ends, **long_enough),
        Case("n", "1", ask(n=1), plain.same, OMIT),
        Case("stream", "False", ask(stream=False), plain.same, OMIT),
        Case("top_p", "0.9", ask(top_p=0.9, temperature=HOT), plain.differs, LOG_SAMPLING),
        Case("top_k", "50", ask(top_k=50, temperature=HOT), plain.differs, LOG_SAMPLING),
        Case("frequency_penalty", "0.0", ask(frequency_penalty=0.0), plain.same, LOG_PENALTY),
        Case("presence_penalty", "0.0", ask(presence_penalty=0.0), plain.same, LOG_PENALTY),
        Case(
            "tools", "one function", ask(tools=[WEATHER], max_tokens=1), plain.longer_prompt, TELL, **prompt
        ),
        Case("custom_inputs", f"{anna}", ask(custom_inputs=anna), plain.same, OMIT),
    ]


def run(case: Case, model: PyFuncModel) -> dict[str, str]:
    """Send one request; the outcome is read off its reply or its exception."""
    try:
        reply = model.predict(case.request)
    except Exception as error:
        outcome, observed = FAILS, _reason(error)
    else:
        outcome = HONOURED if case.works(reply) else IGNORED
        observed = (case.note or _summary)(reply)
        if not case.shows:
            outcome = NOT_SHOWN
    return {
        "field": case.field,
        "sent": case.sent,
        "outcome": outcome,
        "observed": observed,
        "instead": case.instead if outcome in (IGNORED, FAILS) else "",
    }


def variant(loaded: PyFuncModel, **model_config: Any) -> PyFuncModel:
    """The same weights behind another `model_config`, without reading them a second time."""
    from mlflow.pyfunc import PyFuncModel

    # MLflow 3.17 has no public way to share weights between two models.
    model = loaded._model_impl
    config = {**model.model_config, **model_config}
    return PyFuncModel(loaded.metadata, type(model)(model.pipeline, model.flavor_config, config))


def text(reply: list[dict]) -> str:
    return reply[0]["choices"][0]["message"]["content"]


def ends_at(stop: str, answer: str) -> Callable[[list[dict]], bool]:
    """Whether a reply is the answer up to the stop text, with or without it."""
    before = answer.partition(stop)[0]
    return lambda reply: text(reply).strip() in (before.strip(), (before + stop).strip())


def _summary(reply: list[dict]) -> str:
    rows = []
    for row in reply:
        answer = text([row])
        count = row["usage"]["completion_tokens"]
        shown = answer if len(answer) <= 48 else f"{answer[:47]}…"
        rows.append(f"{shown!r}, {count} token{'s' * (count != 1)}, {row['choices'][0]['finish_reason']}")
    return "; ".join(rows)


def _reason(error: Exception) -> str:
    """The first sentence of the innermost cause: MLflow wraps the one that names the field."""
    while error.__cause__:
        error = error.__cause__
    first_line = str(error).strip().partition("\n")[0]
    sentence = re.split(r"\. | \(note", first_line)[0]
    return f"{type(error).__name__}: {sentence}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings about fields that are dropped: the table says the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
