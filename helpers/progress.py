"""One progress line for long work, in a terminal or in a notebook."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """A bar in a terminal, one line updated in place in a notebook, nothing in a file or a pipe.

    A saved notebook keeps the final line and no debris. As a context manager it puts the bar away.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.total: int | None = None
        self._started = time.perf_counter()
        self._notebook = _NotebookLine() if _in_notebook() else None
        self._bar: tqdm | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def start(self, doing: str, total: int | None = None) -> None:
        """Begin a stage, counted in bytes if `total` is given, in seconds else; advance it with `advance`."""
        self._close()
        self.total = total
        counted = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}B, {rate_fmt}"
        self._bar = tqdm(
            desc=f"{self.label}: {doing}",
            total=total,
            unit="B",
            unit_scale=True,
            leave=False,
            bar_format=counted if total else "{desc} … {elapsed}",
            **self._options(),
        )

    def _options(self) -> dict:
        if self._notebook:
            return {"file": self._notebook, "mininterval": 0.5, "disable": False}
        return {"file": sys.stderr, "disable": not sys.stderr.isatty()}

    def advance(self, done: int | None = None) -> None:
        """Set the bytes done so far; without them, only the time moves on."""
        if self._bar is not None and done is not None:
            self._bar.update(done - self._bar.n)
        elif self._bar is not None:
            self._bar.refresh()

    def update(self, size: int) -> None:
        """Count `size` more bytes; the name is that of tqdm's method."""
        if self._bar is not None:
            self._bar.update(size)

    def finish(self, text: str) -> None:
        """Leave one line: what is there now and how long it took."""
        self._close()
        line = f"{text}, ready in {time.perf_counter() - self._started:.0f} s"
        if self._notebook:
            self._notebook.write(line)
        elif sys.stderr.isatty():
            print(line, file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _NotebookLine:
    """A file whose last line is shown in the cell's output, replacing the one before."""

    def __init__(self) -> None:
        self._display = None

    def write(self, text: str) -> None:
        from IPython.display import display

        line = text.replace("\x1b[A", "").strip()
        if not line:
            return
        content = {"text/plain": line}
        if self._display is None:
            self._display = display(content, raw=True, display_id=True)
        else:
            self._display.update(content, raw=True)

    def flush(self) -> None:
        """Nothing is held back."""


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def megabytes(size: int) -> str:
    """Text for a size in bytes: 1.2 MB."""
    return f"{size / 1e6:,.1f} MB" if size < 1e7 else f"{size / 1e6:,.0f} MB"
