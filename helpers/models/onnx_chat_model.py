"""A small language model in ONNX as an MLflow model: a prompt in, an answer out.

MLflow copies this one file into the logged model ("models from code"), so it imports nothing of its project.
Written for onnxruntime-genai 0.18. The first part is for reading: what a call may ask, the class that MLflow
calls, and the loop that makes one token after another. The rest is the engine: how a model is opened, how an
answer is kept while it is written, how callers share the loop, and how bad input is refused.
"""

import json
import os
import re
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import mlflow
import numpy as np
import onnxruntime_genai as og
import pandas as pd

og.disable_telemetry_events()


# 1. The contract: what a call may ask, and what a load may.


class Limits(NamedTuple):
    """The default of a setting and, for a number, the lowest and the highest value."""

    default: int | float | str | list
    lowest: float | None = None
    highest: float | None = None


LARGE = 2**31 - 1
PARAMS = {
    "max_new_tokens": Limits(256, 1, LARGE),  # The longest answer, in tokens.
    "temperature": Limits(0.0, 0, 100),  # 0: the likeliest token. Above: sampled.
    "top_p": Limits(1.0, 0, 1),  # Sample among tokens of this total probability.
    "top_k": Limits(50, 0, LARGE),  # Sample among so many tokens; 0: among all.
    "repetition_penalty": Limits(1.0, 0.1, 10),  # Above 1, repetition becomes less likely.
    "seed": Limits(-1, -1, LARGE),  # Equal seeds, equal answers; -1: a new one.
    "stop": Limits([""]),  # Texts that end the answer; "" stands for none.
    "json_schema": Limits(""),  # A schema that a whole answer fits, as text.
}
CONFIG = {
    "threads": Limits(0, 0, 1024),  # CPU threads; 0: one for each usable core.
    "provider": Limits("cpu"),  # Or "cuda", "dml".
    "max_batch_rows": Limits(16, 1, 32),  # onnxruntime-genai takes no more.
    # Rows x (longest prompt + longest answer); 0: what KV_BYTES hold.
    "max_batch_tokens": Limits(0, 0, LARGE),
}
DEFAULT_PARAMS = {name: limits.default for name, limits in PARAMS.items()}
SAMPLING = ("temperature", "top_p", "top_k")


# 2. The class that MLflow calls.


