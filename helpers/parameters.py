"""What a notebook may be asked for: one check, before any work, with one clear sentence when it fails."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from helpers import ROOT
from helpers.errors import ParameterError
from helpers.models import catalog

VARIABLE = "MLFLOW_TRACKING_URI"  # names the store where no parameter does


def check(**parameters: object) -> catalog.Model:
    """Check a notebook's parameters by name and return the catalogue entry of `model`.

    Args:
        parameters: any of the names in a `parameters` cell, with the values papermill or the reader gave.
    Raises:
        ParameterError: for the first that cannot be used: its value, what is allowed, how to set it.
        TypeError: for a name that has no check (a mistake in the notebook, not in its parameters).
    """
    for name, value in parameters.items():
        if name not in _CHECKS:
            raise TypeError(f"helpers.parameters has no check for {name!r}")
        _CHECKS[name](name, value)
    return catalog.find(parameters["model"])


def convert(name: str, text: str, type_name: str) -> object:
    """Turn a command-line value into the type that the notebook's parameters cell declares.

    Raises:
        ParameterError: if the text is not a value of that type.
    """
    if type_name == "bool":
        if text.lower() not in ("true", "false"):
            raise _error(name, text, "true or false", "True")
        return text.lower() == "true"
    if type_name not in ("int", "float"):
        return text
    try:
        return int(text) if type_name == "int" else float(text)
    except ValueError:
        kind, example = ("a whole number", "64") if type_name == "int" else ("a number", "0.5")
        raise _error(name, text, kind, example) from None


def without_password(uri: str) -> str:
    """The URI as it may be shown: user:***@host."""
    return re.sub(r"(?<=://)([^/@]*?:)[^/]*(?=@)", r"\1***", uri)


def resolved(uri: str) -> str:
    """The tracking URI as MLflow takes it in any folder: a relative database file lies in the project's.

    PostgreSQL gets the driver that is locked; left alone, SQLAlchemy 2.1 takes psycopg 3.
    """
    if file := sqlite_file(uri):
        return sqlite_uri(file)
    return re.sub("^postgresql:", "postgresql+psycopg2:", uri)


def sqlite_uri(file: Path) -> str:
    """The tracking URI of a database file: SQLAlchemy 2.1 decodes `%XX` in it and ends it at a `?`."""
    return f"sqlite:///{str(file).replace('%', '%25').replace('?', '%3F')}"


def sqlite_file(uri: str) -> Path | None:
    """The database file that a tracking URI names; None for a URI of another kind.

    A path that was pasted as it is, as in `sqlite:///$PWD/mlflow.db`, is taken too, if its folder exists and
    can be meant.
    """
    if not uri.startswith("sqlite:///"):
        return None
    text = uri.removeprefix("sqlite:///")
    pasted, file = ROOT / text, ROOT / unquote(text.partition("?")[0])
    is_path = "?" in str(pasted.parent) or not file.parent.is_dir()
    return pasted if is_path and pasted.parent.is_dir() else file


def store(uri: str, name: str = "tracking_uri") -> str:
    """Check which store a command gets, and return its URI, resolved; "" for the project's own.

    Args:
        uri: as it was given; if it is empty, MLFLOW_TRACKING_URI counts.
        name: what the message calls it; a command's option begins with `--`.
    Raises:
        ParameterError: if it cannot be used.
    """
    _tracking_uri(name, uri)
    return resolved(uri or os.environ.get(VARIABLE, ""))


def _error(name: str, value: object, allowed: str, example: str) -> ParameterError:
    return ParameterError(f"{name}={value!r} is not {allowed}. Set it with {_setting(name, example)}")


def _setting(name: str, value: str) -> str:
    """How to give a value to a notebook's parameter, to a command's option, or to the variable."""
    if name == VARIABLE:
        return f"export {name}={value}"
    return f"{name} {value}" if name.startswith("--") else f"-p {name} {value}"


def _without(name: str) -> str:
    return f"unset {name}" if name == VARIABLE else f"leave {name} empty"


def _text(name: str, value: object) -> None:
    if isinstance(value, (bool, int, float)):
        raise ParameterError(
            f"{name}={value!r} is not a text. papermill's -p reads numbers, True and False as what they look "
            f"like; -r leaves them a text: -r {name} {value} In the notebook's cell, put it in quotes."
        )
    if not isinstance(value, str) or not value.strip():
        raise _error(name, value, "a text with at least one character", '"some text"')


def _switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _error(name, value, "True or False (written with a capital)", "True")


def _whole(lowest: int, highest: int, example: str):
    def _check(name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise _error(name, value, f"a whole number from {lowest} to {highest:,}", example)

    return _check


def _model(name: str, value: object) -> None:
    _text(name, value)
    _in_catalogue(catalog.find, value)


def _precision(name: str, value: object) -> None:
    _in_catalogue(catalog.check_precision, value)


def _in_catalogue(check: Callable[[object], object], value: object) -> None:
    try:
        check(value)
    except ValueError as error:
        raise ParameterError(str(error)) from None


def _tracking_uri(name: str, value: object) -> None:
    """Accept the empty text (the project's own store), a reachable server, or a database URI."""
    if not isinstance(value, str):
        raise _error(name, value, "a text (empty: the project's own mlflow.db)", "http://127.0.0.1:5000")
    if without_password(value) != value and not name.startswith("--"):
        raise ParameterError(
            f"{name}={without_password(value)!r} holds a password, and parameters are saved in the notebook. "
            f"Set the environment variable {VARIABLE} to it instead, and leave {name} empty."
        )
    if not value:
        name, value = VARIABLE, os.environ.get(VARIABLE, "")
    uri = resolved(value)
    if uri.startswith(("http://", "https://")):
        _reachable(name, uri)
    elif file := sqlite_file(value):
        if file.is_dir() or not file.parent.is_dir():
            wrong = "is a folder, not a file" if file.is_dir() else "lies in a folder that does not exist"
            raise ParameterError(
                f"{name}={uri!r} {wrong}. Make that folder, or name another file: "
                f"{_setting(name, 'sqlite:////absolute/path/mlflow.db')}"
            )
    elif uri.startswith("postgresql+psycopg2://"):
        _opens(name, value)
    elif uri:
        raise _error(
            name,
            without_password(uri),
            "empty, a server (http://…) or a database (sqlite:///…, postgresql://…)",
            "http://127.0.0.1:5000",
        )


def _reachable(name: str, uri: str, timeout: float = 5.0) -> None:
    """Ask the server's health page; any HTTP answer proves a server, so a log-in page is no error here."""
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ParameterError(
            f"{name}={without_password(uri)!r} does not answer ({reason}). Start it with `mlflow server`, "
            f"or {_without(name)} to use the project's own mlflow.db."
        ) from None


def _opens(name: str, uri: str, timeout: int = 4) -> None:
    """Open the database as MLflow would, which tries for minutes and then shows all its frames.

    Args:
        timeout: seconds for each address of the host; `localhost` has two.
    """
    try:
        import sqlalchemy
    except ImportError:  # the doctor, before set-up
        return
    try:
        engine = sqlalchemy.create_engine(resolved(uri), connect_args={"connect_timeout": timeout})
        engine.connect().close()
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ValueError) as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise ParameterError(
            f"{name}={without_password(uri)!r} cannot be opened ({reason}). Start PostgreSQL and make the "
            f"database, or {_without(name)} to use the project's own mlflow.db."
        ) from None


_CHECKS = {
    "model": _model,
    "precision": _precision,
    "question": _text,
    "prompt": _text,
    "experiment": _text,
    "max_new_tokens": _whole(1, 4096, "64"),
    "threads": _whole(0, 1024, "2"),
    "seed": _whole(0, 2**31 - 1, "7"),
    "offline": _switch,
    "serve": _switch,
    "spark": _switch,
    "tracking_uri": _tracking_uri,
}
