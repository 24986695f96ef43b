"""What a check is: it tries a learner's result, prints one verdict with a hint, and never raises."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from helpers.workshop import board


class NotYet(Exception):
    """What is wrong with a result, and a hint; without one, the exercise's own is shown."""

    def __init__(self, wrong: str, hint: str = ""):
        super().__init__(wrong)
        self.hint = hint


class Empty(NotYet):
    """Nothing is written yet. It is shown as any other, and the board does not count it as an attempt."""


class NotChecked(Exception):
    """A result that cannot be checked here; the text says what that would need."""


def exercise(number: str, hint: str) -> Callable[[Callable[..., str]], Callable[[dict], None]]:
    """Make a check out of a function that returns what is right, or raises `NotYet` or `NotChecked`.

    The function's arguments name what it needs from the notebook, the learner's result first.

    Args:
        number: the exercise's, as in the notebook: "1.2".
        hint: shown while nothing is written yet, and when no closer hint is known.
    """

    def decorate(judge: Callable[..., str]) -> Callable[[dict], None]:
        @functools.wraps(judge)
        def check(names: dict) -> None:
            advice = ""
            try:
                print(f"✓ Exercise {number} is solved: {judge(**_arguments(judge, names))}")
            except NotChecked as reason:
                print(f"– Exercise {number} was not checked: {reason}")
                return
            except NotYet as wrong:
                advice = wrong.hint or hint
                print(f"✗ Exercise {number}, not yet: {wrong}\n  Hint: {advice}")
                if isinstance(wrong, Empty):
                    return
            except Exception as error:
                advice = hint
                print(f"✗ Exercise {number}, not yet: the check stopped with {short(error)}\n  Hint: {hint}")
            if names.get("board", True):
                board.report(number, solved=not advice, hint=advice)

        # Jupyter's help shall show the arguments of the check.
        del check.__wrapped__
        return check

    return decorate


def _arguments(judge: Callable, names: dict) -> dict[str, Any]:
    """What a judge asks for, by name."""
    answer, *given = inspect.signature(judge).parameters
    for name in given:
        if name not in names:
            raise NotYet(f"`{name}` is not defined.", "Run the cells above this one first, from the top.")
    if answer not in names:
        raise NotYet(f"there is no `{answer}`.", f"The name `{answer}` is what the check looks for.")
    if names[answer] is None or names[answer] is ...:
        raise Empty(f"`{answer}` is still empty.")
    return {name: names[name] for name in (answer, *given)}


def call(function: Callable, *arguments: object) -> Any:
    """What a learner's function returns; it is `NotYet` right if it raises or returns nothing."""
    if not callable(function):
        raise NotYet(f"a function was asked for, and this is {short(function)}.", "Start with `def`.")
    name = getattr(function, "__name__", "the function")
    try:
        result = function(*arguments)
    except (Exception, SystemExit) as error:
        raise NotYet(f"`{name}` raised {short(error)}") from error
    if result is None or result is ...:
        raise Empty(f"`{name}` returned nothing.")
    return result


def of_type(kind: type, value: object, what: str, hint: str) -> None:
    """Raise NotYet for a value of another type."""
    if not isinstance(value, kind):
        raise NotYet(f"{what} is {short(value)}, of type {type(value).__name__}, not {kind.__name__}.", hint)


def short(thing: object, length: int = 60) -> str:
    """A value or an exception in one line."""
    text = f"{type(thing).__name__}: {thing}" if isinstance(thing, BaseException) else repr(thing)
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"
