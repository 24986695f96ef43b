"""What a chat model logged with `mlflow.transformers` does with each field its signature lists.

The signature of `llm/v1/chat` follows OpenAI's chat completions, but MLflow hands most fields to the
Transformers pipeline as they are. Nothing in the table is written down beforehand: every outcome comes
from a request and its answer, so a new release of MLflow or Transformers changes the table by itself.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.pyfunc import PyFuncModel

HONOURED, IGNORED, FAILS, NOT_SHOWN = "honoured", "ignored", "request fails", "not shown"

_HOT = 50.0  # so high a temperature that a sampled answer cannot be the greedy one by luck
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_LOG_SAMPLING = "log or load the model with model_config={'do_sample': True}"
_LOG_PENALTY = "leave it out; log or load the model with model_config={'repetition_penalty': 1.2}"
_WRAPPER = "leave it out; a custom model (notebook 02) can have it"


@dataclass(frozen=True)
class _Case:
    """One request and how to tell from its reply that the field did what it asks for."""

    field: str
    sent: str
    request: Any
    works: Callable[[list[dict]], bool]
    instead: str = ""
    model: str = "greedy"
    shows: bool = True  # False: the model's answer is too short for the field to show in it
    note: Callable[[list[dict]], str] = field(default=lambda reply: _summary(reply))


def chat_contract(
    loaded: PyFuncModel, question: str = "What is the capital of Spain?", system_message: str = ""
) -> pd.DataFrame:
    """Send every field of the chat signature once and tell what became of it.

    Args:
        loaded: `mlflow.pyfunc.load_model` of a pipeline logged with task `llm/v1/chat`. Fields that only
            matter to sampling are tried twice: with `do_sample` off and on, over the same weights.
        question: the user's turn of every request; a short answer makes a quick table.
        system_message: the system turn of every request.
    Returns:
        One row a request, in the signature's order: `field`; `sent`; `outcome`, one of "honoured" (the
        answer shows that the field did what it asks for), "ignored" (it does not), "request fails" (an
        exception) and "not shown" (the model's answer is too short to tell); `observed`; `instead`, what to
        do where it was not honoured.
    """
    import pandas as pd

    models = {
        "greedy": _variant(loaded, do_sample=False),
        "sampling": _variant(loaded, do_sample=True),
        "moved": _variant(loaded, source_model_name="/another/machine/checkpoint"),
    }
    with _quiet():
        cases = _cases(models["greedy"], question, system_message)
        return pd.DataFrame([_run(case, models[case.model]) for case in cases])


def _run(case: _Case, model: PyFuncModel) -> dict[str, str]:
    """Send one request; the outcome is read off its reply or its exception."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        try:
            reply = model.predict(case.request)
        except Exception as error:
            outcome, observed = FAILS, _reason(error)
        else:
            outcome = HONOURED if case.works(reply) else IGNORED
            observed = case.note(reply)
    if outcome != FAILS and not case.shows:
        outcome = NOT_SHOWN
    instead = case.instead if outcome in (IGNORED, FAILS) else ""
    return {
        "field": case.field,
        "sent": case.sent,
        "outcome": outcome,
        "observed": observed,
        "instead": instead,
    }


def _cases(model: PyFuncModel, question: str, system_message: str) -> list[_Case]:
    """The requests, each with the evidence that would show its field at work."""
    import pandas as pd

    messages = [{"role": "system", "content": system_message}, {"role": "user", "content": question}]
    turns = [*messages, {"role": "assistant", "content": "Madrid."}, {"role": "user", "content": "Sure?"}]
    terse = [{"role": "system", "content": "Be very brief and kind."}, messages[1]]

    plain = model.predict({"messages": messages})
    answer, usage = _text(plain), plain[0]["usage"]
    limit = max(1, usage["completion_tokens"] // 2)
    stop, inside = _stop_texts(answer)
    long_enough = usage["completion_tokens"] > limit and stop in answer

    def longer_prompt(reply: list[dict]) -> bool:
        return reply[0]["usage"]["prompt_tokens"] > usage["prompt_tokens"]

    def tokens(*counts: int) -> Callable[[list[dict]], bool]:
        return lambda reply: [row["usage"]["completion_tokens"] for row in reply] == list(counts)

    def same(reply: list[dict]) -> bool:
        return _text(reply) == answer

    def differs(reply: list[dict]) -> bool:
        return _text(reply) != answer

    def ask(**fields: Any) -> dict:
        return {"messages": messages, **fields}

    def short(turns: list[dict], **fields: Any) -> dict:
        return {"messages": turns, "max_tokens": 1, **fields}

    def sampled(**fields: Any) -> dict:
        return ask(max_tokens=limit, **fields)

    def greedy_start(reply: list[dict]) -> bool:
        return answer.startswith(_text(reply))

    def prompt_tokens(reply: list[dict]) -> str:
        return f"prompt of {reply[0]['usage']['prompt_tokens']} tokens; {usage['prompt_tokens']} without"

    rows = pd.DataFrame({"messages": [messages, messages]})
    limits = rows.assign(max_tokens=[1, limit + 1])
    no_content = [messages[0], {"role": "user"}]
    return [
        _Case("messages", "system and user", short(terse), longer_prompt, note=prompt_tokens),
        _Case("messages", "several turns", short(turns), longer_prompt, note=prompt_tokens),
        _Case("messages", "a turn without content", {"messages": no_content}, same, "always send a content"),
        _Case("messages", "empty list", {"messages": []}, same, "send at least one turn"),
        _Case("messages", "two rows", rows, tokens(*[usage["completion_tokens"]] * 2)),
        _Case("temperature", "0.0", ask(temperature=0.0), same),
        _Case("temperature", f"{_HOT}", ask(temperature=_HOT), differs, _LOG_SAMPLING),
        _Case(
            "temperature",
            "0.0, sampling on",
            sampled(temperature=0.0),
            greedy_start,
            "send top_k=1, or log a greedy model",
            "sampling",
        ),
        _Case(
            "temperature",
            f"{_HOT}, sampling on",
            sampled(temperature=_HOT),
            lambda reply: not greedy_start(reply),
            model="sampling",
        ),
        _Case("max_tokens", f"{limit}", ask(max_tokens=limit), tokens(limit), shows=long_enough),
        _Case("max_tokens", "0", ask(max_tokens=0), tokens(0), "send 1 or more", shows=long_enough),
        _Case(
            "max_tokens",
            f"1 and {limit + 1} in two rows",
            limits,
            tokens(1, limit + 1),
            "one request per row: the first row's fields rule all",
            shows=long_enough,
        ),
        _Case(
            "stop",
            f"[{stop!r}]: answer ends there",
            ask(stop=[stop]),
            _ends_at(stop, answer),
            shows=long_enough,
        ),
        _Case(
            "stop",
            f"[{stop!r}]: stop text left out",
            ask(stop=[stop]),
            lambda reply: stop not in _text(reply),
            "cut the answer at the stop text",
            shows=long_enough,
        ),
        _Case(
            "stop",
            f"[{inside!r}]: inside a token",
            ask(stop=[inside]),
            _ends_at(inside, answer),
            "cut the answer at the stop text; tokens are compared, not text",
            shows=long_enough,
        ),
        _Case(
            "stop",
            f"[{stop!r}]: model moved",
            ask(stop=[stop]),
            _ends_at(stop, answer),
            "leave it out where the folder the model was logged from is gone",
            "moved",
            shows=long_enough,
        ),
        _Case("n", "1", ask(n=1), same, "leave it out"),
        _Case("n", "2", ask(n=2), lambda reply: len(reply[0]["choices"]) == 2, "send the question in n rows"),
        _Case("stream", "False", ask(stream=False), same, "leave it out"),
        _Case("stream", "True", ask(stream=True), lambda reply: "chunk" in str(reply[0]["object"]), _WRAPPER),
        _Case("top_p", "0.9", ask(top_p=0.9, temperature=_HOT), differs, _LOG_SAMPLING),
        _Case(
            "top_p",
            "0.000001, sampling on",
            sampled(top_p=1e-6, temperature=1.0),
            greedy_start,
            model="sampling",
        ),
        _Case("top_k", "50", ask(top_k=50, temperature=_HOT), differs, _LOG_SAMPLING),
        _Case("top_k", "1, sampling on", sampled(top_k=1, temperature=_HOT), greedy_start, model="sampling"),
        _Case("frequency_penalty", "0.0", ask(frequency_penalty=0.0), same, "leave it out"),
        _Case(
            "frequency_penalty",
            "2.0",
            ask(frequency_penalty=2.0),
            differs,
            _LOG_PENALTY,
            shows=long_enough,
        ),
        _Case("presence_penalty", "0.0", ask(presence_penalty=0.0), same, "leave it out"),
        _Case(
            "presence_penalty",
            "2.0",
            ask(presence_penalty=2.0),
            differs,
            _LOG_PENALTY,
            shows=long_enough,
        ),
        _Case(
            "tools",
            "one function",
            short(messages, tools=[_TOOL]),
            longer_prompt,
            "describe the tool in the system message",
            note=prompt_tokens,
        ),
        _Case("custom_inputs", "{'user': 'anna'}", ask(custom_inputs={"user": "anna"}), same, "leave it out"),
        _Case(
            "unknown key",
            "do_sample=True, temperature=50.0",
            ask(do_sample=True, temperature=_HOT),
            differs,
            "read the signature: MLflow drops other names with a warning",
        ),
    ]


def _variant(
    loaded: PyFuncModel, *, source_model_name: str | None = None, **model_config: Any
) -> PyFuncModel:
    """The same weights behind another `model_config` or origin, without reading them a second time."""
    from mlflow.pyfunc import PyFuncModel

    implementation = loaded._model_impl  # mlflow 3.17 has no public way to share weights between two models
    flavor = dict(implementation.flavor_config)
    if source_model_name:
        flavor["source_model_name"] = source_model_name
    config = {**implementation.model_config, **model_config}
    wrapper = type(implementation)(implementation.pipeline, flavor, config)
    return PyFuncModel(loaded.metadata, wrapper)


def _stop_texts(answer: str) -> tuple[str, str]:
    """A word from the middle of the answer, and a piece from inside that word."""
    words = [word for word in answer.split() if word.isalpha() and len(word) > 2]
    word = words[len(words) // 2] if words else answer[len(answer) // 2 :] or "."
    return word, word[1:-1] or word


def _ends_at(stop: str, answer: str) -> Callable[[list[dict]], bool]:
    """Whether a reply is the answer up to the stop text, with or without it."""
    before = answer.partition(stop)[0]
    return lambda reply: _text(reply).strip() in (before.strip(), (before + stop).strip())


def _text(reply: list[dict]) -> str:
    return reply[0]["choices"][0]["message"]["content"]


def _summary(reply: list[dict]) -> str:
    rows = []
    for row in reply:
        text, count = row["choices"][0]["message"]["content"], row["usage"]["completion_tokens"]
        shown = text if len(text) <= 48 else f"{text[:47]}…"
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
def _quiet() -> Iterator[None]:
    """Silence warnings about fields that are dropped: the table says the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
