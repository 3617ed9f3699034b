"""A hub of our own on a loopback port: as much of its protocol as downloads and commits of small files need."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories in memory.

    Attributes:
        url: What HF_ENDPOINT is to be.
        files: Content by repository and name.
        private: Whether a repository that was made is private.
        licenses: What a repository's card says.
        token: What whoever writes must have.
        requests: Method and path of each request.
    """

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.licenses: dict[str, str] = {}
        self.token = "hf_right"
        self.requests: list[tuple[str, str]] = []


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path))
        if path.startswith("/api/models/"):
            repo, _, place = path.removeprefix("/api/models/").partition("/revision/")[0].partition("/tree/")
            if repo not in self.hub.files:
                return self._reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if place:
                return self._tree(repo, place.partition("/")[2])
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.hub.files[repo].items()]
            card = {"license": self.hub.licenses[repo]} if repo in self.hub.licenses else None
            return self._reply(200, {"id": repo, "sha": COMMIT, "siblings": siblings, "cardData": card})
        repo, _, name = path.strip("/").partition("/resolve/")
        data = self.hub.files.get(repo, {}).get(name.partition("/")[2])
        if data is None:
            return self._reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        etag = {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._reply(200, data, etag)

    def _tree(self, repo: str, folder: str) -> None:
        if folder:  # none has any
            return self._reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        files = self.hub.files[repo].items()
        return self._reply(
            200, [{"type": "file", "path": name, "size": len(d), "oid": sha1(d).hexdigest()} for name, d in files]
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(("POST", self.path))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._reply(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if repo in self.hub.files:
                return self._reply(409, {"error": "It is there already", "url": f"{self.hub.url}/{repo}"})
            self.hub.private[repo] = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.files.setdefault(repo, {})
            return self._reply(200, {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})
        if self.path == "/api/validate-yaml":
            return self._reply(200, {"errors": [], "warnings": []})
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._reply(
                200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
            )
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.hub.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
        return self._reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def _reply(self, status: int, data: bytes | dict[str, Any], headers: dict[str, str] | None = None) -> None:
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
