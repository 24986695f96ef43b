"""What a candidate answers, how far its probabilities are from a reference's, and what it costs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import numpy as np
    from mlflow.pyfunc import PyFuncModel

Chat = list[dict[str, str]]  # messages: "role" and "content" of each


class Answer(NamedTuple):
    """One answer and what it cost, in seconds; `seconds` is the whole call."""

    text: str
    completion_tokens: int
    time_to_first_token: float
    seconds: float

    def rate(self, first: float) -> float:
        """Tokens per second after the first, which took `first` seconds; NaN where no other came."""
        rest, seconds = self.completion_tokens - 1, self.seconds - first
        return rest / seconds if rest > 0 and seconds > 0 else math.nan


def answer(loaded: PyFuncModel, chats: list[Chat], max_new_tokens: int) -> list[Answer]:
    """The greedy answers of a loaded model to chats, in order."""
    if "transformers" in loaded.metadata.flavors:
        return _answer_with_pipeline(loaded.get_raw_model(), chats, max_new_tokens)
    wrapper = loaded.unwrap_python_model()
    prompts = [wrapper.encode_messages(chat) for chat in chats]
    started = wrapper.generate(prompts, {"max_new_tokens": max_new_tokens, "temperature": 0.0})
    completions = [completion.result() for completion in started]
    return [Answer(c.text, c.completion_tokens, c.time_to_first_token, c.seconds) for c in completions]


def _answer_with_pipeline(pipeline, chats: list[Chat], max_new_tokens: int) -> list[Answer]:
    """Ask the pipeline itself: through `predict` it answers in batches only if it was logged so."""
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_full_text": False}
    start = time.perf_counter()
    texts = [row[0]["generated_text"] for row in pipeline(chats, batch_size=50, **options)]
    seconds = time.perf_counter() - start
    counts = [len(ids) for ids in pipeline.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return [Answer(text, count, math.nan, seconds) for text, count in zip(texts, counts, strict=True)]


def next_token_probabilities(loaded: PyFuncModel, ids: np.ndarray, start: int) -> np.ndarray:
    """Read token ids in one pass, and return what would come next at each position from `start` on.

    Returns:
        Probabilities of shape (len(ids) - start, vocabulary), in float64.
    """
    from scipy.special import softmax

    if "transformers" in loaded.metadata.flavors:
        import torch

        with torch.inference_mode():
            logits = loaded.get_raw_model().model(torch.tensor(ids[None]).long()).logits.double().numpy()
    else:
        import onnxruntime_genai as og

        wrapper = loaded.unwrap_python_model()
        search = og.GeneratorParams(wrapper.model)
        # As in the wrapper's `decode`: Gemma 2 needs room for its whole attention window.
        search.set_search_options(max_length=max(len(ids) + 1, wrapper.decoder.window))
        generator = og.Generator(wrapper.model, search)
        generator.append_tokens(ids)
        logits = generator.get_output("logits")
    return softmax(logits[0, start:].astype("float64"), axis=-1)


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Compare two models' probabilities, of shape (positions, vocabulary), position by position.

    Returns:
        Shape (positions, 2). First KL(reference || other) in nats (Kullback and Leibler, 1951): how many
        more nats a token drawn by the reference's probabilities costs with the other's. Then 1 where both
        find the same token likeliest, else 0.
    """
    import numpy as np
    from scipy.special import rel_entr

    same = reference.argmax(axis=-1) == other.argmax(axis=-1)
    return np.stack([rel_entr(reference, other).sum(axis=-1), same], axis=-1)


