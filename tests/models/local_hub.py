"""A local server that speaks what huggingface_hub needs of the Hub's protocol, and misbehaves on request.

As the Hub does, it sends large files from another address, by a redirect; that one refuses a token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + "0" * 34

# Status, and what the Hub says beside it, by which huggingface_hub tells the cases apart.
REFUSALS = {
    401: (401, {"X-Error-Code": "RepoNotFound"}),
    403: (403, {"X-Error-Code": "GatedRepo"}),
    404: (404, {"X-Error-Code": "RepoNotFound"}),
    429: (429, {"Retry-After": "3"}),  # of itself huggingface_hub waits one second
    500: (500, {}),
    "no token": (401, {"X-Error-Code": "GatedRepo"}),
    "wrong token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
}


class LocalHub:
    """Repositories by name, each a dict of path → bytes.

    Attributes:
        commits: repository → its one commit; `COMMIT` where none is named.
        status: repository or file name → which of REFUSALS every request for it is answered with.
        busy: file name → number of requests that are answered with 429 and its Retry-After.
        cut: names of files whose next download ends half-way.
        changed: names of files that are sent with one byte changed.
        short: names of files of which the first half is sent as if it were the whole.
        claimed: file name → bytes that the listing says it has.
        slow: names of files that stall half-way until the server ends.
        fetched: paths of the files sent, in order, with the first byte asked for.
        asked: (seconds, repository, path in it) of all requests for files, refused ones too.
        requests: number of all requests.
        tokens: what was sent as Authorization to the Hub itself.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]], commits: dict[str, str] | None = None):
        self.repositories = repositories
        self.commits = commits or {}
        self.status: dict[str, int | str] = {}
        self.busy: dict[str, int] = {}
        self.cut: set[str] = set()
        self.changed: set[str] = set()
        self.short: set[str] = set()
        self.claimed: dict[str, int] = {}
        self.slow: set[str] = set()
        self.ended = threading.Event()
        self.fetched: list[tuple[str, int]] = []
        self.asked: list[tuple[float, str, str]] = []
        self.requests = 0
        self.tokens: set[str | None] = set()
        self.url = self.large_files_url = ""

    @contextmanager
    def serve(self) -> Iterator[LocalHub]:
        handler = type("Handler", (_Handler,), {"hub": self})
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.large_files_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
        for server in servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield self
        finally:
            self.ended.set()
            for server in servers:
                server.shutdown()
                server.server_close()

    def starts(self, name: str) -> list[int]:
        """The first bytes asked for of a file, one for each time it was sent."""
        return [start for path, start in self.fetched if path.rpartition("/")[2] == name]


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.requests += 1
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._guarded(match[1], match[2], lambda: self._info(match[1]))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._guarded(match[1], match[2], lambda: self._file(match[1], match[3]))
        elif match := re.fullmatch(r"/large/([^/]+/[^/]+)/(.+)", path):
            if "Authorization" in self.headers:
                return self._reply(400)
            self._send(match[2], self.hub.repositories[match[1]][match[2]], {})
        else:
            self._reply(404)
        return None

    def _guarded(self, repo: str, revision: str, answer) -> None:
        self.hub.tokens.add(self.headers.get("Authorization"))
        if status := self.hub.status.get(repo):
            return self._refuse(status)
        if repo not in self.hub.repositories:
            return self._refuse(404)
        if revision not in ("main", self.hub.commits.get(repo, COMMIT)):
            return self._reply(404, headers={"X-Error-Code": "RevisionNotFound"})
        return answer()

    def _refuse(self, status: int | str) -> None:
        number, headers = REFUSALS[status]
        self._reply(number, headers=headers)

    def _info(self, repo: str) -> None:
        siblings = []
        for path, content in self.hub.repositories[repo].items():
            name = path.rpartition("/")[2]
            size = self.hub.claimed.get(name, len(content))
            entry = {"rfilename": path, "size": size, "blobId": _blob_id(content)}
            if _is_large(path):
                entry["lfs"] = {"sha256": _sha256(content), "size": size, "pointerSize": 134}
            siblings.append(entry)
        answer = {"id": repo, "sha": self.hub.commits.get(repo, COMMIT), "siblings": siblings}
        self._reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, path: str) -> None:
        self.hub.asked.append((time.monotonic(), repo, path))
        content, name = self.hub.repositories[repo].get(path), path.rpartition("/")[2]
        if status := self.hub.status.get(name):
            return self._refuse(status)
        if self.hub.busy.get(name):
            self.hub.busy[name] -= 1
            return self._refuse(429)
        if content is None:
            return self._reply(404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": self.hub.commits.get(repo, COMMIT)}
        if _is_large(path):
            return self._reply(
                302, headers=headers | {"Location": f"{self.hub.large_files_url}/large/{repo}/{path}"}
            )
        return self._send(path, content, headers)

    def _send(self, path: str, content: bytes, headers: dict) -> None:
        name = path.rpartition("/")[2]
        if name in self.hub.short:
            content = content[: len(content) // 2]
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.hub.fetched.append((path, start))
        body = content[start:]
        if name in self.hub.changed:
            body = body[:-1] + bytes([body[-1] ^ 1])
        headers |= {"Accept-Ranges": "bytes", "Content-Length": str(len(body))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._head(206 if start else 200, headers)
        if name not in self.hub.cut | self.hub.slow:
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if name in self.hub.slow:
            self.hub.ended.wait(60)
        self.hub.cut.discard(name)
        time.sleep(0.1)
        self.close_connection = True

    def _reply(self, status: int, body: bytes = b"", headers: dict | None = None) -> None:
        self._head(status, {"Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def _head(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """The tests' output is not a web server's log."""


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".onnx", ".data", ".bin", ".model"))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
