"""A small HTTP server that speaks the part of the Hub's protocol that huggingface_hub uses to push and to load a model.

Repositories are kept in memory, one state a commit: creation, pre-upload, Git LFS batches and objects, commits, and
resolving files. No PyPI package carries a hub server (hf-local-hub is a client of a server that it does not contain).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

Repository = dict[str, bytes]


class Hub:
    """What the server holds. `requests` are (method, path) in their order."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.private: dict[str, bool] = {}
        self.cards: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()

    def sha(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        self.hub.tokens.add(self.headers.get("Authorization"))
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None:
                getattr(self, method)(body, *match.groups())
                return
        self.send(404, {"error": f"no route for {self.command} {path}"})

    def send(self, status: int, content: Any, **headers: str) -> None:
        is_raw = isinstance(content, bytes)
        data = content if is_raw else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if is_raw else "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def here(self) -> str:
        return f"http://{self.headers['Host']}"

    def create(self, body: bytes) -> None:
        given = json.loads(body)
        name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
        name = name if "/" in name else f"tester/{name}"
        self.hub.private[name] = bool(given.get("private")) or given.get("visibility") == "private"
        self.hub.repositories.setdefault(name, {})
        self.send(200, {"url": f"{self.here()}/{name}", "name": name, "id": name})

    def whoami(self, body: bytes) -> None:
        self.send(200, {"name": "tester", "type": "user", "orgs": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".bin", ".pt")) else "regular"

        files = [
            {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in json.loads(body)["files"]
        ]
        self.send(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {
                "oid": o["oid"], "size": o["size"],
                "actions": {"upload": {"href": f"{self.here()}/storage/{o['oid']}", "header": {}}},
            }
            for o in json.loads(body)["objects"]
        ]  # fmt: skip
        self.send(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.send(422, {"error": "the object is not the one that was announced"})
            return
        self.hub.objects[oid] = body
        self.send(200, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        files = self.hub.repositories[name]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = self.hub.sha(name)
        self.send(200, {"commitUrl": f"{self.here()}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if name not in self.hub.repositories:
            self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        files = [{"rfilename": path} for path in self.hub.repositories[name]]
        self.send(200, {"id": name, "modelId": name, "sha": self.hub.sha(name), "siblings": files, "tags": []})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        files = self.hub.repositories.get(name, {})
        self.send(
            200,
            [{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files.items()],
        )

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if name not in self.hub.repositories:
            self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif path not in self.hub.repositories[name]:
            self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        else:
            content = self.hub.repositories[name][path]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.send(200, content, ETag=etag, X_Repo_Commit=self.hub.sha(name), Accept_Ranges="none")

    def valid_card(self, body: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})


ROUTES = (
    (r"/api/repos/create", "create"),
    (r"/api/whoami-v2", "whoami"),
    (r"/api/validate-yaml", "valid_card"),
    (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
    (r"/api/models/([^/]+/[^/]+)/commit/(.+)", "commit"),
    (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", "tree"),
    (r"/api/models/([^/]+/[^/]+)/revision/(.+)", "info"),
    (r"/api/models/([^/]+/[^/]+)", "info"),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    (r"/storage/(\w+)", "store"),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
)


@contextmanager
def hub_server() -> Iterator[tuple[str, Hub]]:
    """(endpoint, what it holds) of a server that runs while the block does."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
