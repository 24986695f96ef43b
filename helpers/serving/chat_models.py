"""One interface over the registered models: `start(messages, params)` returns a completion to iterate.

A completion yields pieces of text while they are decoded; afterwards it has `prompt_tokens`,
`completion_tokens` and `finish_reason`; `close()` ends its work early, with the reason "closed".
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

OPTIONS = ("max_new_tokens", "repetition_penalty", "temperature", "top_p", "top_k")


@dataclass(frozen=True)
class ServedModel:
    """What the front tells about a model; it is sent from one process to another."""

    name: str  # of the registered model, or the last part of another URI
    version: str  # "" where the model is not registered
    model_id: str
    system_message: str | None  # prepended where a request has no system turn

    @property
    def full_name(self) -> str:
        """Name and version, as in `slm-onnx/1`."""
        return f"{self.name}/{self.version}" if self.version else self.name


class ContextLengthError(ValueError):
    """A prompt and an answer that do not fit the model together, as OpenAI's API words and marks it."""

    code, param = "context_length_exceeded", "messages"

    def __init__(self, read: int, written: int, context: int):
        super().__init__(
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{read + written} tokens ({read} in the messages, {written} in max_tokens). "
            "Shorten the messages, or ask for fewer max_tokens."
        )


def load(model_uri: str) -> tuple[ServedModel, OnnxChat | TransformersChat]:
    """Load a model from the registry, or from any other URI that MLflow knows.

    What can be served is what can be decoded token by token: a Transformers text-generation pipeline, or a
    class with the `generate` and `encode_messages` of `onnx_chat_model.py`. A class with `predict` alone has
    neither a chat template nor a count of its tokens.

    Raises:
        ValueError: for another model.
        mlflow.exceptions.MlflowException: if there is no such model, or it cannot be loaded.
    """
    import mlflow
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    asked, name, version = model_uri, model_uri.rstrip("/").rpartition("/")[2], ""
    if re.fullmatch(r"models:/[^/@]+[/@].+", model_uri):
        # Once, so that what is loaded is what is told, even if the alias moves meanwhile.
        name, version = get_model_name_and_version(mlflow.MlflowClient(), model_uri)
        model_uri = f"models:/{name}/{version}"
    info = mlflow.models.get_model_info(model_uri)
    served = ServedModel(name, version, info.model_id or "", (info.metadata or {}).get("system_message"))
    if "python_model" in info.flavors.get("python_function", {}):
        raise ValueError(
            f"{asked} is a pickled Python class, and a pickle runs any code that is in it. "
            "Log the class as a file: log_model(python_model='my_model.py')."
        )
    if "transformers" in info.flavors:
        config = info.flavors["python_function"].get("config") or {}
        return served, TransformersChat(mlflow.transformers.load_model(model_uri), config)
    model, wrapper = mlflow.pyfunc.load_model(model_uri), None
    with contextlib.suppress(mlflow.MlflowException):  # a flavour without a Python model
        wrapper = model.unwrap_python_model()
    if not all(hasattr(wrapper, name) for name in ("generate", "encode_messages")):
        raise ValueError(
            f"{asked} has no generate and encode_messages, and is no Transformers pipeline, so it cannot "
            f"be served as chat. Serve it with: mlflow models serve --model-uri {asked}"
        )
    return served, OnnxChat(wrapper)


class OnnxChat:
    """The wrapper of `onnx_chat_model.py`: its own thread decodes concurrent callers in shared batches."""

    def __init__(self, wrapper: Any):
        self._wrapper = wrapper

    def start(self, messages: list[dict], params: dict) -> Any:
        """Begin an answer. Raises ValueError for what the model cannot do, such as too long a prompt."""
        ids = self._wrapper.encode_messages(messages)
        try:
            return self._wrapper.generate([ids], params)[0]
        except ValueError:
            self._refuse_too_long(len(ids), params)
            raise

    def _refuse_too_long(self, read: int, params: dict) -> None:
        """Say so to an OpenAI client, if that is what was refused. A class of your own need not know it."""
        with contextlib.suppress(AttributeError):
            written = params.get("max_new_tokens") or self._wrapper.check_params({})["max_new_tokens"]
            if read + written > (context := self._wrapper.context_length):
                raise ContextLengthError(read, written, context) from None