class Phi3Model(mlflow.pyfunc.PythonModel):
    """A prompt in, an answer out. PARAMS lists what a call may ask, CONFIG what a load may."""

    def load_context(self, context) -> None:
        """Load the ONNX folder `context.artifacts["phi3-mini-onnx"]` as `context.model_config` says.

        Raises ValueError for an impossible setting, or a provider that the installed package lacks.
        """
        folder = Path(context.artifacts["phi3-mini-onnx"])
        config = check(context.model_config, CONFIG, "model_config")
        facts = read_json(folder / "genai_config.json")["model"]
        self.vocabulary = facts["vocab_size"]
        self.context_length, window = attention_limits(facts)
        self.model = open_model(folder, config, max(facts["context_length"], window))
        self.tokenizer = og.Tokenizer(self.model)
        self.eos = frozenset(self.tokenizer.eos_token_ids.tolist())
        self.special = special_tokens(folder)
        max_tokens = config["max_batch_tokens"] or KV_BYTES // kv_bytes_per_token(facts["decoder"])
        pad = self.tokenizer.pad_token_id
        self.decoder = Decoder(self.model, pad, config["max_batch_rows"], max_tokens, window)

    def predict(self, context, model_input: pd.DataFrame, params: dict | None = None) -> list[str]:
        """Answer every row's "prompt", in order."""
        with closing(self.generate(read_prompts(model_input), params)) as rows:
            return [row.result().text for row in rows]

    def predict_stream(self, context, model_input: pd.DataFrame, params: dict | None = None) -> Iterator[str]:
        """Yield the answer to one row in pieces that together are what `predict` returns."""
        prompts = read_prompts(model_input)
        if len(prompts) != 1:
            raise ValueError(f"predict_stream answers one row, not {len(prompts)}; predict answers several.")
        with closing(self.generate(prompts, params)) as rows:
            yield from rows[0]

    def generate(self, prompts: list, params: dict | None = None) -> list["Completion"]:
        """Start to answer prompts (strings, or arrays of token ids) in the background, and return at once.

        Raises ValueError, and starts nothing, when a prompt or a parameter is impossible. A greedy answer is
        the same alone and in any batch; with int4, as far as no two tokens are nearly equally likely, for its
        kernel rounds one row otherwise than several (10⁻⁶). Special tokens in a string count as such: see
        `encode_messages`.
        """
        params = self.check_params(params)
        call = object()
        rows = []
        for index, prompt in enumerate(prompts):
            ids = self.encode_prompt(prompt, index, params["max_new_tokens"])
            group = batch_group(ids, params, call, self.decoder)
            # Equal prompts of a seeded call get different answers.
            seed = (params["seed"] + index) % 2**31 if params["seed"] >= 0 else -1
            stream = self.tokenizer.create_stream()
            rows.append(Completion(ids, params | {"seed": seed}, self.eos, stream, call, group))
        self.decoder.submit(rows)
        return rows

    def apply_chat_template(self, messages: list[dict]) -> str:
        """The prompt for [{"role": …, "content": …}, …], by the model's own template, up to the answer."""
        messages = json.dumps(check_messages(messages))
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0].rstrip(":")
            raise ValueError(f"The model's chat template refuses these messages: {reason}.") from None

    def encode_messages(self, messages: list[dict]) -> np.ndarray:
        """The same prompt as token ids, in which special tokens written inside a content stay mere text.

        Such text is cut after its first character, and the parts are encoded one by one.
        """
        cut = uuid.uuid4().hex
        messages = check_messages(messages)
        for message in messages:
            message["content"] = self.special.sub(rf"\g<0>{cut}", message["content"])
        first, *rest = self.apply_chat_template(messages).split(cut)
        # Some tokenizers begin every text with a token or a space of their own. A line feed takes it, and
        # goes with it.
        feed = len(self.tokenizer.encode("\n"))
        parts = [self.tokenizer.encode("\n" + part)[feed:] for part in rest]
        return np.concatenate([self.tokenizer.encode(first), *parts])

    def check_params(self, params: dict | None) -> dict:
        """The parameters of a call, complete; ValueError for an unknown name or an impossible value."""
        params = check(params, PARAMS, "Parameter")
        if params["top_k"] >= self.vocabulary:
            params["top_k"] = 0
        if params["json_schema"]:
            params["json_schema"] = usable_schema(params["json_schema"], self.model)
        return params

    def encode_prompt(self, prompt, index: int, max_new_tokens: int) -> np.ndarray:
        """The token ids of prompt number `index`; ValueError if it is impossible."""
        if isinstance(prompt, np.ndarray) and prompt.ndim == 1 and prompt.dtype.kind in "iu":
            ids = prompt
            if not all(0 <= token < self.vocabulary for token in ids):
                raise ValueError(f"prompt {index} has token ids outside 0 to {self.vocabulary - 1}.")
        else:
            ids = self.tokenizer.encode(check_text(prompt, f"prompt {index}"))
        if not len(ids):
            raise ValueError(f"prompt {index} is empty.")
        room = max(0, self.context_length - max_new_tokens)
        if len(ids) > room:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens; {room} fit: the model's context of "
                f"{self.context_length} less max_new_tokens={max_new_tokens}."
            )
        return ids


# 3. The loop: the same as in a class written in a notebook cell, for several rows at once.


def decode(model: og.Model, rows: list["Completion"], pad: int, window: int) -> Iterator[None]:
    """Decode one batch: each `next` reads a part of the prompts, or makes one token for every row.

    KV memory is reserved for the longest prompt and answer, not for the model's whole context, but at least
    for `window` tokens. onnxruntime-genai pads the rows that have ended until the last one has.
    """
    longest = max(row.prompt_tokens for row in rows)
    longest_answer = max(row.params["max_new_tokens"] for row in rows)
    reserved = max(longest + longest_answer, window)
    generator = og.Generator(model, search_params(model, rows, reserved))

    # Read the prompts. Shorter ones are padded on the right; the runtime finds where they end.
    prompts = np.full((len(rows), longest), pad, np.int32)
    for line, row in zip(prompts, rows, strict=True):
        line[: len(row.ids)] = row.ids
    size = PREFILL_TOKENS if len(rows) == 1 else longest
    for start in range(0, longest, size):
        generator.append_tokens(prompts[:, start : start + size])
        yield
        if all(row.finish_reason for row in rows):
            return

    # Write the answers, one token for every row at a time. `push` says whether its row goes on.
    for step in range(longest_answer):
        generator.generate_next_token()
        tokens = generator.get_next_tokens().tolist()
        going = [row.push(token) for row, token in zip(rows, tokens, strict=True)]
        if not any(going):
            return
        if step == 0:
            # genai holds the interpreter's lock (GIL) while it works. Let readers see the first piece now.
            time.sleep(0.001)
        yield


