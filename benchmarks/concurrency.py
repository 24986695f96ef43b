"""Several callers at once: onnxruntime-genai's Engine against the wrapper's queue over Generator.

    python benchmarks/concurrency.py [--repeats 5] [--requests 4] [--tokens 64]

Every caller is a thread that sends its next request when it has the answer to the last. The contenders run in
turns, in random order, `--repeats` times after a first turn that warms up. The table shows medians over the
turns: tokens per second of all callers together, milliseconds to the first token of a request, and the same
for one that comes while one or two long answers are made. results/concurrency.json holds it too, with every
turn's rate and the machine's facts.
"""

import argparse
import json
import os
import random
import statistics
import threading
import time
from queue import SimpleQueue
from types import SimpleNamespace

import machine
import onnxruntime_genai as og

from helpers.models import catalog, export
from helpers.models import onnx_chat_model as chat

ACTIVE, CALLERS, AHEAD = (1, 2, 3), (1, 4, 8), (1, 2)
THINGS = ("the sea", "a dog", "the moon", "two friends", "a train", "the king", "snow", "a garden")


class Queue:
    """The wrapper, with at most `batches` batches decoded in turn."""

    def __init__(self, model: chat.Phi3Model, batches: int):
        self.model, self.batches = model, batches

    def ask(self, prompt: str, tokens: int) -> tuple[int, float]:
        """Tokens made, and seconds to the first of them."""
        chat.ACTIVE_BATCHES = self.batches
        answer = self.model.generate([prompt], {"max_new_tokens": tokens})[0].result()
        return answer.completion_tokens, answer.time_to_first_token


class Engine:
    """og.Engine with static batching (paged attention needs CUDA), driven by the one thread that made it."""

    def __init__(self, folder: str, threads: int, rows: int = 16):
        config = og.Config(folder)
        session = {"session_options": {"intra_op_num_threads": threads}}
        engine = {"static_batching": {"max_batch_size": rows}}
        config.overlay(json.dumps({"model": {"decoder": session}, "engine": engine}))
        self.model = og.Model(config)
        self.tokenizer, self.inbox = og.Tokenizer(self.model), SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def ask(self, prompt: str, tokens: int) -> tuple[int, float]:
        """Tokens made, and seconds to the first of them."""
        row = SimpleNamespace(limit=tokens, count=0, first=None, text="", over=threading.Event())
        row.asked, row.stream, row.ids = time.perf_counter(), None, self.tokenizer.encode(prompt)
        row.stream = self.tokenizer.create_stream()
        self.inbox.put(row)
        row.over.wait()
        return row.count, row.first

    def _run(self) -> None:
        engine = og.Engine(self.model)
        events, rows = engine.create_event_buffer(64), []
        while True:
            while not rows or not self.inbox.empty():
                rows.append(self._begin(engine, self.inbox.get()))
            for event in engine.run(events):
                row = next(row for row in rows if row.request is event.request)
                if event.token is not None:
                    row.count, row.first = row.count + 1, row.first or time.perf_counter() - row.asked
                    row.text += row.stream.decode(event.token)
                if event.finish_reason != og.FinishReason.NONE:
                    rows.remove(row)
                    row.request.close()
                    row.over.set()

    def _begin(self, engine: og.Engine, row: SimpleNamespace) -> SimpleNamespace:
        options = og.RequestOptions()
        options.set_max_session_tokens(len(row.ids) + row.limit)
        row.request = engine.create_request(options=options)
        turn = og.TurnOptions(row.request)
        turn.set_max_generated_tokens(row.limit)
        row.request.begin_turn(row.ids, turn)
        return row


def load(contender, prompts: list[str], callers: int, requests: int, tokens: int) -> tuple[float, float]:
    """Tokens per second of `callers` threads with `requests` each, and median seconds to the first token."""
    answers: list[tuple[int, float]] = []

    def caller(number: int) -> None:
        for turn in range(requests):
            answers.append(contender.ask(prompts[(number * requests + turn) % len(prompts)], tokens))

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(callers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    return sum(count for count, _ in answers) / seconds, statistics.median(first for _, first in answers)


def late(contender, prompts: list[str], ahead: int) -> float:
    """Seconds to the first token of a request behind `ahead` long ones, which came half a second apart."""
    long = [threading.Thread(target=contender.ask, args=(prompt, 256)) for prompt in prompts[:ahead]]
    for thread in long:
        thread.start()
        time.sleep(0.5)
    first = contender.ask(prompts[-1], 8)[1]
    for thread in long:
        thread.join()
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="a catalogue key, Hub id or folder")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4, help="requests of each caller in one turn")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each contender")
    given = parser.parse_args()
    folder = str(export.onnx_folder(catalog.find(given.model), given.precision))
    model, config = chat.Phi3Model(), {"threads": given.threads}
    model.load_context(SimpleNamespace(artifacts={"phi3-mini-onnx": folder}, model_config=config))
    contenders = {f"queue, {batches} active": Queue(model, batches) for batches in ACTIVE}
    contenders["engine"] = Engine(folder, given.threads)
    prompts = [
        model.apply_chat_template([{"role": "user", "content": f"Tell me a long story about {thing}."}])
        for thing in THINGS
    ]
    rows = {(name, callers): [] for name in contenders for callers in CALLERS}
    lates = {(name, ahead): [] for name in contenders for ahead in AHEAD}
    for turn in range(given.repeats + 1):
        for callers in CALLERS:
            for name in random.sample(list(contenders), len(contenders)):
                measured = load(contenders[name], prompts, callers, given.requests, given.tokens)
                rows[name, callers] += [measured] if turn else []  # the first turn warms up
        for name, ahead in random.sample(list(lates), len(lates)):
            measured = late(contenders[name], prompts, ahead)
            lates[name, ahead] += [measured] if turn else []
    print(f"{'':<18}{'':>8}{'':>8}{'first':>10}{'behind one':>14}{'behind two':>14}")
    print(f"{'contender':<18}{'callers':>8}{'tok/s':>8}{'token, ms':>10}{'long, ms':>14}{'long, ms':>14}")
    results = []
    for (name, callers), runs in rows.items():
        rate, first = (statistics.median(column) for column in zip(*runs, strict=True))
        one, two = (statistics.median(lates[name, ahead]) for ahead in AHEAD)
        times = "".join(f"{1000 * waited:>14.0f}" for waited in (one, two))
        print(f"{name:<18}{callers:>8}{rate:>8.0f}{1000 * first:>10.0f}{times}")
        figures = {"tokens_per_second": rate, "first_token_s": first}
        figures |= {"late_first_token_s": one, "late_behind_two_s": two}
        rounded = {key: round(value, 3) for key, value in figures.items()}
        turns = [round(rate, 3) for rate, _ in runs]
        results.append({"contender": name, "callers": callers, **rounded, "turns": turns})
    machine.write("concurrency", {"settings": vars(given), "rows": results})


if __name__ == "__main__":
    main()
