"""A small language model in ONNX as an MLflow model: many rows, streams, and many callers at once.

MLflow copies this one file into the logged model ("models from code"): it imports nothing from its project.

`Phi3Model` reads and checks what a caller asks; each row becomes a `Completion`, the answer while it is made;
one `Decoder` thread decodes the rows of all callers in batches. `predict` and `predict_stream` both read
Completions, so that a stream and a whole answer are the same. Written for onnxruntime-genai 0.18.
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

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import mlflow
import numpy as np
import onnxruntime_genai as og
import pandas as pd

og.disable_telemetry_events()

LARGE = 2**31 - 1
PARAMS = {  # what a call may ask: the default, then the lowest and the highest value of a number
    "max_new_tokens": (256, 1, LARGE),  # longest answer, in tokens
    "temperature": (0.0, 0, 100),  # 0: greedy, the likeliest token each time; above: sampled
    "top_p": (1.0, 0, 1),  # sample among the likeliest tokens that together have this probability
    "top_k": (50, 0, LARGE),  # sample among this many of the likeliest tokens; 0: all
    "repetition_penalty": (1.0, 0.1, 10),  # above 1: what the text already holds becomes less likely
    "seed": (-1, -1, LARGE),  # the same call with the same seed gives the same answers; -1: new ones
    "stop": ([""],),  # the answer ends before the first of these texts; "" stands for none
    "json_schema": ("",),  # a JSON schema, as a string, which the answer fits unless it was cut ("length")
}
CONFIG = {  # `model_config` when logging or loading, in the same way
    "threads": (0, 0, 1024),  # CPU threads; 0: every core that this process may use
    "provider": ("cpu",),  # or "cuda", "dml"
    "max_batch_rows": (16, 1, 1024),
    "max_batch_tokens": (0, 0, LARGE),  # rows x (longest prompt + longest answer); 0: what KV_BYTES hold
}
DEFAULT_PARAMS = {name: default for name, (default, *_) in PARAMS.items()}
NOUNS = {int: "a whole number", float: "a number", str: "a string", list: "a list of strings"}
PACKAGES = {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-directml"}
SAMPLING = ("temperature", "top_p", "top_k")
ROLES = ("system", "user", "assistant", "tool")
KV_BYTES = 2 * 2**30  # for each active batch; a token takes 45 KiB with SmolLM2-135M, 768 KiB with Phi-3-mini
IDLE = 1.0  # seconds; a thread for each call would cost it half a millisecond, and memory that grows
ACTIVE_BATCHES = 2  # decoded in turn: behind one long answer nobody waits; behind two, until one of them ends
PREFILL_TOKENS = 256  # a longer prompt is read alone and in parts: genai holds the GIL while it reads
BATCH_PREFILL_TOKENS = 1024  # a batch must be read in one go: at most so many tokens, with their padding


@dataclass(eq=False)
class Completion:
    """One row's answer while it is made: iterate for its text piece by piece, or wait for `result()`."""

    ids: np.ndarray = field(repr=False)
    params: dict = field(repr=False)
    eos: frozenset[int] = field(repr=False)
    stream: og.TokenizerStream = field(repr=False)
    call: object = field(repr=False)  # the call of `generate` that it belongs to
    group: tuple = field(repr=False)  # rows of equal groups can share a batch
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0  # with the token that ended the answer
    finish_reason: str | None = None  # "stop", "length", "error", or "closed" after `close()`
    time_to_first_token: float | None = None  # seconds since `generate`, with the wait for a turn
    seconds: float | None = None  # the same for the whole answer

    def __post_init__(self):
        self.prompt_tokens, self.started = len(self.ids), time.perf_counter()
        self._stop, self._held, self._error = [text for text in self.params["stop"] if text], "", None
        self._pieces, self._news = [], threading.Condition()

    def __iter__(self) -> Iterator[str]:
        """Yield the text from its beginning, as it is decoded, in whole characters. Leaving early closes."""
        sent = 0
        try:
            while self.wait(sent):
                yield self._pieces[sent]
                sent += 1
            self.result()
        finally:
            self.close()

    def result(self) -> "Completion":
        """Wait for the end. Raises RuntimeError when decoding failed."""
        self.wait()
        if self._error:
            raise RuntimeError(f"Decoding failed: {self._error}") from self._error
        return self

    def wait(self, sent: int = LARGE) -> bool:
        """Wait for a piece after `sent` of them, or for the end; whether there is such a piece."""
        with self._news:
            self._news.wait_for(lambda: self.finish_reason or len(self._pieces) > sent)
        return len(self._pieces) > sent

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
        self._held += self.stream.decode(token)  # "" until a character is whole
        if ends := [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]:
            return self.advance(self._held[: min(ends)[1]], "stop")
        if self.completion_tokens == self.params["max_new_tokens"]:
            return self.advance(self._held, "length")
        # What may be the beginning of a stop text waits for the next token.
        held = self._held
        tails = (at for at in range(len(held)) if any(stop.startswith(held[at:]) for stop in self._stop))
        ready = next(tails, len(held))
        self._held = held[ready:]
        return self.advance(held[:ready])

    def advance(self, piece: str, reason: str | None = None, error: Exception | None = None) -> bool:
        """Add a piece of text, and end the row if there is a reason to; whether the row goes on."""
        with self._news:
            if self.finish_reason is None:
                if piece:
                    self._pieces.append(piece)
                if reason:
                    self.text, self._error = "".join(self._pieces), error
                    self.seconds, self.finish_reason = time.perf_counter() - self.started, reason
                self._news.notify_all()
            return self.finish_reason is None