class TransformersChat:
    """A Transformers text-generation pipeline: one answer after another, in the order they were asked.

    Args:
        defaults: the logged `model_config`; of it, what a request may say is used where one does not say it.
    """

    def __init__(self, pipeline: Any, defaults: dict):
        self.model, self.tokenizer = pipeline.model, pipeline.tokenizer
        self.defaults = {"max_new_tokens": 256, "temperature": 0.0}
        self.defaults |= {name: value for name, value in defaults.items() if name in OPTIONS}
        self.turns = ThreadPoolExecutor(1)

    def start(self, messages: list[dict], params: dict) -> PipelineCompletion:
        """Begin an answer. Raises ValueError for what the model cannot do, such as too long a prompt."""
        if params.get("json_schema"):
            raise ValueError(
                "response_format needs the ONNX model (slm-onnx): this one cannot follow a schema."
            )
        params = self.defaults | params
        ids = self.encode_messages(messages)
        context = self.model.config.get_text_config().max_position_embeddings
        if len(ids) + params["max_new_tokens"] > context:
            raise ContextLengthError(len(ids), params["max_new_tokens"], context)
        return PipelineCompletion(self, ids, params)

    def encode_messages(self, messages: list[dict]) -> list[int]:
        """The prompt's token ids by the model's own template; contents never become special tokens."""
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        if not any(token in message["content"] for message in messages for token in special):
            return self._encode(self._render(messages))
        # Render with marks in place of the contents, and encode these as mere text.
        mark = uuid.uuid4().hex
        marked = [message | {"content": f"{mark}{i}{mark}"} for i, message in enumerate(messages)]
        around = self._render(marked).split(mark)
        contents = [messages[int(i)]["content"] for i in around[1::2]]
        around[1::2] = [""] * len(contents)
        ids = [self._encode(text) for text in around]
        ids[1::2] = [self._encode(text, split_special_tokens=True) for text in contents]
        return [token for part in ids for token in part]

    def _render(self, messages: list[dict]) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"The model's chat template refuses these messages: {reason}.") from None

    def _encode(self, text: str, **options: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]


class PipelineCompletion:
    """One answer of a pipeline, decoded in the pipeline's thread when its turn has come."""

    def __init__(self, chat: TransformersChat, ids: list[int], params: dict):
        self.prompt_tokens, self.completion_tokens, self.finish_reason = len(ids), 0, None
        self._closed = threading.Event()
        self._pieces: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
        self._stop = [text for text in params.get("stop") or [] if text]
        chat.turns.submit(self._decode, chat, ids, params)

    def __iter__(self) -> Iterator[str]:
        """Yield the text as it is decoded, up to the first stop text. Raises what decoding raised."""
        held = ""
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            held += piece
            ends = [(at + len(text), at) for text in self._stop if (at := held.find(text)) >= 0]
            if ends:
                held, self.finish_reason = held[: min(ends)[1]], "stop"
                self.close()
                break
            tails = (at for at in range(len(held)) if any(text.startswith(held[at:]) for text in self._stop))
            ready = next(tails, len(held))
            yield held[:ready]
            held = held[ready:]
        yield held

    def close(self) -> None:
        """End the work at the next token."""
        self._closed.set()

    def _decode(self, chat: TransformersChat, ids: list[int], params: dict) -> None:
        try:
            if self._closed.is_set():
                self.finish_reason = "closed"
            else:
                self._generate(chat, ids, params)
        except Exception as error:
            self._pieces.put(error)
        self._pieces.put(None)

    def _generate(self, chat: TransformersChat, ids: list[int], params: dict) -> None:
        import torch
        from transformers import TextStreamer

        completion = self

        class Pieces(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                completion._pieces.put(text)

        def stopping(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            completion.completion_tokens = input_ids.shape[1] - len(ids)
            return torch.full((1,), completion._closed.is_set())

        sample = params["temperature"] > 0
        names = OPTIONS if sample else ("max_new_tokens", "repetition_penalty")
        options = {name: params[name] for name in names if name in params}
        if "seed" in params:
            torch.manual_seed(params["seed"])  # of this process, where nothing else draws
        prompt = torch.tensor([ids])
        output = chat.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=Pieces(chat.tokenizer, skip_prompt=True, skip_special_tokens=True),
            stopping_criteria=[stopping],
            do_sample=sample,
            **options,
        )
        self.completion_tokens = output.shape[1] - len(ids)
        ended = output[0, -1].item() in np.atleast_1d(chat.model.generation_config.eos_token_id)
        reason = "stop" if ended else "closed" if self._closed.is_set() else "length"
        self.finish_reason = self.finish_reason or reason
