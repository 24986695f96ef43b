"""Both flows at Phi-3-mini's true size, with random weights: what it takes of disk, memory and time.

    make rehearsal        # or: python benchmarks/rehearsal.py [--geometry tiny] [--layers 8] [--folder PLACE]

The answers mean nothing; sizes, formats and speeds are those of the real model. Each step runs in a process
of its own, and one whose result lies in the folder is not run again: what was interrupted is gone on with.
A small rehearsal comes first: it finds faults in a minute, and shows what does not grow with the model.
Results are printed and written to out/rehearsal.json, or to another folder with --output.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import machine
import psutil
import random_phi3

from helpers import ROOT
from helpers.models import folders

HERE = Path(__file__).parent
STEPS = {
    "bandwidth": "read memory",
    "checkpoint": "write the checkpoint",
    "pipeline": "pipeline: load, ask",
    "transformers_log": "pipeline: `log_model`",
    "transformers_log_in_place": "pipeline: log in place",
    "transformers_answer": "`load_model`, ask",
    "onnx": "convert to int4 ONNX",
    "onnx_log": "wrapper: `log_model`",
    "onnx_log_in_place": "wrapper: log in place",
    "bandwidth_again": "read memory again",
    "onnx_answer": "`load_model`, ask, stream, batch",
}
AIMS = {  # figure: (aim, whether more is better)
    "ONNX decode, share of the read bandwidth": (0.55, True),
    "Transformers logged in place, most disk ÷ model": (1.05, False),
    "ONNX logged in place, most disk ÷ model": (1.05, False),
    "Transformers logged in place, memory ÷ memory to load and ask": (1.1, False),
    "ONNX logged in place, memory ÷ the same with the tiny model": (1.1, False),
}
LIBRARIES_BYTES = 1.2e9  # of memory, whatever the model's size


def needs(geometry: random_phi3.Geometry) -> tuple[float, float]:
    """Bytes of disk and memory that a rehearsal takes at most.

    Disk: the checkpoint with what `log_model` writes of it, the model and a temporary copy; or, later, the
    checkpoint with one logged in place, the int4 model, and what `log_model` writes of that. Memory: the
    conversion, with the mapped checkpoint, the result, and the message that it is written from.
    """
    checkpoint, int4 = geometry.checkpoint_bytes, geometry.onnx_bytes
    disk = 1.01 * (2 * checkpoint + max(checkpoint, 3 * int4)) + 0.1e9
    memory = 1.05 * checkpoint + 2 * int4 + LIBRARIES_BYTES
    return disk, memory


def refuse_if_short(folder: Path, geometry: random_phi3.Geometry) -> None:
    """Leave with one sentence if disk or memory is short of what is still to do."""
    disk, memory = needs(geometry)
    disk -= folders.total_size(folder)
    standing = next(each for each in (folder, *folder.parents) if each.exists())
    free_disk, free_memory = shutil.disk_usage(standing).free, psutil.virtual_memory().available
    if disk > free_disk or memory > free_memory:
        raise SystemExit(
            f"The rehearsal of {geometry.name} needs {disk / 1e9:,.1f} GB of disk and {memory / 1e9:,.1f} GB "
            f"of memory, and {folder} has {free_disk / 1e9:,.1f} GB and this machine "
            f"{free_memory / 1e9:,.1f} GB free. Free some, set --folder to a folder on another disk, "
            "or rehearse fewer layers: --layers 8"
        )


class Watch:
    """Looks, while a process runs, at its own memory and at the folder's size, and keeps the most of both.

    Own memory is what it does not share with files: pages of a mapped file can be dropped at any time.
    """

    def __init__(self, process: subprocess.Popen, folder: Path):
        self.process, self.folder = psutil.Process(process.pid), folder
        self.before, self.memory, self.resident, self.disk = folders.total_size(folder), 0, 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.disk = max(self.disk, folders.total_size(self.folder) - self.before)
            try:
                used = self.process.memory_info()
            except psutil.Error:
                return
            self.resident = max(self.resident, used.rss)
            self.memory = max(self.memory, used.rss - getattr(used, "shared", 0))

    def end(self) -> dict:
        self._over.set()
        self._thread.join()
        return {
            "memory_bytes": self.memory,
            "resident_bytes": self.resident,
            "most_disk_bytes": self.disk,
            "disk_bytes": folders.total_size(self.folder) - self.before,
        }


def rehearse(folder: Path, geometry: random_phi3.Geometry) -> dict[str, dict]:
    """Run every step that has no result yet; the figures of all, by name."""
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    if any(not (results / f"{step}.json").exists() for step in STEPS):
        refuse_if_short(folder, geometry)
    found = {}
    for number, (step, title) in enumerate(STEPS.items(), 1):
        result = results / f"{step}.json"
        print(f"{geometry.name}, {number} of {len(STEPS)}: {title} …", end=" ", flush=True)
        known = result.exists()
        if not known:
            result.with_suffix(".part").write_text(json.dumps(run(step, folder, geometry)), encoding="utf-8")
            result.with_suffix(".part").replace(result)
        found[step] = json.loads(result.read_text("utf-8"))
        print("done before" if known else f"{found[step]['seconds']:.1f} s", flush=True)
    return found


def run(step: str, folder: Path, geometry: random_phi3.Geometry) -> dict:
    """Run one step in a process of its own; SystemExit with the end of its output if it fails."""
    temporary = folder / "tmp"  # in the folder that is watched, so that temporary copies are counted
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    log, figures = folder / f"{step}.log", temporary / "figures.json"
    command = [sys.executable, HERE / "rehearsal_steps.py", step, folder, random_phi3.dump(geometry), figures]
    environment = os.environ | {"TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with log.open("wb") as output:
        child = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, env=environment)
        try:
            watch = Watch(child, folder)
            child.wait()
            watched = watch.end()
        finally:
            child.kill()
            child.wait()
    if child.returncode:
        lines = "\n".join(log.read_text("utf-8", "replace").splitlines()[-15:])
        raise SystemExit(
            f"failed.\n{lines}\nThe step {step!r} ended with {child.returncode}; run it again to go on."
        )
    found = json.loads(figures.read_text("utf-8")) | watched
    shutil.rmtree(temporary)
    log.unlink()
    return found


def rate(found: dict[str, dict], step: str) -> float:
    """Bytes of weights that a step reads each second while it makes tokens, as a share of the bandwidth."""
    figures = found[step]
    return figures["tokens_per_second"] * figures["bytes_per_token"] / bandwidth(found)


def bandwidth(found: dict[str, dict]) -> float:
    """Bytes per second, the better of two measurements, as other work on the machine disturbs them."""
    return max(found[step]["bytes_per_second"] for step in ("bandwidth", "bandwidth_again"))


def ratios(found: dict[str, dict], small: dict[str, dict]) -> dict[str, float]:
    transformers, onnx = found["transformers_log_in_place"], found["onnx_log_in_place"]
    values = (
        rate(found, "onnx_answer"),
        transformers["most_disk_bytes"] / transformers["model_bytes"],
        onnx["most_disk_bytes"] / onnx["model_bytes"],
        transformers["resident_bytes"] / found["pipeline"]["resident_bytes"],
        onnx["memory_bytes"] / small["onnx_log_in_place"]["memory_bytes"],
    )
    return dict(zip(AIMS, values, strict=True))


def table(found: dict[str, dict]) -> str:
    """The steps in Markdown. GB; memory without and with the files that a process maps, disk at the most."""
    lines = [
        "| step | seconds | own memory | with mapped files | disk | at most | tokens/s | of read bandwidth |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for step, figures in found.items():
        sizes = [
            figures[name] for name in ("memory_bytes", "resident_bytes", "disk_bytes", "most_disk_bytes")
        ]
        sizes[2] = figures.get("logged_bytes", sizes[2])  # also where the step removed it in the end
        cells = [STEPS[step], f"{figures['seconds']:.1f}", *(f"{size / 1e9:.1f}" for size in sizes)]
        speed = ["", ""]
        if "bytes_per_token" in figures:
            speed = [f"{figures['tokens_per_second']:.1f}", f"{rate(found, step):.0%}"]
        lines.append(f"| {' | '.join([*cells, *speed])} |")
    return "\n".join(lines)


def report(found: dict[str, dict], measured: dict[str, float]) -> None:
    print(f"\n{table(found)}\n\nSizes in GB. Read bandwidth: {bandwidth(found) / 1e9:.1f} GB/s.")
    print(f"\n{'figure':<66}{'measured':>9}{'aim':>8}")
    for name, (aim, more) in AIMS.items():
        met = measured[name] >= aim if more else measured[name] <= aim
        print(f"{name:<66}{measured[name]:>9.2f}{'≥' if more else '≤':>4} {aim:<5}{'' if met else 'not met'}")


def main() -> None:
    given = read_arguments()
    geometry, tiny = random_phi3.GEOMETRIES[given.geometry], random_phi3.GEOMETRIES["tiny"]
    if given.layers:
        geometry = geometry.with_layers(given.layers)
    place = given.folder.expanduser().resolve()
    folders = {each: place / each.name.replace(", ", "-").replace(" ", "-") for each in (tiny, geometry)}
    refuse_if_short(folders[geometry], geometry)  # before a minute goes into the small one
    small = rehearse(folders[tiny], tiny)
    found = small if geometry == tiny else rehearse(folders[geometry], geometry)
    measured = ratios(found, small)
    report(found, measured)
    result = {
        "geometry": asdict(geometry) | {"parameters": geometry.parameters},
        "steps": found,
        "ratios": {name: round(value, 3) for name, value in measured.items()},
        "steps_with_the_tiny_model": small,
    }
    written = machine.write("rehearsal", result, "onnx", "onnx-ir", "psutil", folder=given.output)
    print(f"\nwritten: {written}")
    if not given.keep:
        for folder in folders.values():
            shutil.rmtree(folder)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", choices=random_phi3.GEOMETRIES, default="phi-3-mini")
    parser.add_argument(
        "--layers", type=int, help="so many instead of the geometry's own, where it does not fit"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "rehearsal", help="place to work in")
    parser.add_argument("--keep", action="store_true", help="leave the files of the rehearsal there")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "out", help="folder of rehearsal.json (default: out)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
