"""The wrapper against its peers, in one run on one machine with the same weights and prompts.

    make bench        # or: python benchmarks/wrapper.py [--rounds 5] [--tokens 128]

Every round asks every peer once, in random order, so that a busy moment of the machine hits all of them; the
first round warms up and is dropped. Figures are medians over the rounds, ratios are medians of the rounds'
ratios; memory is that of a process with the wrapper alone. They are printed and written to
benchmarks/results/wrapper.json; benchmarks/README.md says how to read them.
"""

import argparse
import gc
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import machine
import mlflow
import onnxruntime_genai as og
import psutil
from mlflow.models import infer_signature
from tqdm import trange

from helpers import tracking
from helpers.models import catalog, export, fetch, onnx_chat_model

AIMS = {  # ratio: (aim, whether more is better)
    "pyfunc wrapper ÷ bare genai loop, tok/s": (0.97, True),
    "pyfunc wrapper ÷ llama.cpp, tok/s": (1.3, True),
    "pyfunc wrapper ÷ Transformers pipeline, tok/s": (6, True),
    "16 rows in one call ÷ 16 single calls, total tok/s": (3, True),
    "8 threads ÷ 1, total tok/s": (2, True),
    "pyfunc stream ÷ bare genai loop, time to first token": (1.1, False),
    "memory after 1,000 mixed requests ÷ after 10": (1.05, False),
}
STORY = "Write a long story about {}."
THINGS = ("the sea", "a dog", "the moon", "two friends", "a train", "a king", "snow", "a garden")
SCHEMA = json.dumps({"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}})


class Peers:
    """The contenders; each asks for the same prompt and returns (tokens per second, seconds to the first)."""

    def __init__(self, threads: int, tokens: int, store: str):
        model = catalog.find("smollm2-135m")
        self.tokens, self.threads = tokens, threads
        folder, checkpoint = export.onnx_folder(model, "int4"), fetch.checkpoint(model)
        self.chat = model.messages(STORY.format("the sea"))
        tracking.connect(f"sqlite:///{store}/mlflow.db", "bench")
        self.folder = self._log_wrapper(folder)
        self.loaded = mlflow.pyfunc.load_model(self.folder)
        self.wrapper = self.loaded.unwrap_python_model()
        self.prompt = self.wrapper.apply_chat_template(self.chat)
        self.count = self._count(self.prompt)
        self._load_genai(folder)
        self._load_transformers(checkpoint)
        self._load_llama(model)

    def _log_wrapper(self, folder: Path) -> str:
        """The folder in which MLflow keeps the wrapper."""
        example, params = {"prompt": "Hi"}, onnx_chat_model.DEFAULT_PARAMS
        with mlflow.start_run():
            info = mlflow.pyfunc.log_model(
                name="wrapper",
                python_model=onnx_chat_model.__file__,
                artifacts={"phi3-mini-onnx": str(folder)},
                signature=infer_signature(example, ["Hi"], params),
                input_example=(example, params),
                model_config={"threads": self.threads},
                pip_requirements=tracking.requirements("mlflow", "onnxruntime-genai"),
            )
        return mlflow.artifacts.download_artifacts(info.model_uri)

    def _load_genai(self, folder: Path) -> None:
        config = og.Config(str(folder))
        session = {"session_options": {"intra_op_num_threads": self.threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self.og_model = og.Model(config)
        self.og_tokenizer = og.Tokenizer(self.og_model)

    def _load_transformers(self, checkpoint: Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(self.threads)
        self.pipeline = transformers.pipeline("text-generation", model=str(checkpoint), dtype="float32")
        with mlflow.start_run():
            info = mlflow.transformers.log_model(
                self.pipeline,
                name="pipeline",
                task="llm/v1/chat",
                model_config={"do_sample": False},
                pip_requirements=tracking.requirements("mlflow", "transformers", "torch"),
            )
        self.chat_model = mlflow.pyfunc.load_model(info.model_uri)

    def _load_llama(self, model: catalog.Model) -> None:
        from llama_cpp import Llama

        path = str(fetch.gguf(model))
        self.llama = Llama(
            path, n_ctx=2048, n_threads=self.threads, n_threads_batch=self.threads, verbose=False
        )

    def _count(self, prompt: str) -> int:
        """Tokens of the greedy answer, which is the same each time."""
        return self.wrapper.generate([prompt], {"max_new_tokens": self.tokens})[0].result().completion_tokens

    def pyfunc_wrapper(self) -> tuple[float, float]:
        started = time.perf_counter()
        self.loaded.predict({"prompt": self.prompt}, params={"max_new_tokens": self.tokens})
        rate = self.count / (time.perf_counter() - started)
        started = time.perf_counter()
        next(self.loaded.predict_stream({"prompt": self.prompt}, params={"max_new_tokens": self.tokens}))
        return rate, time.perf_counter() - started

    def bare_genai_loop(self) -> tuple[float, float]:
        started = time.perf_counter()
        count = sum(1 for _ in self._genai_tokens())
        rate = count / (time.perf_counter() - started)
        started = time.perf_counter()  # a second call, as for the wrapper: the model is warm by now
        next(self._genai_tokens())
        return rate, time.perf_counter() - started

    def _genai_tokens(self):
        ids = self.og_tokenizer.encode(self.prompt)
        params = og.GeneratorParams(self.og_model)
        params.set_search_options(max_length=len(ids) + self.tokens, do_sample=False)
        generator = og.Generator(self.og_model, params)
        stream = self.og_tokenizer.create_stream()
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
            yield stream.decode(generator.get_next_tokens()[0])

    def llama_cpp(self) -> tuple[float, float]:
        self.llama.reset()  # no prompt cache: the others have none
        started, first, count = time.perf_counter(), None, 0
        for _ in self.llama(self.prompt, max_tokens=self.tokens, temperature=0.0, stream=True):
            count += 1
            first = first or time.perf_counter() - started
        return count / (time.perf_counter() - started), first

    def transformers_pipeline(self) -> tuple[float, None]:
        started = time.perf_counter()
        answer = self.pipeline(self.chat, max_new_tokens=self.tokens, do_sample=False)[0]["generated_text"][
            -1
        ]
        seconds = time.perf_counter() - started
        return len(self.pipeline.tokenizer(answer["content"])["input_ids"]) / seconds, None

    def mlflow_transformers(self) -> tuple[float, None]:
        started = time.perf_counter()
        completion = self.chat_model.predict({"messages": self.chat, "max_tokens": self.tokens})[0]
        return completion["usage"]["completion_tokens"] / (time.perf_counter() - started), None


def one_call_and_sixteen(peers: Peers) -> float:
    """Total tokens per second of 16 rows in one call, as a ratio to 16 calls."""
    chats = [
        [{"role": "user", "content": STORY.format(f"{thing} and {n}")}] for thing in THINGS for n in (1, 2)
    ]
    prompts, params = [peers.wrapper.apply_chat_template(chat) for chat in chats], {"max_new_tokens": 64}
    started = time.perf_counter()
    single = [peers.loaded.predict({"prompt": prompt}, params=params)[0] for prompt in prompts]
    alone = time.perf_counter() - started
    started = time.perf_counter()
    together = peers.loaded.predict({"prompt": prompts}, params=params)
    seconds = time.perf_counter() - started
    assert together == single, "a row's greedy answer depends on its batch"
    return alone / seconds


def eight_threads_and_one(peers: Peers, requests: int = 2) -> float:
    """Total tokens per second of 8 callers at once, as a ratio to one caller with the same requests."""
    chats = [[{"role": "user", "content": STORY.format(thing)}] for thing in THINGS]
    prompts = [peers.wrapper.apply_chat_template(chat) for chat in chats]

    def caller(prompt: str) -> None:
        for _ in range(requests):
            peers.loaded.predict({"prompt": prompt}, params={"max_new_tokens": 64})

    started = time.perf_counter()
    for prompt in prompts:
        caller(prompt)
    alone = time.perf_counter() - started
    threads = [threading.Thread(target=caller, args=(prompt,)) for prompt in prompts]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return alone / (time.perf_counter() - started)


def memory_growth(folder: str, requests: int = 1000) -> dict[int, int]:
    """MB of memory of this process after 10, 100 and 1,000 mixed requests to the model in a folder."""
    loaded, process, after = mlflow.pyfunc.load_model(folder), psutil.Process(), {}
    for number in trange(1, requests + 1, desc="mixed requests"):
        _mixed_request(loaded, number)
        if number in (10, 100, requests):
            gc.collect()
            after[number] = round(process.memory_info().rss / 1e6)
    return after


def _mixed_request(loaded: mlflow.pyfunc.PyFuncModel, number: int) -> None:
    """One of ten sizes and kinds in turn, each time with other words; the first ten show every size.

    Whole answers, batches, samples, schemas, stop texts, a stream to its end and one that is left early.
    """
    turn = number % 10
    chat = [{"role": "user", "content": f"{number:04} " * (1 + 13 * turn % 20)}]
    prompt = loaded.unwrap_python_model().apply_chat_template(chat)
    kinds = [{}, {"temperature": 0.8, "seed": number}, {"json_schema": SCHEMA}, {"stop": ["e"]}]
    params = {"max_new_tokens": 8} | kinds[turn % len(kinds)]
    if turn % 5 == 0:
        stream = loaded.predict_stream({"prompt": prompt}, params=params)
        next(stream, None)
        if turn:
            stream.close()
        else:
            list(stream)
    else:
        loaded.predict({"prompt": [prompt] * (1 + turn % 3)}, params=params)


def _milliseconds(seconds: list[float | None]) -> float | None:
    """Their median; None for a contender that does not stream."""
    return None if None in seconds else round(1000 * statistics.median(seconds), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the one that warms up")
    parser.add_argument("--tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="processor threads of every peer")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        peers = Peers(given.threads, given.tokens, store)
        names = (
            "pyfunc_wrapper",
            "bare_genai_loop",
            "llama_cpp",
            "transformers_pipeline",
            "mlflow_transformers",
        )
        samples = {name: [] for name in names}
        batch, threads = [], []
        for turn in trange(given.rounds + 1, desc="rounds"):
            measured = {name: getattr(peers, name)() for name in random.sample(names, len(names))}
            pair = one_call_and_sixteen(peers), eight_threads_and_one(peers)
            if turn:
                for name in names:
                    samples[name].append(measured[name])
                batch.append(pair[0])
                threads.append(pair[1])
        fresh = multiprocessing.get_context("spawn")  # this process holds every peer's memory
        with ProcessPoolExecutor(1, mp_context=fresh) as alone:
            memory = alone.submit(memory_growth, peers.folder).result()
    report(samples, batch, threads, memory, vars(given))


def report(samples: dict, batch: list, threads: list, memory: dict, settings: dict) -> None:
    """Print both tables and write the result."""

    def ratio(over: str, under: str, column: int = 0) -> float:
        return statistics.median(
            a[column] / b[column] for a, b in zip(samples[over], samples[under], strict=True)
        )

    ratios = dict(
        zip(
            AIMS,
            (
                ratio("pyfunc_wrapper", "bare_genai_loop"),
                ratio("pyfunc_wrapper", "llama_cpp"),
                ratio("pyfunc_wrapper", "transformers_pipeline"),
                statistics.median(batch),
                statistics.median(threads),
                ratio("pyfunc_wrapper", "bare_genai_loop", 1),
                memory[1000] / memory[10],
            ),
            strict=True,
        )
    )
    peers = {
        name: {
            "tokens_per_second": round(statistics.median(rate for rate, _ in runs), 1),
            "first_token_ms": _milliseconds([first for _, first in runs]),
        }
        for name, runs in samples.items()
    }
    print(f"\n{'peer':<24}{'tok/s':>8}{'first token, ms':>18}")
    for name, figures in peers.items():
        print(f"{name:<24}{figures['tokens_per_second']:>8}{figures['first_token_ms'] or '':>18}")
    print(f"\n{'ratio':<56}{'measured':>9}{'aim':>8}")
    for name, (aim, more) in AIMS.items():
        met = ratios[name] >= aim if more else ratios[name] <= aim
        print(f"{name:<56}{ratios[name]:>9.2f}{'≥' if more else '≤':>4} {aim:<5}{'' if met else 'not met'}")
    print(f"\nmemory, MB: {', '.join(f'{mb} after {number}' for number, mb in memory.items())}")
    rounded = {name: round(ratio, 3) for name, ratio in ratios.items()}
    result = {"settings": settings, "peers": peers, "ratios": rounded, "memory_mb_after": memory}
    print(f"\nwritten: {machine.write('wrapper', result, 'llama-cpp-python').relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
