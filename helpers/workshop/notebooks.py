"""Run the notebooks headless: parameters checked first, executed copy and HTML page afterwards."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import logging
import os
import shutil
import tempfile
import textwrap
from pathlib import Path

from helpers import environment, parameters
from helpers.models import catalog, export, fetch

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = {
    "01": ROOT / "notebooks" / "01_TransformerPipeline.ipynb",
    "02": ROOT / "notebooks" / "02_CustomPythonWrapper.ipynb",
}
SOCKETS = "slm-kernel-"  # begins the name of a folder of a kernel's sockets; the process that made it follows


class NotebookError(RuntimeError):
    """A notebook that stopped; the text says where and why."""


def declared(notebook: Path) -> dict[str, dict]:
    """The parameters a notebook declares: name → papermill's description (default, type, help)."""
    import papermill

    return papermill.inspect_notebook(str(notebook))


def select(names: list[str], given: dict[str, str]) -> dict[Path, dict[str, object]]:
    """Pair each chosen notebook with its share of the given parameters, converted to the declared types.

    Args:
        names: "01", "02" or both; empty means both.
        given: parameter name → text from the command line.
    Raises:
        parameters.ParameterError: for a name that none of the notebooks has, or a value that cannot be used.
    """
    for name in names:
        if name not in NOTEBOOKS:
            raise parameters.ParameterError(f"There is no notebook {name!r}. Run {' or '.join(NOTEBOOKS)}.")
    chosen = {NOTEBOOKS[name]: declared(NOTEBOOKS[name]) for name in names or NOTEBOOKS}
    known = {name: about for declaration in chosen.values() for name, about in declaration.items()}
    for name in given:
        if name not in known:
            raise parameters.ParameterError(
                f"{name!r} is not a parameter of {' or '.join(path.name for path in chosen)}. "
                f"Theirs are: {', '.join(sorted(known))}."
            )
    values = {
        name: parameters.convert(name, text, known[name]["inferred_type_name"])
        for name, text in given.items()
    }
    model = parameters.check(**{"model": "smollm2-135m", "tracking_uri": "", **values})
    if isinstance(model.origin, catalog.Folder):  # the kernel starts in another folder than this process
        values["model"] = str(model.origin.path)
    return {
        path: {k: v for k, v in values.items() if k in declaration} for path, declaration in chosen.items()
    }


def run(chosen: dict[Path, dict[str, object]], output: Path) -> list[Path]:
    """Execute each notebook into `output`, with a progress bar, and render it as one HTML file.

    Returns:
        The HTML pages, in order.
    Raises:
        NotebookError: when the model's files cannot be had; when a cell fails, the executed copy up to that
            cell is kept for reading.
    """
    output.mkdir(parents=True, exist_ok=True)
    return [_produce(path, values, output) for path, values in chosen.items()]


def _produce(notebook: Path, values: dict[str, object], output: Path) -> Path:
    """Execute and render; a second run into the same folder waits, or the two would write over each other."""
    from filelock import FileLock, Timeout

    lock = FileLock(output / f".{notebook.stem}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting: another run writes {os.path.relpath(output / notebook.name)}.", flush=True)
        lock.acquire()
    try:
        return _to_html(_execute(notebook, values, output))
    finally:
        lock.release()


def _execute(notebook: Path, values: dict[str, object], output: Path) -> Path:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    executed = output / notebook.name
    for earlier in (executed, executed.with_suffix(".html")):  # must not pass for this run's
        earlier.unlink(missing_ok=True)
    files = {"input_path": str(notebook), "output_path": str(executed), "cwd": str(ROOT)}
    try:
        with _private_kernel() as config, _temporary_folder(executed):
            _fetch(notebook, values)
            papermill.execute_notebook(**files, parameters=values, kernel_name="python3", config=config)
    except PapermillExecutionError as error:
        raise NotebookError(
            f"{notebook.name} stopped in cell {error.exec_count}: {error.ename}: {error.evalue} "
            f"What it did until then: {os.path.relpath(executed)}"
        ) from None
    except DeadKernelError:
        raise NotebookError(
            f"{notebook.name} stopped: its kernel was killed, as the system does when memory runs out. "
            f"What it did until then: {os.path.relpath(executed)} Run it again: nothing has to be cleaned up."
        ) from None
    return executed


