"""What a chat request may say, and how OpenAI words a refusal.

The fields follow https://platform.openai.com/docs/api-reference/chat. What would be ignored is refused:
an answer that looks right but did not do what was asked is worse than an error.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, from_json


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class TextPart(_Fields):
    type: Literal["text"]
    text: str


def _listed(value: Any) -> list:
    """A list where a text may stand for one: pydantic's errors for a union name a branch, not the mistake."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("text_or_list", "Input should be a text or a list")
    return [value] if isinstance(value, str) else value


def _parts(content: Any) -> list:
    return [{"type": "text", "text": content}] if isinstance(content, str) else _listed(content)


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_parts)]

    def plain(self) -> dict:
        """As the model's template takes it: a role it knows, a text."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class JsonSchema(_Fields):
    name: str
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Fields):
    include_usage: bool | None = None


StopText = Annotated[str, Field(min_length=1, max_length=200)]


class ChatRequest(_Fields):
    """The fields that are honoured. `top_k` and `repetition_penalty` are not OpenAI's but the model's."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[StopText], Field(max_length=4), BeforeValidator(_listed)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    def params(self) -> dict:
        """In the model's own terms; what was not given is left to the model."""
        given = {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "seed": None if self.seed is None else self.seed % 2**31,
            "stop": self.stop,
            "json_schema": self._schema(),
        }
        return {name: value for name, value in given.items() if value is not None}

    def _schema(self) -> str | None:
        if self.response_format is None or self.response_format.type == "text":
            return None
        if self.response_format.type == "json_object":
            return json.dumps({"type": "object"})
        if self.response_format.json_schema is None:
            raise ApiError(
                400, "response_format.json_schema is missing.", param="response_format.json_schema"
            )
        return json.dumps(self.response_format.json_schema.schema_)


# Fields that change no answer here, and may so be accepted whatever they hold.
WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
# Of other fields that are not honoured, the values that ask for nothing. `null` asks for nothing in every
# field, and in one that is not here so do `false`, 0 and empty ones.
NEUTRAL = {
    "n": (1,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),  # an empty object asks for a search
}
# What pydantic says of Python's types, in JSON's words.
WORDS = {"model_type": "Input should be an object", "dict_type": "Input should be an object"}


def parse(body: bytes) -> ChatRequest:
    """Read and check a request's body. Raises ApiError 400, which names the field."""
    body = body.removeprefix(codecs.BOM_UTF8)
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {_reason(body, error)}.", "invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body is not a JSON object.")
    _refuse_unknown(fields, ChatRequest.model_fields.keys() | WITHOUT_EFFECT)
    messages = fields.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else []):
        _refuse_unsupported_message(message, f"messages.{index}")
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{where}: {WORDS.get(first['type'], first['msg'])}.", param=where) from None


def _reason(body: bytes, error: ValueError) -> str:
    if not body.strip():
        return "it is empty"
    if not (encoding := json.detect_encoding(body)).startswith("utf-8"):
        return f"it is in {encoding}, and JSON is sent in UTF-8"
    with contextlib.suppress(ValueError):
        from_json(body)
        return "it holds NaN or Infinity, which JSON does not know"
    return str(error)


def _refuse_unknown(fields: dict, known: set[str], where: str = "") -> None:
    """Raise for a field that would be ignored, unless it asks for nothing."""
    for name, value in fields.items():
        if value is None or name in known:
            continue
        if name in NEUTRAL:
            # Python takes True for 1, and JSON does not.
            asks = not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name])
        else:
            asks = bool(value)
        if asks:
            accepted = " or ".join(map(json.dumps, NEUTRAL.get(name, ())))
            name, but = f"{where}{name}"[:100], f", except {accepted}" if accepted else ""
            raise ApiError(400, f"{name} is not supported by this server{but}. Leave it out.", param=name)


def _refuse_unsupported_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        return
    if message.get("role") in ("tool", "function"):
        raise ApiError(400, "Tools are not supported by this server.", param=f"{where}.role")
    _refuse_unknown(message, set(Message.model_fields), f"{where}.")
    parts = message.get("content")
    for part in parts if isinstance(parts, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            kind = kind[:100]
            raise ApiError(
                400, f"Content of type {kind} is not supported: text only.", param=f"{where}.content"
            )