def search_params(model: og.Model, rows: list["Completion"], reserved: int) -> og.GeneratorParams:
    """How tokens are chosen for a batch. Rows of a batch agree on it: see `batch_group`."""
    first = rows[0].params
    search = og.GeneratorParams(model)
    search.set_search_options(
        batch_size=len(rows),
        max_length=reserved,
        do_sample=first["temperature"] > 0,
        temperature=first["temperature"],
        top_p=first["top_p"],
        top_k=first["top_k"],
        repetition_penalty=first["repetition_penalty"],
        random_seed=first["seed"],
    )
    if first["json_schema"]:
        search.set_guidance("json_schema", first["json_schema"])
    return search


# You can stop reading here. What follows is the engine.


NOUNS = {int: "a whole number", float: "a number", str: "a string", list: "a list of strings"}
PACKAGES = {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-directml"}
ROLES = ("system", "user", "assistant", "tool")
# KV memory of one active batch. A token takes 45 KiB with SmolLM2-135M, 768 KiB with Phi-3-mini.
KV_BYTES = 2 * 2**30
# Keep the decoder thread this many seconds after its last row. A new thread for each call costs 0.5 ms, and
# the C library keeps some memory for each.
IDLE = 1.0
# Batches that are decoded in turn. A caller does not wait for the end of one long answer, but of one of two.
ACTIVE_BATCHES = 2
# A longer prompt is read alone and in parts: genai holds the GIL while it reads, so that nothing else runs.
PREFILL_TOKENS = 256
# A batch is read in one go, so its prompts have at most this many tokens, padding included.
BATCH_PREFILL_TOKENS = 1024


def open_model(folder: Path, config: dict, context_length: int) -> og.Model:
    """Open an ONNX folder with the provider and threads of CONFIG. Raises ValueError for another provider."""
    provider = config["provider"]
    available = {"cpu": True, "cuda": og.is_cuda_available(), "dml": og.is_dml_available()}
    if provider not in available:
        raise ValueError(f"model_config {provider=} is not one of {', '.join(available)}.")
    if not available[provider]:
        raise ValueError(f"{provider=} needs its device, and {PACKAGES[provider]} installed instead.")
    # By default genai 0.18 uses half of the cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    session = {"intra_op_num_threads": config["threads"] or cores}
    settings = og.Config(str(folder))
    decoder = {"session_options": session}
    settings.overlay(json.dumps({"model": {"context_length": context_length, "decoder": decoder}}))
    settings.clear_providers()
    if provider != "cpu":
        settings.append_provider(provider)
    return og.Model(settings)


def read_json(path: Path) -> dict:
    """The content of a JSON file, which is UTF-8 on every system."""
    return json.loads(path.read_text(encoding="utf-8"))


def attention_limits(facts: dict) -> tuple[int, int]:
    """The most tokens of prompt and answer, and the fewest for which KV memory must be reserved.

    A model with a sliding window is of one of two kinds. If genai_config.json names the window's `layers`
    (Gemma 2), it is part of the graph: texts may be longer, and ONNX Runtime 1.32 wants memory for a whole
    window. If not (Phi-3-mini-4k), genai 0.18 fails past the window, so that is all that fits.
    """
    window = facts["decoder"].get("sliding_window", {})
    size = window.get("window_size", LARGE)
    if window.get("layers"):
        return facts["context_length"], size
    return min(facts["context_length"], size), 0


def kv_bytes_per_token(layers: dict) -> int:
    """Bytes that keys and values of one token take in all layers, as 32-bit numbers."""
    return 4 * 2 * layers["num_hidden_layers"] * layers["num_key_value_heads"] * layers["head_size"]


def special_tokens(folder: Path) -> re.Pattern:
    """Finds the first character of every special token's text."""
    added = read_json(folder / "tokenizer.json")["added_tokens"]
    names = "|".join(re.escape(token["content"]) for token in added if len(token["content"]) > 1)
    return re.compile(rf"(?=(?:{names}))." if names else r"(?!)", re.DOTALL)


@dataclass(eq=False)
class Completion:
    """One row's answer while it is made: iterate for its text piece by piece, or wait for `result()`."""

    ids: np.ndarray = field(repr=False)
    params: dict = field(repr=False)
    eos: frozenset[int] = field(repr=False)  # Token ids that end the answer.
    stream: og.TokenizerStream = field(repr=False)
    call: object = field(repr=False)  # The call of `generate` it belongs to.
    group: tuple = field(repr=False)  # See `batch_group`.
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0  # With the token that ended the answer.
    # "stop", "length", "error", or "closed" after `close()`.
    finish_reason: str | None = None
    time_to_first_token: float | None = None  # Seconds since `generate`.
    seconds: float | None = None  # The same for the whole answer.

    def __post_init__(self):
        self.prompt_tokens = len(self.ids)
        self.started = time.perf_counter()
        self._stop = [text for text in self.params["stop"] if text]
        self._held = ""  # The beginning of a stop text, perhaps.
        self._error = None
        self._pieces = []
        self._news = threading.Condition()
        # A caller who wants the whole answer waits for this event, and so is woken once. To be woken for
        # every piece cost 3 % of the speed on two cores.
        self._ended = threading.Event()

    def __iter__(self) -> Iterator[str]:
        """Yield the text from its beginning, as it is decoded, in whole characters. Leaving early closes."""
        sent = 0
        try:
            while self._wait_for_piece(sent):
                yield self._pieces[sent]
                sent += 1
            self.result()
        finally:
            self.close()

    def result(self) -> "Completion":
        """Wait for the end. Raises RuntimeError when decoding failed."""
        self._ended.wait()
        if self._error:
            raise RuntimeError(f"Decoding failed: {self._error}") from self._error
        return self

    def close(self) -> None:
        """End the work, if it still goes on, and keep the text so far."""
        self.advance("", "closed")

    def push(self, token: int) -> bool:
        """Take the row's next token (in the decoder's thread); whether the row goes on."""
        if self.finish_reason:
            return False
        self.completion_tokens += 1
        if self.time_to_first_token is None:
            self.time_to_first_token = time.perf_counter() - self.started
        if token in self.eos:
            return self.advance(self._held, "stop")
        # The stream gives "" until a character is whole.
        text = self._held + self.stream.decode(token)
        stop = first_stop(text, self._stop)
        if stop is not None:
            return self.advance(text[:stop], "stop")
        if self.completion_tokens == self.params["max_new_tokens"]:
            return self.advance(text, "length")
        ready = possible_stop(text, self._stop)
        self._held = text[ready:]
        return self.advance(text[:ready])

    def advance(self, piece: str, reason: str | None = None, error: Exception | None = None) -> bool:
        """Add a piece of text, and end the row if there is a reason to; whether the row goes on."""
        with self._news:
            if self.finish_reason:
                return False
            if piece:
                self._pieces.append(piece)
            if reason:
                self.text = "".join(self._pieces)
                self._error = error
                self.seconds = time.perf_counter() - self.started
                self.finish_reason = reason
                self._ended.set()
            self._news.notify_all()
            return not reason

    def _wait_for_piece(self, sent: int) -> bool:
        """Wait for a piece after `sent` of them, or for the end; whether there is such a piece."""
        with self._news:
            self._news.wait_for(lambda: self.finish_reason or len(self._pieces) > sent)
        return len(self._pieces) > sent


def first_stop(text: str, stops: list[str]) -> int | None:
    """Where the stop text begins that is complete first; None if there is none."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def possible_stop(text: str, stops: list[str]) -> int:
    """Where an end of the text begins that may grow into a stop text; the text's length if there is none."""
    if stops:
        for at in range(len(text)):
            if any(stop.startswith(text[at:]) for stop in stops):
                return at
    return len(text)


class Decoder:
    """Decodes rows in batches, in one thread that lives while there is work, and IDLE seconds more.

    Measured with benchmarks/concurrency.py (8 callers, SmolLM2-135M int4, two cores): tokens per second of
    all, and seconds to the first token for one who comes during a long answer: og.Engine 209 and 1.97; this
    queue 253 and 1.91 with one active batch, 243 and 0.09 with two, 199 and 0.10 with three.
    """

    def __init__(self, model: og.Model, pad: int, max_rows: int, max_tokens: int, window: int = 0):
        self.model = model
        self.pad = pad
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        # Tokens for which KV memory must be reserved at least: see `attention_limits`.
        self.window = window
        # The rows of each call; the first call is next.
        self.waiting: dict[object, list[Completion]] = {}
        self.news = threading.Condition()
        self.running = False

    def submit(self, rows: list[Completion]) -> None:
        """Queue the rows of a call, longest prompt first, and return at once."""
        with self.news:
            for row in sorted(rows, key=lambda row: -row.prompt_tokens):
                self.waiting.setdefault(row.call, []).append(row)
            self.news.notify()
            if self.running:
                return
            try:
                threading.Thread(target=self.run, name="decoder", daemon=True).start()
            except RuntimeError:
                # The system has no thread left, so nobody would decode these rows.
                self.waiting.clear()
                raise
            self.running = True

    def run(self) -> None:
        """Step the active batches in turn until no row is left, and none comes."""
        active = deque()
        while True:
            if len(active) < ACTIVE_BATCHES and self.waiting:
                self.start_batch(active)
            if active:
                self.step(active)
            elif not self.wait_for_rows():
                return

    def start_batch(self, active: deque) -> None:
        """Take rows from the queue and add their batch to the active ones, if there are any to take."""
        busy = {row.call for rows, _ in active for row in rows if not row.finish_reason}
        # Let callers that come together share a batch: wait 1 ms, and again while more come.
        seen = 0
        while (calls := len(set(self.waiting) - busy)) > seen:
            seen = calls
            time.sleep(0.001)
        with self.news:
            rows = self.gather(busy)
        if rows:
            active.append((rows, self.decode(rows)))

    def step(self, active: deque) -> None:
        """Step the batch whose turn it is. If it fails, its rows end with the error."""
        rows, steps = active.popleft()
        try:
            if next(steps, "end") != "end":
                active.append((rows, steps))
        except Exception as error:
            for row in rows:
                # Without its traceback, which would keep the batch's memory.
                row.advance("", "error", error.with_traceback(None))

    def wait_for_rows(self) -> bool:
        """Wait IDLE seconds for rows; whether some came. If none did, `submit` starts the next thread."""
        with self.news:
            self.running = bool(self.news.wait_for(lambda: self.waiting, IDLE))
            return self.running

    def decode(self, rows: list[Completion]) -> Iterator[None]:
        """The steps of one batch."""
        return decode(self.model, rows, self.pad, self.window)

    def gather(self, busy: set) -> list[Completion]:
        """Take from the queue a row of the first call and all that can share its batch; that call goes last.

        The `busy` calls, of which rows are being decoded, wait with the others: the next place is for others.
        """
        taken = []
        for call, rows in self.waiting.items():
            if call in busy:
                continue
            left = []
            for row in rows:
                if row.finish_reason:
                    # It was closed before its turn.
                    continue
                if not taken or self.fits([*taken, row]):
                    taken.append(row)
                else:
                    left.append(row)
            self.waiting[call] = left
        if taken:
            self.waiting[taken[0].call] = self.waiting.pop(taken[0].call)
        self.waiting = {call: rows for call, rows in self.waiting.items() if rows}
        return taken

    def fits(self, rows: list[Completion]) -> bool:
        """Whether the last row can join the others in a batch. They must be of one group: see `batch_group`.

        Rows are padded to the longest prompt, and decoded until the longest answer ends. So neither may more
        than double the work; and reading the prompts, during which all others wait, has its own bound.
        """
        if len(rows) > self.max_rows or rows[-1].group != rows[0].group:
            return False
        prompts = [row.prompt_tokens for row in rows]
        answers = [row.params["max_new_tokens"] for row in rows]
        for sizes in (prompts, answers):
            if len(rows) * max(sizes) > 2 * sum(sizes):
                return False
        reserved = max(max(prompts) + max(answers), self.window)
        if len(rows) * reserved > self.max_tokens:
            return False
        return len(rows) * max(prompts) <= BATCH_PREFILL_TOKENS


def batch_group(ids: np.ndarray, params: dict, call: object, decoder: Decoder) -> tuple:
    """What two rows must have in common to share a batch.

    - All rows of a batch choose their tokens in the same way: greedy, or with equal sampling settings, and
      with an equal repetition penalty.
    - Rows of a batch draw from one stream of random numbers, so rows with a seed only share with their call.
    - A repetition penalty would count the padding as text, and ONNX Runtime 1.32 computes attention with a
      window (see `attention_limits`) only for rows without padding: such prompts have equal lengths.
    - Some rows go alone, because onnxruntime-genai 0.18 raises when a row with a JSON schema ends before its
      batch, and drops pad tokens that end a prompt. A long prompt is read alone, since only then in parts.
    """
    sampling = None
    if params["temperature"] > 0:
        sampling = tuple(params[name] for name in SAMPLING)
    penalty = params["repetition_penalty"]
    length = len(ids) if penalty != 1 or decoder.window else None
    owner = None
    if params["json_schema"] or ids[-1] == decoder.pad or len(ids) > PREFILL_TOKENS:
        owner = object()
    elif sampling and params["seed"] >= 0:
        owner = call
    return owner, sampling, penalty, length


def check(given: dict | None, table: dict[str, Limits], kind: str) -> dict:
    """The defaults of a table, updated by what is given (None: not given).

    Raises ValueError for an unknown name, or a value of the wrong type or outside its range.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    if unknown := sorted(given.keys() - table.keys()):
        raise ValueError(f"{kind} {', '.join(unknown)} is not one of {', '.join(table)}.")
    checked = {name: check_value(value, table[name], f"{kind} {name}") for name, value in given.items()}
    return {name: limits.default for name, limits in table.items()} | checked


def check_value(value, limits: Limits, what: str):
    """The value as plain Python, if it is within its limits; ValueError otherwise."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    kind = type(limits.default)
    if kind is float:
        fits = isinstance(value, int | float)
    elif kind is list:
        fits = isinstance(value, list) and all(isinstance(text, str) for text in value)
    else:
        fits = isinstance(value, kind)
    between = ""
    if limits.lowest is not None:
        fits = fits and not isinstance(value, bool) and limits.lowest <= value <= limits.highest
        between = f" from {limits.lowest} to {limits.highest}"
    if not fits:
        raise ValueError(f"{what}={value!r:.80} is not {NOUNS[kind]}{between}.")
    return value


def usable_schema(json_schema: str, model: og.Model) -> str:
    """The schema as it is handed to the runtime; ValueError if the runtime cannot use it."""
    try:
        # Fixed white space: a weak model would fill its answer with line feeds.
        schema = {"x-guidance": {"whitespace_flexible": False}, **json.loads(json_schema)}
        usable = json.dumps(schema)
        search = og.GeneratorParams(model)
        search.set_search_options(max_length=1)
        search.set_guidance("json_schema", usable)
        og.Generator(model, search)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"Parameter json_schema is not a usable JSON schema: {error}.") from None
    return usable


