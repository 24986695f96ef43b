"""A local server that speaks what huggingface_hub needs of the Hub's protocol, and misbehaves on request."""

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

# What the Hub says beside the status, by which huggingface_hub tells the cases apart.
REFUSALS = {
    403: {"X-Error-Code": "GatedRepo"},
    404: {"X-Error-Code": "RepoNotFound"},
    429: {"Retry-After": "1"},
}


class LocalHub:
    """Repositories by name, each a dict of path → bytes; every repository has one commit, `COMMIT`.

    Attributes:
        status: repository → HTTP status that its every request is answered with.
        cut: paths whose next download ends half-way.
        changed: paths that are sent with one byte changed.
        slow: paths that stall half-way until the server ends.
        fetched: paths of the files sent, in order, with the first byte asked for.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.status: dict[str, int] = {}
        self.cut: set[str] = set()
        self.changed: set[str] = set()
        self.slow: set[str] = set()
        self.stalled = threading.Event()
        self.ended = threading.Event()
        self.fetched: list[tuple[str, int]] = []
        self.requests = 0
        self.url = ""

    @contextmanager
    def serve(self) -> Iterator[LocalHub]:
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.ended.set()
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.requests += 1
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._guarded(match[1], match[2], self._info)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._guarded(match[1], match[2], self._tree)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._guarded(match[1], match[2], lambda repo: self._file(repo, match[3]))
        else:
            self._reply(404)

    do_HEAD = do_GET

    def _guarded(self, repo: str, revision: str, answer) -> None:
        if status := self.hub.status.get(repo):
            return self._reply(status, headers=REFUSALS.get(status, {}))
        if repo not in self.hub.repositories:
            return self._reply(404, headers={"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self._reply(404, headers={"X-Error-Code": "RevisionNotFound"})
        return answer(repo)

    def _info(self, repo: str) -> None:
        siblings = []
        for path, content in self.hub.repositories[repo].items():
            entry = {"rfilename": path, "size": len(content), "blobId": _blob_id(content)}
            if _is_large(path):
                entry["lfs"] = {"sha256": _sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        self._reply_json({"id": repo, "sha": COMMIT, "siblings": siblings})

    def _tree(self, repo: str) -> None:
        entries = []
        for path, content in self.hub.repositories[repo].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
            if _is_large(path):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._reply_json(entries)

    def _file(self, repo: str, path: str) -> None:
        content = self.hub.repositories[repo].get(path)
        if content is None:
            return self._reply(404, headers={"X-Error-Code": "EntryNotFound"})
        etag = _sha256(content) if _is_large(path) else _blob_id(content)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self._reply(200, headers=headers, length=len(content))
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.hub.fetched.append((path, start))
        body = content[start:]
        if path in self.hub.changed:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if path in self.hub.cut or path in self.hub.slow:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if path in self.hub.slow:
                self.hub.stalled.set()
                self.hub.ended.wait(60)
            self.hub.cut.discard(path)
            time.sleep(0.1)
            self.close_connection = True
            return None
        self.wfile.write(body)
        return None

    def _reply_json(self, content: object) -> None:
        self._reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _reply(
        self, status: int, body: bytes = b"", headers: dict | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """The tests' output is not a web server's log."""


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".onnx", ".data", ".bin", ".model"))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
