"""What a notebook may be given: one check, before any work, with one clear sentence when it fails."""

from __future__ import annotations

import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from helpers import ROOT
from helpers.errors import ParameterError
from helpers.models import catalog

VARIABLE = "MLFLOW_TRACKING_URI"  # names the store where no parameter does


def _whole(lowest: int, highest: int, example: str) -> object:
    description = f"a whole number from {lowest} to {highest:,}"
    return Annotated[int, Field(ge=lowest, le=highest, description=description, examples=[example])]


def _known_model(name: str) -> str:
    catalog.find(name)
    return name


Text = Annotated[
    str, Field(pattern=r"\S", description="a text with at least one character", examples=['"some text"'])
]
Switch = Annotated[bool, Field(description="True or False (written with a capital)", examples=["True"])]


class Parameters(BaseModel):
    """The cells of parameters of both notebooks. Strict: papermill's text 'false' is no switch.

    A field's description says what is allowed, and its example how to set it.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Annotated[Text, AfterValidator(_known_model)]
    question: Text = ""
    prompt: Text = ""
    precision: Annotated[
        Literal[catalog.PRECISIONS],
        Field(description=f"one of {', '.join(catalog.PRECISIONS)}", examples=["int4"]),
    ] = "int4"
    threads: _whole(0, 1024, "2") = 0
    max_new_tokens: _whole(1, 4096, "64") = 64
    questions: _whole(1, 100, "20") = 100
    tracking_uri: Annotated[
        str,
        AfterValidator(lambda uri: store(uri, "tracking_uri")),
        Field(description="a text (empty: the project's own mlflow.db)", examples=["http://127.0.0.1:5000"]),
    ] = ""
    experiment: Text = ""
    board: Switch = True
    offline: Switch = False
    seed: _whole(0, 2**31 - 1, "7") = 7
    serve: Switch = True
    spark: Annotated[
        bool | str,
        AfterValidator(lambda where: spark_master(where)),
        Field(description="True, False or the address of a master", examples=["spark://127.0.0.1:7077"]),
    ] = False


def check(**given: object) -> catalog.Model:
    """Check a notebook's parameters by name and return the catalogue entry of `model`.

    Raises:
        ParameterError: for the first that cannot be used: its value, what is allowed, how to set it.
        TypeError: for a name that `Parameters` lacks (a mistake in the notebook).
    """
    return catalog.find(_checked(Parameters.model_validate, given).model)


def from_texts(given: dict[str, str]) -> dict[str, object]:
    """Turn a command line's parameters into what their fields declare. Raises what `check` raises."""
    checked = _checked(Parameters.model_validate_strings, given)
    values = {name: getattr(checked, name) for name in given}
    for name, value in values.items():
        # pydantic would take 1, on and yes as well.
        if isinstance(value, bool) and given[name].lower() not in ("true", "false"):
            raise _refused(name, repr(given[name]))
    # A text stays as it was written. The check gives a store's address another form, perhaps with a password.
    return {name: given[name] if isinstance(value, str) else value for name, value in values.items()}


def _checked(validate: Callable[[dict], Parameters], given: dict) -> Parameters:
    if unknown := given.keys() - Parameters.model_fields.keys():
        raise TypeError(f"helpers.parameters.Parameters has no field {', '.join(unknown)}.")
    try:
        return validate(given)
    except ValidationError as error:
        first = error.errors()[0]
    name, value = first["loc"][0], first["input"]
    if said := first.get("ctx", {}).get("error"):  # one of our own sentences
        raise ParameterError(str(said))
    field = Parameters.model_fields[name]
    if field.annotation is str and name != "tracking_uri" and isinstance(value, (bool, int, float)):
        raise ParameterError(
            f"{name}={value!r} is not a text. papermill's -p reads numbers, True and False as what they look "
            f"like; -r leaves them a text: -r {name} {value} In the notebook's cell, put it in quotes."
        )
    # A number out of its range is shown as one, also where it came as text.
    raise _refused(name, value if "than" in first["type"] else repr(value))


def _refused(name: str, shown: object) -> ParameterError:
    field = Parameters.model_fields[name]
    setting = _setting(name, field.examples[0])
    return ParameterError(f"{name}={shown} is not {field.description}. Set it with {setting}")