class Decoder:
    """Decodes rows in batches, in one thread that lives while there is work, and IDLE seconds more.

    Measured with benchmarks/concurrency.py (8 callers, SmolLM2-135M int4, two cores): tokens per second of
    all, and seconds to the first token for one who comes during a long answer: og.Engine 209 and 1.97; this
    queue 253 and 1.91 with one active batch, 243 and 0.09 with two, 199 and 0.10 with three.
    """

    def __init__(self, model: og.Model, pad: int, max_rows: int, max_tokens: int):
        self.model, self.pad, self.max_rows, self.max_tokens = model, pad, max_rows, max_tokens
        self.waiting: dict[object, list[Completion]] = {}  # the rows of each call; the first call is next
        self.news, self.running = threading.Condition(), False

    def submit(self, rows: list[Completion]) -> None:
        """Queue the rows of a call, longest prompt first, and return at once."""
        with self.news:
            for row in sorted(rows, key=lambda row: -row.prompt_tokens):
                self.waiting.setdefault(row.call, []).append(row)
            self.news.notify()
            if not self.running:
                try:
                    threading.Thread(target=self.run, name="decoder", daemon=True).start()
                except RuntimeError:  # the system has no thread left: nobody would come for these rows
                    self.waiting.clear()
                    raise
                self.running = True

    def run(self) -> None:
        """Step the active batches in turn until no row is left, and none comes."""
        active = deque()
        while True:
            if len(active) < ACTIVE_BATCHES:
                busy = {row.call for rows, _ in active for row in rows if not row.finish_reason}
                self.wait_for_company(busy)
                with self.news:
                    if rows := self.gather(busy):
                        active.append((rows, self.decode(rows)))
                    elif not active:
                        if self.news.wait_for(lambda: self.waiting, IDLE):
                            continue
                        self.running = False
                        return
            rows, steps = active.popleft()
            try:
                if next(steps, "end") != "end":
                    active.append((rows, steps))
            except Exception as error:
                for row in rows:  # without its traceback, which would keep the batch's memory
                    row.advance("", "error", error.with_traceback(None))

    def wait_for_company(self, busy: set) -> None:
        """Let callers that come together share a batch: wait 1 ms, and on while more come."""
        seen = 0
        while (calls := len(set(self.waiting) - busy)) > seen:
            seen = calls
            time.sleep(0.001)

    def gather(self, busy: set) -> list[Completion]:
        """Take from the queue a row of the first call and all that can share its batch; that call goes last.

        The `busy` calls, of which rows are being decoded, wait with the others: the next place is for others.
        """
        taken = []
        for call, rows in self.waiting.items():
            if call not in busy:
                self.waiting[call] = left = []
                for row in (row for row in rows if not row.finish_reason):
                    (taken if not taken or self.fit([*taken, row]) else left).append(row)
        if taken:
            self.waiting[taken[0].call] = self.waiting.pop(taken[0].call)
        self.waiting = {call: rows for call, rows in self.waiting.items() if rows}
        return taken

    def fit(self, rows: list[Completion]) -> bool:
        """Whether rows can share a batch: one group, within the bounds, padding no more than half of it."""
        if len(rows) > self.max_rows or rows[-1].group != rows[0].group:
            return False
        prompts = [row.prompt_tokens for row in rows]
        limits = [row.params["max_new_tokens"] for row in rows]
        if any(len(rows) * max(sizes) > 2 * sum(sizes) for sizes in (prompts, limits)):
            return False
        reserved = len(rows) * (max(prompts) + max(limits))
        return reserved <= self.max_tokens and len(rows) * max(prompts) <= BATCH_PREFILL_TOKENS

    def decode(self, rows: list[Completion]) -> Iterator[None]:
        """Decode one batch: each `next` reads a part of the prompt, or makes one token for every row.

        KV memory is reserved for the longest prompt and answer, not for the model's context. genai pads the
        rows that have ended until the last one has.
        """
        first, longest = rows[0].params, max(row.prompt_tokens for row in rows)
        longest_answer = max(row.params["max_new_tokens"] for row in rows)
        options = {name: first[name] for name in (*SAMPLING, "repetition_penalty")}
        options |= {"do_sample": first["temperature"] > 0, "random_seed": first["seed"]}
        search = og.GeneratorParams(self.model)
        search.set_search_options(batch_size=len(rows), max_length=longest + longest_answer, **options)
        if first["json_schema"]:
            search.set_guidance("json_schema", first["json_schema"])
        generator = og.Generator(self.model, search)
        prompts = np.full((len(rows), longest), self.pad, np.int32)
        for line, row in zip(prompts, rows, strict=True):
            line[: len(row.ids)] = row.ids
        size = PREFILL_TOKENS if len(rows) == 1 else longest
        for start in range(0, longest, size):
            generator.append_tokens(prompts[:, start : start + size])
            yield
            if all(row.finish_reason for row in rows):
                return
        for step in range(longest_answer):
            generator.generate_next_token()
            tokens = generator.get_next_tokens().tolist()
            going = [row.push(token) for row, token in zip(rows, tokens, strict=True)]
            if not any(going):
                return
            if step == 0:
                time.sleep(0.001)  # genai holds the GIL while it decodes: let readers see the first piece now
            yield


