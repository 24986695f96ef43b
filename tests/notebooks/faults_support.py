"""Start the notebooks headless, do harm at a chosen moment, and count what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

KILL = "import signal; os.kill(os.getpid(), signal.SIGKILL)"
TINY = ("-p", "model", "tiny-phi3", "-p", "max_new_tokens", "6", "-p", "experiment", "faults")


@dataclass(frozen=True)
class Fault:
    """Harm done in a kernel: `deed` (code) when the function `call` is first called in the cell with `cell`.

    Without `call`, as that cell begins.
    """

    cell: str
    call: str = ""
    deed: str = KILL


@dataclass
class Ended:
    """What a run left: exit code, output, what the kernel had when the fault struck, and what is left of it.

    `struck` is empty if the fault did not strike; else it has `children` (process ids), `temporary` (a
    folder) and `files` (names in it). `processes` and `files` are those still there after the command ended.
    """

    code: int
    output: str
    error: str
    struck: dict
    processes: list[str]
    files: list[str]


class HeadlessRun:
    """`python -m helpers run …` with a mark on its processes and a temporary folder of its own.

    Args:
        folder: for notes.
        arguments: of the command.
        output: folder of the executed notebooks.
        prefix: a command to put in front, such as `unshare`.
        variables: of the environment.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        store: str,
        fault: Fault | None = None,
        output: Path | None = None,
        prefix: tuple[str, ...] = (),
        **variables: str,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.output = output or folder / "out"
        self.temporary = Path(tempfile.mkdtemp(prefix="f-"))
        self.note = folder / "struck.json"
        self.mark = f"fault-{folder}"
        environment = os.environ | {"TMPDIR": str(self.temporary), "FAULT_MARK": self.mark} | variables
        if fault:
            startup = folder / "ipython" / "profile_default" / "startup"
            startup.mkdir(parents=True)
            shutil.copy(Path(__file__).with_name("fault_hook.py"), startup / "00_fault.py")
            environment |= {
                "IPYTHONDIR": str(folder / "ipython"),
                "FAULT_CELL": fault.cell,
                "FAULT_CALL": fault.call,
                "FAULT_DEED": fault.deed,
                "FAULT_NOTE": str(self.note),
            }
        # fmt: off
        command = [*prefix, sys.executable, "-m", "helpers", "run", *TINY, *arguments,
                   "-p", "tracking_uri", store, "--output", str(self.output)]
        # fmt: on
        self.logs = [folder / "stdout.txt", folder / "stderr.txt"]
        with self.logs[0].open("w", encoding="utf-8") as out, self.logs[1].open("w", encoding="utf-8") as err:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=err,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored under `pytest &`
            )

    def wait_until_struck(self, seconds: float = 1800) -> None:
        """Return when the fault has struck."""
        deadline = time.monotonic() + seconds
        while not self.note.exists():
            assert self.process.poll() is None, self.logs[1].read_text("utf-8")[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self, timeout: float = 1800) -> Ended:
        """Wait for the command to end, give what it started some seconds to follow, and count the rest."""
        try:
            code = self.process.wait(timeout)
        finally:
            self.process.kill()
        output, error = (log.read_text("utf-8") for log in self.logs)
        ended = Ended(
            code=code,
            output=output,
            error=error.strip().splitlines()[-1] if error.strip() else "",  # papermill's bar stands before it
            struck=json.loads(self.note.read_text("utf-8")) if self.note.exists() else {},
            processes=self._left_processes(),
            files=sorted(path.name for path in [*self.temporary.iterdir(), *self.output.glob(".*.tmp")]),
        )
        shutil.rmtree(self.temporary)
        return ended

    def _left_processes(self, seconds: float = 120) -> list[str]:
        deadline = time.monotonic() + seconds
        while (left := list(self._marked())) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _marked(self) -> Iterator[str]:
        for process in psutil.process_iter():
            try:
                if process.environ().get("FAULT_MARK") == self.mark:
                    yield " ".join(process.cmdline())
            except psutil.Error:
                continue
