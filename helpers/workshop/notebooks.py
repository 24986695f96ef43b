"""Run the notebooks headless: parameters checked first, executed copy and HTML page afterwards."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import logging
import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

from traitlets.config import Config

from helpers import ROOT, errors, parameters, places, processes
from helpers.models import catalog, export, fetch
from helpers.workshop import written

NOTEBOOKS = {
    "01": ROOT / "notebooks" / "01_TransformerPipeline.ipynb",
    "02": ROOT / "notebooks" / "02_CustomPythonWrapper.ipynb",
}

# Without it ipykernel (7) warns in the terminal that its messages are not encrypted.
ENCRYPTED = Config(KernelManager={"transport_encryption": "auto"})
TEMPLATE = Path(__file__).with_name("page.html.j2")


class NotebookError(RuntimeError):
    """A notebook that stopped; the text says where and why."""


def declared(notebook: Path) -> dict[str, dict]:
    """The parameters a notebook declares: name → papermill's description (default, type, help)."""
    import papermill

    return papermill.inspect_notebook(str(notebook))


def select(names: list[str], given: dict[str, str]) -> dict[Path, dict[str, object]]:
    """Pair each chosen notebook with its share of the given parameters.

    Args:
        names: "01", "02" or both; empty means both.
        given: parameter name → text from the command line.
    Raises:
        errors.ParameterError: for a name that none of the notebooks has, or a value that cannot be used.
    """
    for name in names:
        if name not in NOTEBOOKS:
            raise errors.ParameterError(f"There is no notebook {name!r}. Run {' or '.join(NOTEBOOKS)}.")
    chosen = {NOTEBOOKS[name]: declared(NOTEBOOKS[name]) for name in names or NOTEBOOKS}
    known = {name for declaration in chosen.values() for name in declaration}
    for name, text in given.items():
        if text != text.encode(errors="replace").decode():
            raise errors.ParameterError(f"{name}={text!r} is not UTF-8 text. Set it in a UTF-8 terminal.")
        if name not in known:
            books = " or ".join(path.name for path in chosen)
            raise errors.ParameterError(
                f"{name!r} is not a parameter of {books}. Theirs are: {', '.join(sorted(known))}."
            )
    checked = parameters.from_texts({"model": "smollm2-135m", "tracking_uri": "", **given})
    values = {name: checked[name] for name in given}
    # The kernel starts in another folder than this process.
    origin = catalog.find(checked["model"]).origin
    if isinstance(origin, catalog.Folder):
        values["model"] = str(origin.path)
    return {
        path: {name: values[name] for name in values if name in declaration}
        for path, declaration in chosen.items()
    }


def run(chosen: dict[Path, dict[str, object]], output: Path) -> list[Path]:
    """Execute each notebook into `output`, with a progress bar, and render it as one HTML file.

    Returns:
        The HTML pages, in order.
    Raises:
        ValueError: if `output` holds another file by the name of one of them; nothing is touched then.
        NotebookError: when the model's files cannot be had; when a cell fails, the executed copy up to that
            cell is kept for reading.
    """
    files = [output / f"{path.stem}{suffix}" for path in chosen for suffix in (".ipynb", ".html")]
    written.prepare([output], files, "run")
    return [_produce(path, values, output) for path, values in chosen.items()]


def _produce(notebook: Path, values: dict[str, object], output: Path) -> Path:
    """Execute and render; a second run into the same folder waits, or the two would write over each other."""
    from filelock import FileLock, Timeout

    executed, html = output / notebook.name, output / f"{notebook.stem}.html"
    lock = FileLock(output / f".{notebook.stem}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting: another run writes {places.relative(executed)}.", flush=True)
        held = lock.acquire()
    with held, _temporary_folder(output.resolve() / f".{notebook.stem}.tmp") as folder:
        # Minutes may have passed since the first look.
        written.prepare([output], [executed, html], "run")
        for earlier in (executed, html):
            earlier.unlink(missing_ok=True)
        _fetch(notebook, values)
        _execute(notebook, values, executed, folder / notebook.name)
        draft = folder / html.name
        draft.write_text(written.stamped(_html(executed), "run"), encoding="utf-8")
        draft.replace(html)
    return html


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Make a folder for all temporary files of this process and its kernel, which goes with the block.

    MLflow writes a whole model there, and the system's own folder is in memory on many machines.
    """
    # A run that was killed may have left its own.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with processes.variables(TMPDIR=str(folder)):
        # Python looks at TMPDIR once and remembers what it found. Set to None, it looks again.
        tempfile.tempdir = None
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            tempfile.tempdir = None


def _execute(notebook: Path, values: dict[str, object], executed: Path, draft: Path) -> None:
    """Execute a notebook as `draft`, which then becomes `executed`, also when a cell failed."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    until_then = f"What it did until then: {places.relative(executed)}"
    given = {"kernel_name": "python3", "cwd": str(ROOT), "config": ENCRYPTED}
    try:
        papermill.execute_notebook(notebook, draft, values, **given)
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
        raise NotebookError(
            f"{notebook.name} stopped in cell {error.exec_count}: {reason} {until_then}"
        ) from None
    except DeadKernelError:
        raise NotebookError(
            f"{notebook.name} stopped: its kernel was killed, as the system does when memory runs out. "
            f"{until_then} Run it again: nothing has to be cleaned up."
        ) from None
    except KeyboardInterrupt:
        # nbclient (0.11) no longer awaits its task then, and asyncio would report at length that it failed.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    finally:
        _keep(draft, executed)