class Phi3Model(mlflow.pyfunc.PythonModel):
    """A prompt in, an answer out. PARAMS lists what a call may ask, CONFIG what a load may."""

    def load_context(self, context) -> None:
        """Load the ONNX folder `context.artifacts["phi3-mini-onnx"]` as `context.model_config` says.

        Raises ValueError for an impossible setting, or a provider that the installed package lacks.
        """
        config = check(context.model_config, CONFIG, "model_config")
        folder, provider = Path(context.artifacts["phi3-mini-onnx"]), config["provider"]
        available = {"cpu": True, "cuda": og.is_cuda_available(), "dml": og.is_dml_available()}
        if provider not in available:
            raise ValueError(f"model_config {provider=} is not one of {', '.join(available)}.")
        if not available[provider]:
            raise ValueError(f"{provider=} needs its device, and {PACKAGES[provider]} installed instead.")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        session = {"intra_op_num_threads": config["threads"] or cores}
        settings = og.Config(str(folder))
        settings.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        settings.clear_providers()
        if provider != "cpu":
            settings.append_provider(provider)
        self.model = og.Model(settings)
        self.tokenizer = og.Tokenizer(self.model)
        facts = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
        layers, self.vocabulary = facts["decoder"], facts["vocab_size"]
        self.eos = frozenset(self.tokenizer.eos_token_ids.tolist())
        # genai 0.18 fails past a sliding window (Phi-3-mini-4k: 2,047 tokens), so that is all that fits.
        window = layers.get("sliding_window", {}).get("window_size", LARGE)
        self.context_length = min(facts["context_length"], window)
        kv_values = 2 * layers["num_hidden_layers"] * layers["num_key_value_heads"] * layers["head_size"]
        max_tokens = config["max_batch_tokens"] or KV_BYTES // (4 * kv_values)
        self.decoder = Decoder(self.model, self.tokenizer.pad_token_id, config["max_batch_rows"], max_tokens)
        added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
        special = "|".join(re.escape(token["content"]) for token in added if len(token["content"]) > 1)
        self.special = re.compile(rf"(?=(?:{special}))." if special else r"(?!)", re.DOTALL)

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

    def generate(self, prompts: list, params: dict | None = None) -> list[Completion]:
        """Start to answer prompts (strings, or arrays of token ids) in the background, and return at once.

        Raises ValueError, and starts nothing, when a prompt or a parameter is impossible. A greedy answer is
        the same alone and in any batch. Special tokens in a string count as such: see `encode_messages`.
        """
        params, call, rows = self.check_params(params), object(), []
        sampling = params["temperature"] > 0 and [params[name] for name in SAMPLING]
        for index, prompt in enumerate(prompts):
            ids = self.encode_prompt(prompt, index, params["max_new_tokens"])
            # In a batch, genai fails when a constrained row ends, and skips pad tokens that end a prompt.
            alone = params["json_schema"] or ids[-1] == self.decoder.pad or len(ids) > PREFILL_TOKENS
            # Rows of a batch draw from one stream of random numbers: a seeded call needs its own.
            owner = object() if alone else call if sampling and params["seed"] >= 0 else None
            penalty = params["repetition_penalty"]
            group = (owner, sampling, penalty, penalty != 1 and len(ids))  # a penalty would count the padding
            row = params | {"seed": (params["seed"] + index) % 2**31 if params["seed"] >= 0 else -1}
            rows.append(Completion(ids, row, self.eos, self.tokenizer.create_stream(), call, group))
        self.decoder.submit(rows)
        return rows

    def check_params(self, params: dict | None) -> dict:
        """The parameters of a call, complete; ValueError for an unknown name or an impossible value."""
        params = check(params, PARAMS, "Parameter")
        params["top_k"] = params["top_k"] if params["top_k"] < self.vocabulary else 0
        if params["json_schema"]:
            try:
                # Fixed white space: a weak model would fill its answer with line feeds.
                schema = {"x-guidance": {"whitespace_flexible": False}, **json.loads(params["json_schema"])}
                params["json_schema"] = json.dumps(schema)
                search = og.GeneratorParams(self.model)
                search.set_search_options(max_length=1)
                search.set_guidance("json_schema", params["json_schema"])
                og.Generator(self.model, search)
            except (ValueError, TypeError, RuntimeError) as error:
                raise ValueError(f"Parameter json_schema is not a usable JSON schema: {error}.") from None
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
        if len(ids) > (room := max(0, self.context_length - max_new_tokens)):
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens; {room} fit: the model's context of "
                f"{self.context_length} less max_new_tokens={max_new_tokens}."
            )
        return ids

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
        cut, messages = uuid.uuid4().hex, check_messages(messages)
        for message in messages:
            message["content"] = self.special.sub(rf"\g<0>{cut}", message["content"])
        first, *rest = self.apply_chat_template(messages).split(cut)
        # Some tokenizers begin every text with a token or space of their own: let it go with a line feed.
        feed = len(self.tokenizer.encode("\n"))
        parts = [self.tokenizer.encode("\n" + part)[feed:] for part in rest]
        return np.concatenate([self.tokenizer.encode(first), *parts])