def _setting(name: str, value: str) -> str:
    """How to give a value to a notebook's parameter, to a command's option, or to the variable."""
    if name == VARIABLE:
        return f"export {name}={value}"
    return f"{name} {value}" if name.startswith("--") else f"-p {name} {value}"


# Where Spark runs

MASTERS = re.compile(
    r"local(\[(\*|[1-9]\d*)\])?|yarn|k8s://https?://\S+|spark://([\w.-]+:\d+)(,[\w.-]+:\d+)*"
)


def spark_master(where: bool | str) -> bool | str:
    """Check where Spark is to run, and return it: False, True for this machine, or a master's address.

    Raises:
        ParameterError: if the address is none that Spark knows, or no standalone master answers there.
    """
    if isinstance(where, bool):
        return where
    if not MASTERS.fullmatch(where):
        raise ParameterError(
            f"spark={where!r} is not True, False or the address of a master: spark://host:port, yarn, "
            f"k8s://https://host:port or local[2]. Set it with {_setting('spark', 'spark://127.0.0.1:7077')}"
        )
    if where.startswith("spark://") and (reason := _unreachable(where.removeprefix("spark://").split(","))):
        raise ParameterError(
            f"spark={where!r} does not answer ({reason}). Start Spark's master there, or use this machine: "
            f"{_setting('spark', 'True')}"
        )
    return where


def _unreachable(masters: list[str]) -> str:
    """Why none of these `host:port` can be reached; empty if one can. Spark itself tries for a minute."""
    reason = ""
    for master in masters:
        host, _, port = master.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            reason = str(error)
        else:
            return ""
    return reason


# The store: MLflow's tracking URI


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
    """Check which store is meant, and return its URI, resolved; "" for the project's own.

    Args:
        uri: as it was given; if it is empty, MLFLOW_TRACKING_URI counts.
        name: what the message calls it; a command's option begins with `--`.
    Raises:
        ParameterError: if it is none of a reachable server, a database that opens, or a file in a folder.
    """
    shown = without_password(uri)
    if shown != uri and not name.startswith("--"):
        raise ParameterError(
            f"{name}={shown!r} holds a password, and parameters are saved in the notebook. "
            f"Set the environment variable {VARIABLE} to it instead, and leave {name} empty."
        )
    if not uri:
        name, uri = VARIABLE, os.environ.get(VARIABLE, "")
    wanted = resolved(uri)
    shown = without_password(uri)
    leave = f"unset {name}" if name == VARIABLE else f"leave {name} empty"
    own = f"or {leave} to use the project's own mlflow.db."
    if wanted.startswith(("http://", "https://")):
        wrong = _silent(wanted)
        fix = f"Start it with `mlflow server`, {own}"
    elif wanted.startswith("postgresql+psycopg2://"):
        wrong = _closed(wanted)
        fix = f"Start PostgreSQL and make the database, {own}"
    elif file := sqlite_file(uri):
        shown = wanted
        wrong = _misplaced(file)
        example = _setting(name, "sqlite:////absolute/path/mlflow.db")
        fix = f"Make that folder, or name another file: {example}"
    else:
        wrong = (
            "is not empty, a server (http://…) or a database (sqlite:///…, postgresql://…)" if wanted else ""
        )
        fix = f"Set it with {_setting(name, 'http://127.0.0.1:5000')}"
    if wrong:
        raise ParameterError(f"{name}={shown!r} {wrong}. {fix}")
    return wanted


def _misplaced(file: Path) -> str:
    """Say so if a database file cannot be in this place."""
    if file.is_dir():
        return "is a folder, not a file"
    return "" if file.parent.is_dir() else "lies in a folder that does not exist"


def _silent(url: str) -> str:
    """Say so if a server does not answer; any HTTP answer will do, also one that asks for a password."""
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5).close()
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        return f"does not answer ({getattr(error, 'reason', error)})"
    return ""


def _closed(url: str) -> str:
    """Say so if a database does not open. MLflow itself would try for minutes and show all its frames."""
    import sqlalchemy

    try:
        # Seconds for each address of the host; `localhost` has two.
        engine = sqlalchemy.create_engine(url, connect_args={"connect_timeout": 4})
        engine.connect().close()
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ValueError) as error:
        return f"cannot be opened ({str(getattr(error, 'orig', error)).strip().splitlines()[0]})"
    return ""
