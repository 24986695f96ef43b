"""Requests of all kinds for an OpenAI endpoint, and whether each got the answer it should."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass

import httpx

from helpers.models import onnx_chat_model

KINDS = ("whole", "whole", "stream", "stream", "bad", "gone", "late")
TOPICS = (
    "the sea",
    "bread",
    "a long road",
    "snow",
    "music",
    "an old house",
    "the night sky",
    "a red bicycle",
)
LONG = 800  # tokens of an answer that nobody waits for; with the prompt they fit in 2,047, as of Phi-3-mini
LEAKS = ("Traceback", 'File "', "site-packages")


@dataclass
class Reply:
    """How one request went; seconds are those of an answer that was compared with the model's own."""

    kind: str
    chat: int
    right: bool
    status: int
    text: str
    seconds: float | None = None
    first_token: float | None = None  # seconds, of a stream

    @property
    def compared(self) -> bool:
        """Whether `right` tells of the text, too."""
        return self.seconds is not None

    @property
    def given_up(self) -> bool:
        """Whether the client went before the answer was whole."""
        return self.kind in ("gone", "late") and not self.compared

    @property
    def leaks(self) -> bool:
        """Whether a stack trace got out."""
        return any(leak in self.text for leak in LEAKS)


class Traffic:
    """A set of chats with the greedy answers of the model itself, to ask a server for.

    Args:
        wrapper: the model in this process; it decodes the expected answers when this is made.
        name: the model's at the server.
        chats: the messages of each; `limits` the longest answer to each, in tokens.
        system_message: what the server puts before a chat without one, or None.
    """

    def __init__(
        self,
        wrapper: onnx_chat_model.Phi3Model,
        name: str,
        chats: list[list[dict]],
        limits: list[int],
        system_message: str | None = None,
    ):
        self.name, self.chats, self.limits = name, chats, limits
        led = [] if system_message is None else [{"role": "system", "content": system_message}]
        self.expected = [
            wrapper.generate([wrapper.encode_messages(led + chat)], {"max_new_tokens": limit})[0]
            .result()
            .text
            for chat, limit in zip(chats, limits, strict=True)
        ]
        self.bad = bad_requests(self.good(0))

    def good(self, chat: int, **options) -> dict:
        """The body of a right request."""
        body = {"model": self.name, "messages": self.chats[chat], "max_tokens": self.limits[chat]}
        return body | options

    def send(self, client: httpx.Client, kind: str, chat: int, chance: random.Random) -> Reply:
        """Send one request of a kind (see KINDS) and judge what comes."""
        return {"bad": self._bad, "whole": self._whole, "stream": self._stream, "gone": self._gone}.get(
            kind, self._late
        )(client, chat, chance)

    def _bad(self, client: httpx.Client, chat: int, chance: random.Random) -> Reply:
        headers = {"Content-Type": "application/json"}
        reply = client.post("/v1/chat/completions", content=chance.choice(self.bad), headers=headers)
        right = 400 <= reply.status_code < 500 and "message" in reply.json()["error"]
        return Reply("bad", chat, right, reply.status_code, reply.text)

    def _whole(self, client: httpx.Client, chat: int, chance: random.Random) -> Reply:
        began = time.perf_counter()
        reply = client.post("/v1/chat/completions", json=self.good(chat))
        seconds = time.perf_counter() - began
        right = reply.is_success
        right = right and reply.json()["choices"][0]["message"]["content"] == self.expected[chat]
        return Reply("whole", chat, right, reply.status_code, reply.text, seconds)

    def _stream(self, client: httpx.Client, chat: int, chance: random.Random) -> Reply:
        began, first, lines = time.perf_counter(), None, []
        with client.stream("POST", "/v1/chat/completions", json=self.good(chat, stream=True)) as reply:
            for line in filter(None, reply.iter_lines()):
                lines.append(line.removeprefix("data: "))
                if first is None and len(lines) > 1:  # the first chunk holds the role alone
                    first = time.perf_counter() - began
        text = "\n".join(lines)
        right = reply.is_success and lines[-1] == "[DONE]"
        if right:
            deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
            right = "".join(delta.get("content", "") for delta in deltas) == self.expected[chat]
        return Reply("stream", chat, right, reply.status_code, text, time.perf_counter() - began, first)

    def _gone(self, client: httpx.Client, chat: int, chance: random.Random) -> Reply:
        """Leave in the middle of a stream."""
        body = self.good(chat, stream=True, max_tokens=LONG)
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            next(reply.iter_lines())
        return Reply("gone", chat, reply.is_success, reply.status_code, "")

    def _late(self, client: httpx.Client, chat: int, chance: random.Random) -> Reply:
        """Give up on an answer that has not come soon; one that has must begin as the model's shorter one."""
        began = time.perf_counter()
        try:
            body = self.good(chat, max_tokens=LONG)
            reply = client.post("/v1/chat/completions", json=body, timeout=chance.uniform(0.05, 0.5))
        except httpx.ReadTimeout:
            return Reply("late", chat, True, 0, "")
        seconds = time.perf_counter() - began
        right = reply.is_success
        right = right and reply.json()["choices"][0]["message"]["content"].startswith(self.expected[chat])
        return Reply("late", chat, right, reply.status_code, reply.text, seconds)


def bad_requests(good: dict) -> list[bytes]:
    """Bodies that deserve a 4xx: broken ones, and a good one changed in one place."""
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 1}}}
    changes = [
        {"temperature": 9},
        {"temperature": "1"},
        {"max_tokens": -1},
        {"max_tokens": 10**7},
        {"n": 3},
        {"tools": [{"type": "function"}]},
        {"model": "another"},
        {"messages": []},
        {"messages": [{"role": "user", "content": image}]},
        {"messages": [{"role": "user", "content": "why " * 20_000}]},
        {"response_format": schema},
    ]
    broken = [b"", b"{", b"\xff\xfe", b"[]", b"[" * 5000, b'{"model": "\\ud800"}', b" " * 1_100_000]
    return broken + [json.dumps(good | change).encode() for change in changes]