def check(given: dict | None, table: dict, kind: str) -> dict:
    """The defaults of a table, updated by what is given (None: not given).

    Raises ValueError for an unknown name, or a value of the wrong type or outside its range.
    """
    values = {name: value for name, value in (given or {}).items() if value is not None}
    if unknown := sorted(values.keys() - table.keys()):
        raise ValueError(f"{kind} {', '.join(unknown)} is not one of {', '.join(table)}.")
    for name, value in values.items():
        default, *limits = table[name]
        if isinstance(value, np.generic | np.ndarray):
            values[name] = value = value.tolist()
        wanted = int | float if isinstance(default, float) else type(default)
        fits = isinstance(value, wanted) and not isinstance(value, bool)
        if isinstance(value, list):
            fits = fits and all(isinstance(text, str) for text in value)
        if not fits or (limits and not limits[0] <= value <= limits[1]):
            between = " from {} to {}".format(*limits) if limits else ""
            raise ValueError(f"{kind} {name}={value!r:.80} is not {NOUNS[type(default)]}{between}.")
    return {name: default for name, (default, *_) in table.items()} | values


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
        table = isinstance(model_input, pd.DataFrame)
        cells = model_input["prompt"] if table else [row["prompt"] for row in model_input]
    except (KeyError, TypeError):
        raise ValueError('The input has no "prompt": send {"prompt": "..."}.') from None
    if isinstance(cells, pd.DataFrame):
        raise ValueError(f'The input has {cells.shape[1]} columns "prompt": send one.')
    lists = (cell if isinstance(cell, list | tuple | np.ndarray) else [cell] for cell in cells)
    return [prompt for prompts in lists for prompt in prompts]


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
