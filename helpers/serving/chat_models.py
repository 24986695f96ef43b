"""The registered models that can be served as chat: `load` gives a function that starts an answer.

`start(messages, params)` returns a completion. It raises ApiError for too long a prompt, and ValueError for
what else the model cannot do. A completion yields pieces of text while they are decoded; afterwards it has
`prompt_tokens`, `completion_tokens` and `finish_reason`. Its `close()` ends the work early, with the reason
"closed".
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.models import logged
from helpers.serving.chat_request import ApiError

OPTIONS = ("max_new_tokens", "repetition_penalty", "temperature", "top_p", "top_k")
Start = Callable[[list[dict], dict], Any]


@dataclass(frozen=True)
class ServedModel:
    """What the server knows of a model."""

    name: str  # Of the registered model, or the last part of another URI.
    version: str  # "" where the model is not registered.
    model_id: str
    system_message: str | None  # Prepended where a request has no system turn.

    @property
    def full_name(self) -> str:
        """Name and version, as in `slm-onnx/1`."""
        return f"{self.name}/{self.version}" if self.version else self.name


def refuse_too_long(read: int, written: int, context: int) -> None:
    """Refuse a prompt and an answer that do not fit the model together, in the words of OpenAI's API."""
    if read + written > context:
        message = (
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{read + written} tokens ({read} in the messages, {written} in max_tokens). "
            "Shorten the messages, or ask for fewer max_tokens."
        )
        raise ApiError(400, message, code="context_length_exceeded", param="messages")


def load(model_uri: str) -> tuple[ServedModel, Start]:
    """Load a model from the registry, or from any other URI that MLflow knows.

    What can be served is what can be decoded token by token: a Transformers text-generation pipeline, or a
    class with the `generate` and `encode_messages` of `onnx_chat_model.py`. A class with `predict` alone has
    neither a chat template nor a count of its tokens.

    Raises:
        ValueError: for another model.
        errors.StoreFault: if the model's files are gone from the store.
        errors.ModelUnavailable: if it would be read with pickle.
        mlflow.exceptions.MlflowException: if there is no such model, or it cannot be loaded.
    """
    import mlflow

    # MLflow 3.17 has no public function that tells the version of an alias or of `latest`.
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    asked = model_uri
    name = model_uri.rstrip("/").rpartition("/")[2]
    version = ""
    if re.fullmatch(r"models:/[^/@]+[/@].+", model_uri):
        # An alias is looked up once, so that the version that is reported is the one that is loaded.
        name, version = get_model_name_and_version(mlflow.MlflowClient(), model_uri)
        model_uri = f"models:/{name}/{version}"
    logged.check(model_uri)
    info = mlflow.models.get_model_info(model_uri)
    served = ServedModel(name, version, info.model_id or "", (info.metadata or {}).get("system_message"))
    if "transformers" in info.flavors:
        config = info.flavors["python_function"].get("config") or {}
        return served, PipelineChat(mlflow.transformers.load_model(model_uri), config).start
    model = mlflow.pyfunc.load_model(model_uri)
    wrapper = None
    with contextlib.suppress(mlflow.MlflowException):  # A flavour without a Python model.
        wrapper = model.unwrap_python_model()
    if not all(hasattr(wrapper, method) for method in ("generate", "encode_messages")):
        raise ValueError(
            f"{asked} has no generate and encode_messages, and is no Transformers pipeline, so it cannot "
            f"be served as chat. Serve it with: mlflow models serve --model-uri {asked}"
        )
    return served, functools.partial(_start_onnx, wrapper)


def _start_onnx(wrapper: Any, messages: list[dict], params: dict) -> Any:
    """Begin an answer of `onnx_chat_model.py`, whose own thread decodes concurrent callers in batches."""
    ids = wrapper.encode_messages(messages)
    with contextlib.suppress(AttributeError):  # A class of your own need not know its context.
        context = wrapper.context_length
        written = params.get("max_new_tokens") or wrapper.check_params({})["max_new_tokens"]
        refuse_too_long(len(ids), written, context)
    return wrapper.generate([ids], params)[0]