def _fetch(notebook: Path, values: dict[str, object]) -> None:
    """Get the model's files that a notebook begins with: a kernel has no terminal for the bar.

    With `offline` nothing is fetched, and every byte would be read once more than needed.
    """
    if notebook not in NOTEBOOKS.values():
        return
    defaults = {name: ast.literal_eval(about["default"]) for name, about in declared(notebook).items()}
    wanted = defaults | values
    if wanted["offline"]:
        return
    model = catalog.find(wanted["model"])
    try:
        if notebook == NOTEBOOKS["01"]:
            fetch.check_prompt(fetch.checkpoint(model), model, wanted["question"], wanted["max_new_tokens"])
        else:
            asked = {name: wanted[name] for name in ("prompt", "max_new_tokens")}
            export.onnx_folder(model, wanted["precision"], **asked)
    except fetch.ModelUnavailable as error:
        raise NotebookError(f"{notebook.name} was not started: {error}") from None


@contextlib.contextmanager
def _temporary_folder(executed: Path):
    """Temporary files of what is started go beside the executed notebook; what a killed run left goes first.

    MLflow writes a whole model there, and the system's own folder is in memory on many machines.
    """
    prefix = f".{executed.stem}.tmp-"
    for left in executed.parent.glob(f"{prefix}*"):  # no other run's: `_produce` lets in one at a time
        shutil.rmtree(left, ignore_errors=True)
    options = {"prefix": prefix, "dir": executed.parent.resolve(), "ignore_cleanup_errors": True}
    # Python looks at TMPDIR first, on every system.
    with tempfile.TemporaryDirectory(**options) as folder, environment.variables(TMPDIR=folder):
        yield


@contextlib.contextmanager
def _private_kernel():
    """Settings for a kernel that talks through sockets of this user, not over TCP (except on Windows).

    jupyter_client 8 would name the sockets relative to the working directory, and kernel and client differ
    in theirs. Their paths must be short, so they lie in the system's folder for temporary files.
    """
    import psutil
    from traitlets.config import Config

    with tempfile.TemporaryDirectory(prefix=f"{SOCKETS}{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        user = os.stat(folder).st_uid
        for left in Path(folder).parent.glob(f"{SOCKETS}*"):  # by a run that was killed
            owner = left.name.removeprefix(SOCKETS).partition("-")[0]
            if owner.isdigit() and not psutil.pid_exists(int(owner)) and left.lstat().st_uid == user:
                shutil.rmtree(left, ignore_errors=True)
        sockets = {"transport": "ipc", "ip": f"{folder}/socket", "connection_file": f"{folder}/kernel.json"}
        try:
            yield Config(KernelManager={} if os.name == "nt" else sockets)
        except KeyboardInterrupt:
            # nbclient (0.11) no longer awaits its task then, and asyncio would tell at length that it failed.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            raise


def _to_html(executed: Path) -> Path:
    from nbconvert import HTMLExporter

    page = executed.with_suffix(".html")
    body, _ = HTMLExporter().from_filename(str(executed))
    page.write_text(body, encoding="utf-8")
    return page


def save() -> None:
    """Execute both notebooks with their defaults in one empty MLflow store and write them back with outputs.

    An empty store makes the first registered version number 1, as a reader will see it. A notebook's metadata
    records what its outputs were made from.

    Raises:
        NotebookError: when a cell fails; that notebook on disk stays as it was.
    """
    import nbformat

    with tempfile.TemporaryDirectory() as store:
        for notebook in NOTEBOOKS.values():
            print(f"Executing {notebook.name} …", flush=True)
            places = {"MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db", "TMPDIR": store}
            book = _execute_in_place(notebook, places)
            book.metadata["made_from"] = fingerprint(book)
            nbformat.write(book, notebook)


def _execute_in_place(notebook: Path, environment: dict[str, str]):
    """Return the notebook with fresh outputs, run in its own folder as Jupyter would."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    book = nbformat.read(notebook, as_version=4)
    place = {"metadata": {"path": str(notebook.parent)}}
    settings = {"kernel_name": "python3", "timeout": None, "record_timing": False, "resources": place}
    try:
        with _private_kernel() as config:
            NotebookClient(book, **settings, config=config).execute(env=os.environ | environment)
    except CellExecutionError as error:
        raise NotebookError(f"{notebook.name} was not saved: {error.ename}: {error.evalue}") from None
    book.metadata.language_info.pop("version", None)  # the outputs do not depend on the patch release
    return book


def fingerprint(book) -> str:
    """sha256 of all that shapes a notebook's outputs: its cells, the code in `helpers`, the questions."""
    digest = hashlib.sha256()
    for cell in book.cells:
        digest.update(cell.source.encode())
    for path in [*sorted((ROOT / "helpers").rglob("*.py")), ROOT / "helpers" / "questions.json"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def source(thing: object):
    """Show the source of a class, function or method as a highlighted cell, read from its one file."""
    from IPython.display import Code

    return Code(textwrap.dedent(inspect.getsource(thing)), language="python")