def _fetch(notebook: Path, values: dict[str, object]) -> None:
    """Get the model's files that a notebook begins with: a kernel has no terminal for the bar.

    With `offline` nothing is fetched, and every byte would be read once more than needed.
    """
    defaults = {name: ast.literal_eval(about["default"]) for name, about in declared(notebook).items()}
    wanted = defaults | values
    # A notebook without this parameter needs no model.
    if wanted.get("offline", True):
        return
    model = catalog.find(wanted["model"])
    try:
        if "precision" in wanted:
            asked = {name: wanted[name] for name in ("prompt", "max_new_tokens")}
            export.onnx_folder(model, wanted["precision"], **asked)
        else:
            fetch.check_prompt(fetch.checkpoint(model), model, wanted["question"], wanted["max_new_tokens"])
    except errors.ModelUnavailable as error:
        raise NotebookError(f"{notebook.name} was not started: {error}") from None


def _keep(draft: Path, executed: Path) -> None:
    """Put what was executed in its place; a draft that is not there or was cut off is left out."""
    import nbformat

    try:
        book = nbformat.read(draft, as_version=4)
    except (FileNotFoundError, ValueError):
        return
    book.metadata.papermill.output_path = str(executed)
    relink(book, executed.parent)
    written.stamp(book, "run")
    nbformat.write(book, draft)
    draft.replace(executed)


def _html(executed: Path) -> str:
    """An executed notebook as one page that holds its pictures."""
    import nbformat

    book = nbformat.read(executed, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            # nbconvert (7.17) embeds only what lies below the folder that it is given: here the project's.
            cell.source = cell.source.replace(
                f"]({_way_to_root(executed.parent)}/docs/images/", "](docs/images/"
            )
    return page(book, executed.stem, embed_images=True)


def page(book, title: str, embed_images: bool = False) -> str:
    """A notebook as an HTML page that needs no network; pictures can be embedded from below the project."""
    resources = {"metadata": {"name": title, "path": str(ROOT)}}
    return _exporter(embed_images).from_notebook_node(book, resources=resources)[0]


@functools.cache
def _exporter(embed_images: bool):
    """nbconvert's exporter, made once: reading its templates takes longer than a page."""
    from nbconvert import HTMLExporter

    return HTMLExporter(raw_template=TEMPLATE.read_text("utf-8"), embed_images=embed_images)


def relink(book, folder: Path) -> None:
    """Let links and pictures in a notebook lead to the project's files from another folder than its own."""
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", f"]({_way_to_root(folder)}/")


def _way_to_root(folder: Path) -> str:
    return places.relative(ROOT, folder)


def save() -> None:
    """Execute both notebooks with their defaults in one empty MLflow store and write them back with outputs.

    An empty store makes the first registered version number 1, as a reader will see it. A notebook's metadata
    records what its outputs were made from.

    Raises:
        NotebookError: when a cell fails; that notebook on disk stays as it was.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    settings = {"kernel_name": "python3", "timeout": None, "record_timing": False, "config": ENCRYPTED}
    settings["resources"] = {"metadata": {"path": str(ROOT / "notebooks")}}
    with tempfile.TemporaryDirectory() as store:
        own = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db", "TMPDIR": store}
        for notebook in NOTEBOOKS.values():
            print(f"Executing {notebook.name} …", flush=True)
            book = nbformat.read(notebook, as_version=4)
            try:
                # A line that was sent in two parts is saved as one.
                NotebookClient(book, coalesce_streams=True, **settings).execute(env=own)
            except CellExecutionError as error:
                raise NotebookError(f"{notebook.name} was not saved: {error.ename}: {error.evalue}") from None
            # The outputs do not depend on the patch release.
            book.metadata.language_info.pop("version", None)
            book.metadata["made_from"] = fingerprint(book)
            nbformat.write(book, notebook)


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
