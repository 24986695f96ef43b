"""Copied into IPython's start-up folder by `faults_support`: at a chosen moment of a notebook, do some harm.

FAULT_CELL is a part of the cell's source, FAULT_CALL the name of the first function called in it to strike
at (empty: as the cell begins), FAULT_DEED the code to run then. FAULT_NOTE is a file for what was seen.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import psutil
from IPython import get_ipython


def _before(info):
    if os.environ["FAULT_CELL"] not in info.raw_cell:
        return
    get_ipython().events.unregister("pre_run_cell", _before)
    if os.environ["FAULT_CALL"]:
        sys.setprofile(_watch)
    else:
        _strike()


def _watch(frame, event, argument):
    if event == "call" and frame.f_code.co_name == os.environ["FAULT_CALL"]:
        sys.setprofile(None)
        _strike()


def _strike():
    children = [process.pid for process in psutil.Process().children(recursive=True)]
    temporary = tempfile.gettempdir()
    seen = {"children": children, "temporary": temporary, "files": os.listdir(temporary)}
    note = Path(os.environ["FAULT_NOTE"])
    note.with_suffix(".new").write_text(json.dumps(seen), encoding="utf-8")
    note.with_suffix(".new").rename(note)
    exec(os.environ["FAULT_DEED"], globals())  # noqa: S102 (the test's own code)


get_ipython().events.register("pre_run_cell", _before)
