"""Why the OpenAI endpoint keeps the model in a process of its own: how long a thread beside the model waits.

    python benchmarks/one_process.py [--words 3000] [--rounds 3]

onnxruntime-genai holds Python's global lock while it reads a prompt, so a server in the same process could
answer nothing meanwhile. Here a long prompt is read in steps of different sizes, as the wrapper could read
it, and a second thread notes its longest wait. The figures are medians over the rounds; they are printed and
written to benchmarks/results/one_process.json.
"""

import argparse
import statistics
import threading
import time
from types import SimpleNamespace

import machine
import numpy as np
import onnxruntime_genai as og
from tqdm import tqdm

from helpers import ROOT
from helpers.models import catalog, export
from helpers.models.onnx_chat_model import PREFILL_TOKENS, Phi3Model

STEPS = (16, 32, 64, 128, PREFILL_TOKENS)
TICK = 0.002  # seconds that the second thread sleeps


class Watch:
    """A thread that sleeps for a tick again and again; `longest` is its longest wait besides, in seconds."""

    def __enter__(self) -> "Watch":
        self.longest, self._ended = 0.0, False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._ended:
            before = time.perf_counter()
            time.sleep(TICK)
            self.longest = max(self.longest, time.perf_counter() - before - TICK)

    def __exit__(self, *exception: object) -> None:
        self._ended = True
        self._thread.join()


def read(model: og.Model, tokens: np.ndarray, step: int) -> tuple[float, float]:
    """Read a prompt in steps: seconds in all, and the longest wait of another thread."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(tokens) + 1)
    generator = og.Generator(model, params)
    with Watch() as watch:
        start = time.perf_counter()
        for first in range(0, len(tokens), step):
            generator.append_tokens(tokens[first : first + step])
            time.sleep(0)  # Let the other thread run.
        seconds = time.perf_counter() - start
    return seconds, watch.longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--words", type=int, default=3000, help="length of the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    wrapper = Phi3Model()
    folder = export.onnx_folder(catalog.find("smollm2-135m"), "int4")
    wrapper.load_context(SimpleNamespace(artifacts={"phi3-mini-onnx": str(folder)}, model_config={}))
    tokens = wrapper.tokenizer.encode("Once upon a time there was a robot. " * (given.words // 8))
    found = {step: [] for step in STEPS}
    for _ in tqdm(range(given.rounds), desc=f"{len(tokens)} tokens"):
        for step in STEPS:
            found[step].append(read(wrapper.model, tokens, step))
    rows = []
    for step, measured in found.items():
        seconds, wait = map(statistics.median, zip(*measured, strict=True))
        rows.append({"step_tokens": step, "longest_wait_ms": round(wait * 1e3), "read_s": round(seconds, 2)})
        print(f"{step:>3} tokens at once: longest wait {wait * 1e3:5.0f} ms, all is read in {seconds:5.1f} s")
    result = {"settings": vars(given) | {"tokens": len(tokens)}, "steps": rows}
    print(f"\nwritten: {machine.write('one_process', result).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
