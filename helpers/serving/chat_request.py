"""What a chat request may say, and how OpenAI words a refusal.

The fields follow https://platform.openai.com/docs/api-reference/chat. What would be ignored is refused:
an answer that looks right but did not do what was asked is worse than an error.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

# Fields that change no answer here, and so are accepted whatever they hold.
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
    "web_search_options": (),  # An empty object asks for a search.
}
# What pydantic says of Python's types, in JSON's words.
WORDS = {"model_type": "Input should be an object", "dict_type": "Input should be an object"}


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class _KnownFields(_Fields):
    """Other fields are an error, unless they ask for nothing."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        known = cls.model_fields
        return {name: value for name, value in fields.items() if name in known or _asks(name, value)}


def _asks(name: str, value: Any) -> bool:
    """Whether a field that is not honoured asks for something."""
    if value is None or name in WITHOUT_EFFECT:
        return False
    if name in NEUTRAL:
        # Python takes True for 1, and JSON does not.
        return not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name])
    return bool(value)


def _list_of_texts(value: Any) -> list:
    """A list where a text may stand for one: pydantic's errors for a union name a branch, not the mistake."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("text_or_list", "Input should be a text or a list")
    return [value] if isinstance(value, str) else value


def _parts(content: Any) -> list:
    return [{"type": "text", "text": content}] if isinstance(content, str) else _list_of_texts(content)


class TextPart(_Fields):
    type: Literal["text"]
    text: str


class Message(_KnownFields):
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


class ChatRequest(_KnownFields):
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
    stop: Annotated[list[StopText], Field(max_length=4), BeforeValidator(_list_of_texts)] | None = None
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
            where = "response_format.json_schema"
            raise ApiError(400, f"{where} is missing.", param=where)
        return json.dumps(self.response_format.json_schema.schema_)


def parse(body: bytes) -> ChatRequest:
    """Read and check a request's body. Raises ApiError 400, which names the field."""
    try:
        return ChatRequest.model_validate_json(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", "invalid_json") from None
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None


def _refusal(error: ErrorDetails) -> ApiError:
    """OpenAI's error for pydantic's."""
    kind = error["type"]
    where = ".".join(str(part) for part in error["loc"])[:200]
    if kind == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {error['ctx']['error']}.", "invalid_json")
    if not where:
        return ApiError(400, "The body is not a JSON object.")
    if kind == "extra_forbidden":
        allowed = " or ".join(map(json.dumps, NEUTRAL.get(where, ())))
        but = f", except {allowed}" if allowed else ""
        return ApiError(400, f"{where} is not supported by this server{but}. Leave it out.", param=where)
    message = WORDS.get(kind, error["msg"])
    if kind == "literal_error":
        message = f"{error['input']!r:.100} is not supported by this server. {message}"
    return ApiError(400, f"{where}: {message}.", param=where)
