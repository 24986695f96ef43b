"""Errors that a reader meets: one sentence with the value, what is allowed, and the next step."""

from __future__ import annotations

import re


class ReaderError(Exception):
    """An error whose text says all. A notebook shows it in place of a traceback."""

    def _render_traceback_(self) -> list[str]:
        # IPython calls this in place of formatting forty frames.
        return [f"{type(self).__name__}: {self}"]


class ParameterError(ReaderError, ValueError):
    """A parameter or an option that cannot be used."""


class ModelUnavailable(ReaderError, RuntimeError):
    """A model's files cannot be had; the text says which, why, and what to do."""


class ChildFailed(ModelUnavailable):
    """A child process failed. `reason` is its exception in one line, or what is known instead."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what} failed: {reason}")
        self.reason = reason

    @property
    def out_of_space(self) -> bool:
        """Whether memory or disk ran out, so that it may work elsewhere, or another time."""
        return bool(re.search(r"memory|No space left|Disk quota", self.reason, re.IGNORECASE))


class StoreFault(ReaderError, RuntimeError):
    """The MLflow store could not be read or written; the text says why, what is kept, and what to do."""