def divergences(
    loaded: Mapping[str, PyFuncModel], reference: str, written: list[tuple[Chat, str]]
) -> dict[str, dict[str, float]]:
    """Let every candidate read what the reference wrote, and compare their probabilities.

    llama.cpp's `perplexity --kl-divergence` measures quantised models in the same way, on given texts.

    Args:
        loaded: name → model; the reference is one of `Phi3Model`.
        written: chats with the reference's answers. Every position of an answer counts, and the one behind
            it, where it ended or was cut; so an empty answer counts as well.
    Returns:
        For each candidate the means over all positions: `kl_divergence` in nats and `top1_agreement`.
    """
    import numpy as np

    wrapper = loaded[reference].unwrap_python_model()
    # Some tokenizers put a token of their own before every text.
    begins = len(wrapper.tokenizer.encode(""))
    found: dict[str, list] = {name: [] for name in loaded}
    # One text at a time: the probabilities of 64 tokens among 49,152 take 25 MB in float64.
    for chat, text in written:
        prompt = wrapper.encode_messages(chat)
        ids = np.concatenate([prompt, wrapper.tokenizer.encode(text)[begins:]])
        wanted = next_token_probabilities(loaded[reference], ids, len(prompt) - 1)
        for name, candidate in loaded.items():
            read = wanted if name == reference else next_token_probabilities(candidate, ids, len(prompt) - 1)
            found[name].append(divergence(wanted, read))
    means = {name: np.concatenate(parts).mean(axis=0).tolist() for name, parts in found.items()}
    return {name: {"kl_divergence": kl, "top1_agreement": same} for name, (kl, same) in means.items()}


def speeds(loaded: Mapping[str, PyFuncModel], chat: Chat, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over single calls of up to 24 tokens, one candidate after the other in every round."""
    import numpy as np

    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in loaded}
    for _ in range(rounds):
        for name, model in loaded.items():
            (whole,) = answer(model, [chat], max_new_tokens=24)
            first = whole.time_to_first_token
            if math.isnan(first):  # no stream
                first = answer(model, [chat], max_new_tokens=1)[0].seconds
            samples[name].append((first * 1e3, whole.rate(first)))
    names = ("first_token_ms", "tokens_per_second")
    return {
        name: dict(zip(names, np.median(pairs, axis=0).tolist(), strict=True))
        for name, pairs in samples.items()
    }


def footprints(folders: Mapping[str, Path], chat: Chat) -> dict[str, dict[str, float]]:
    """Load each model in a process of its own and let it answer once.

    Args:
        folders: name → a model as MLflow saved it, on this machine.
        chat: what to ask.
    Returns:
        `load_seconds`: `mlflow.pyfunc.load_model`, with the imports it causes. `memory_mb`: what loading and
        answering added to the resident set of a process that has only imported MLflow. `size_mb`: on disk.
    Raises:
        RuntimeError: if a model cannot be loaded or asked, with its folder and the last line of the error.
    """
    command = [sys.executable, "-m", "helpers.candidates", json.dumps(chat), *map(str, folders.values())]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"The models' memory was not measured (exit code {result.returncode}): {last}")
    costs = dict(zip(folders, json.loads(result.stdout.splitlines()[-1]), strict=True))
    for name, cost in costs.items():
        if isinstance(cost, str):
            raise RuntimeError(f"The model in {folders[name]} could not be loaded and asked: {cost}")
    return costs


def _footprint_here(folder: str, chat: Chat) -> dict[str, float]:
    import mlflow.pyfunc
    import psutil

    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    loaded = mlflow.pyfunc.load_model(folder)
    load_seconds = time.perf_counter() - start
    answer(loaded, [chat], max_new_tokens=16)
    added = process.memory_info().rss - before
    size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {"load_seconds": load_seconds, "memory_mb": added / 1e6, "size_mb": size / 1e6}


def _send_footprint(folder: str, chat: Chat, sender: Connection) -> None:
    try:
        sender.send(_footprint_here(folder, chat))
    except Exception as error:
        sender.send((str(error).strip() or repr(error)).splitlines()[-1])


def _print_footprints(chat: Chat, folders: list[str]) -> None:
    """The command of `footprints`: prints a list with the costs of each model, or with what went wrong.

    MLflow is imported once, here, where a process can be forked.
    """
    import multiprocessing

    import mlflow.pyfunc  # noqa: F401

    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    costs = []
    for folder in folders:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_footprint, args=(folder, chat, sender))
        process.start()
        sender.close()
        try:
            costs.append(receiver.recv())
        except EOFError:
            costs.append("its process was killed")
        process.join()
    print(json.dumps(costs))


if __name__ == "__main__":
    _print_footprints(json.loads(sys.argv[1]), sys.argv[2:])