class PipelineChat:
    """A Transformers text-generation pipeline: one answer after another, in the order they were asked.

    Args:
        defaults: the logged `model_config`; it counts where a request does not say otherwise.
    """

    def __init__(self, pipeline: Any, defaults: dict):
        self.model = pipeline.model
        self.tokenizer = pipeline.tokenizer
        self.defaults = {"max_new_tokens": 256, "temperature": 0.0}
        self.defaults |= {name: value for name, value in defaults.items() if name in OPTIONS}
        self.queue = ThreadPoolExecutor(1)

    def start(self, messages: list[dict], params: dict) -> PipelineCompletion:
        """Begin an answer."""
        if params.get("json_schema"):
            raise ValueError(
                "response_format needs the ONNX model (slm-onnx): this one cannot follow a schema."
            )
        params = self.defaults | params
        ids = self.encode_messages(messages)
        context = self.model.config.get_text_config().max_position_embeddings
        refuse_too_long(len(ids), params["max_new_tokens"], context)
        return PipelineCompletion(self, ids, params)

    def encode_messages(self, messages: list[dict]) -> list[int]:
        """The prompt's token ids by the model's own template; contents never become special tokens."""
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        if not any(token in message["content"] for message in messages for token in special):
            return self._encode(self._render(messages))
        # Render with marks in place of the contents, and encode these as mere text.
        mark = uuid.uuid4().hex
        marked = [message | {"content": f"{mark}{i}{mark}"} for i, message in enumerate(messages)]
        ids = []
        for part, text in enumerate(self._render(marked).split(mark)):
            if part % 2:
                ids += self._encode(messages[int(text)]["content"], split_special_tokens=True)
            else:
                ids += self._encode(text)
        return ids

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

    def __init__(self, chat: PipelineChat, ids: list[int], params: dict):
        from transformers import TextIteratorStreamer

        self.prompt_tokens = len(ids)
        self.completion_tokens = 0
        self.finish_reason: str | None = None
        self._closed = threading.Event()
        self._stop = [text for text in params.get("stop") or [] if text]
        self._pieces = TextIteratorStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._decoding = chat.queue.submit(self._decode, chat.model, ids, params)

    def __iter__(self) -> Iterator[str]:
        """Yield the text as it is decoded, up to the first stop text. Raises what decoding raised."""
        from helpers.models.onnx_chat_model import first_stop, possible_stop

        held = ""
        for piece in self._pieces:
            text = held + piece
            stop = first_stop(text, self._stop)
            if stop is not None:
                self.finish_reason = "stop"
                self.close()
                held = text[:stop]
                break
            ready = possible_stop(text, self._stop)
            yield text[:ready]
            held = text[ready:]
        self._decoding.result()
        yield held

    def close(self) -> None:
        """End the work at the next token."""
        self._closed.set()

    def _decode(self, model: Any, ids: list[int], params: dict) -> None:
        reason = "closed"
        try:
            if not self._closed.is_set():
                reason = self._generate(model, ids, params)
        finally:
            self.finish_reason = self.finish_reason or reason
            # Not its `end`, which decodes once more and may fail like the decoding before it.
            self._pieces.text_queue.put(self._pieces.stop_signal)

    def _generate(self, model: Any, ids: list[int], params: dict) -> str:
        """Decode the answer. Returns why it ended."""
        import torch

        def stopping(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            self.completion_tokens = input_ids.shape[1] - len(ids)
            return torch.full((1,), self._closed.is_set())

        sample = params["temperature"] > 0
        names = OPTIONS if sample else ("max_new_tokens", "repetition_penalty")
        if "seed" in params:
            # The generator is this process's own, and nothing else draws from it.
            torch.manual_seed(params["seed"])
        prompt = torch.tensor([ids])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=self._pieces,
            stopping_criteria=[stopping],
            do_sample=sample,
            **{name: params[name] for name in names if name in params},
        )
        self.completion_tokens = output.shape[1] - len(ids)
        if output[0, -1].item() in np.atleast_1d(model.generation_config.eos_token_id):
            return "stop"
        return "closed" if self._closed.is_set() else "length"