def check_text(text, what: str) -> str:
    """The text, if it is one that a tokenizer takes whole; ValueError otherwise."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is {text!r:.80}, not a string.")
    if re.search("[\0\ud800-\udfff]", text):
        raise ValueError(f"{what} has a NUL character or half a surrogate pair: {text!r:.80}.")
    return text


def check_messages(messages: list[dict]) -> list[dict]:
    """Roles and contents of chat messages; ValueError if one lacks them."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages={messages!r:.80} is not a list of messages.")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"Message {number}, {message!r:.80}, has a role outside {', '.join(ROLES)}.")
        check_text(message.get("content"), f"The content of message {number}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def read_prompts(model_input) -> list:
    """The prompts of a DataFrame, a dict or a list of dicts; a cell may hold a list (MLflow makes such)."""
    if isinstance(model_input, dict):
        model_input = [model_input]
    try:
        if isinstance(model_input, pd.DataFrame):
            cells = model_input["prompt"]
        else:
            cells = [row["prompt"] for row in model_input]
    except (KeyError, TypeError):
        raise ValueError('The input has no "prompt": send {"prompt": "..."}.') from None
    if isinstance(cells, pd.DataFrame):
        raise ValueError(f'The input has {cells.shape[1]} columns "prompt": send one.')
    prompts = []
    for cell in cells:
        prompts.extend(cell if isinstance(cell, list | tuple | np.ndarray) else [cell])
    return prompts


@contextmanager
def closing(rows: list[Completion]) -> Iterator[list[Completion]]:
    """Close the rows at the end, however it comes, and count their tokens in the span around it, if any."""
    span = mlflow.get_current_active_span()
    try:
        yield rows
    finally:
        for row in rows:
            row.close()
        if span:
            usage = Counter(span.get_attribute("mlflow.chat.tokenUsage") or {})
            for row in rows:
                used = {"input_tokens": row.prompt_tokens, "output_tokens": row.completion_tokens}
                usage.update(used | {"total_tokens": sum(used.values())})
            span.set_attribute("mlflow.chat.tokenUsage", dict(usage))


mlflow.models.set_model(Phi3Model())
