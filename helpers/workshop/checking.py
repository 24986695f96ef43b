"""What a check is: it runs a learner's result, prints one verdict with a hint, and never raises."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

SOLVED, NOT_YET, NOT_CHECKED = "✓", "✗", "–"  # told apart without colour


class Wrong(Exception):
    """A result that does not solve its exercise: what is wrong, and a hint (none: the exercise's own)."""

    def __init__(self, wrong: str, hint: str = ""):
        super().__init__(wrong)
        self.hint = hint


class NotChecked(Exception):
    """A result that cannot be judged here; the text says what it would need."""


def exercise(number: str, hint: str) -> Callable[[Callable[..., str]], Callable[[dict], None]]:
    """Make a check out of a judge: a function that returns what is right, or raises `Wrong` or `NotChecked`.

    Args:
        number: the exercise's, as in the notebook: "1.2".
        hint: shown while nothing is written yet, and when no closer hint is known.
    """

    def decorate(judge: Callable[..., str]) -> Callable[[dict], None]:
        @functools.wraps(judge)
        def check(names: dict) -> None:
            try:
                right = judge(**_arguments(judge, names))
                print(f"{SOLVED} Exercise {number} is solved: {right}")
            except NotChecked as reason:
                print(f"{NOT_CHECKED} Exercise {number} was not checked: {reason}")
            except Wrong as wrong:
                print(f"{NOT_YET} Exercise {number}, not yet: {wrong}\n  Hint: {wrong.hint or hint}")
            except Exception as error:
                print(f"{NOT_YET} Exercise {number}, not yet: the check stopped with {short(error)}")
                print(f"  Hint: {hint}")

        del check.__wrapped__  # its signature is the check's own
        return check

    return decorate


def _arguments(judge: Callable, names: dict) -> dict[str, Any]:
    """What the judge asks for, by name; the first is the learner's."""
    answer, *given = inspect.signature(judge).parameters
    for name in given:
        if name not in names:
            raise Wrong(f"`{name}` is not defined.", "Run the cells above this one first, from the top.")
    if answer not in names:
        raise Wrong(f"there is no `{answer}`.", f"The name `{answer}` is what the check looks for.")
    if names[answer] is None or names[answer] is ...:
        raise Wrong(f"`{answer}` is still empty.")
    return {name: names[name] for name in (answer, *given)}


def call(function: Callable, *arguments: object) -> Any:
    """The learner's function at work; what it raises, or not returning at all, is wrong."""
    if not callable(function):
        raise Wrong(f"a function was asked for, and this is {short(function)}.", "Start with `def`.")
    name = getattr(function, "__name__", "the function")
    plain = [short(argument) if isinstance(argument, str | int | float) else "…" for argument in arguments]
    shown = f"{name}({', '.join(plain)})"
    try:
        result = function(*arguments)
    except (Exception, SystemExit) as error:
        raise Wrong(f"`{shown}` raised {short(error)}") from error
    if result is None or result is ...:
        raise Wrong(f"`{shown}` returned nothing.")
    return result


def short(thing: object, length: int = 60) -> str:
    """One line that shows a value or an exception."""
    text = f"{type(thing).__name__}: {thing}" if isinstance(thing, BaseException) else repr(thing)
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def of_type(kind: type, value: object, what: str, hint: str) -> None:
    if not isinstance(value, kind):
        raise Wrong(f"{what} is {short(value)}, of type {type(value).__name__}, not {kind.__name__}.", hint)
