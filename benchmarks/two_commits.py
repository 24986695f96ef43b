"""The wrapper of another commit beside this one's, in one process and in turns.

    python benchmarks/two_commits.py COMMIT [--rounds 7] [--tokens 64]

Both load the same ONNX folder and answer the same prompt, alone and as sixteen rows. The ratios are this
commit's ÷ the other's, each of the best of all rounds, for a busy machine only ever takes away: above 1 this
commit makes more tokens per second, below 1 it gives its first token sooner. They are printed and written to
benchmarks/results/two_commits.json.
"""

import argparse
import importlib.util
import subprocess
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import machine
from tqdm import trange

from helpers import ROOT
from helpers.models import catalog, export

WRAPPER = "helpers/models/onnx_chat_model.py"
QUESTION = "Tell me a story about a robot that learns to paint."


def module_of(commit: str, path: Path) -> ModuleType:
    """The wrapper as it stands in a commit, written to `path`. Raises SystemExit if the commit lacks it."""
    shown = subprocess.run(["git", "show", f"{commit}:{WRAPPER}"], cwd=ROOT, capture_output=True)
    if shown.returncode:
        raise SystemExit(f"{commit!r} is not a commit with {WRAPPER}: {shown.stderr.decode().strip()}")
    path.write_bytes(shown.stdout)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(wrapper, prompt: str, rows: int, tokens: int) -> tuple[float, float]:
    """Tokens per second of one call, and seconds to the first token."""
    start = time.perf_counter()
    made = [each.result() for each in wrapper.generate([prompt] * rows, {"max_new_tokens": tokens})]
    seconds = time.perf_counter() - start
    return sum(each.completion_tokens for each in made) / seconds, made[0].time_to_first_token


def compare(wrappers: dict, prompt: str, rounds: int, tokens: int, label: str) -> dict[str, float]:
    """Ask "this" and "other" in turns, after a round that warms up; name of a ratio → this ÷ other."""
    rates = {(name, rows): [] for name in wrappers for rows in (1, 16)}
    firsts = {name: [] for name in wrappers}
    for turn in trange(rounds + 1, desc=label):
        for name in sorted(wrappers, reverse=turn % 2):
            alone, first = measure(wrappers[name], prompt, 1, tokens)
            together, _ = measure(wrappers[name], prompt, 16, tokens)
            if turn:
                rates[name, 1].append(alone)
                rates[name, 16].append(together)
                firsts[name].append(first)
    return {
        f"{label}, 1 row: tokens per second": max(rates["this", 1]) / max(rates["other", 1]),
        f"{label}, 16 rows: tokens per second": max(rates["this", 16]) / max(rates["other", 16]),
        f"{label}: seconds to the first token": min(firsts["this"]) / min(firsts["other"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", help="a commit, branch or tag, say HEAD~20")
    parser.add_argument("--rounds", type=int, default=7, help="rounds after the one that warms up")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    given = parser.parse_args()
    model, ratios = catalog.find("smollm2-135m"), {}
    with tempfile.TemporaryDirectory() as place:
        commits = {"this": "HEAD", "other": given.commit}
        modules = {name: module_of(commit, Path(place, f"{name}.py")) for name, commit in commits.items()}
        for precision in ("int8", "int4"):
            folder = export.onnx_folder(model, precision)
            context = SimpleNamespace(artifacts={"phi3-mini-onnx": str(folder)}, model_config={})
            wrappers = {name: module.Phi3Model() for name, module in modules.items()}
            for wrapper in wrappers.values():
                wrapper.load_context(context)
            prompt = wrappers["this"].apply_chat_template(model.messages(QUESTION))
            ratios |= compare(wrappers, prompt, given.rounds, given.tokens, precision)
    for name, ratio in ratios.items():
        print(f"{name:<40}{ratio:>8.2f}")
    result = {"settings": vars(given), "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}}
    print(f"\nwritten: {machine.write('two_commits', result).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
