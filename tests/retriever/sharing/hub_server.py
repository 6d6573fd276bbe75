"""A small hub on this machine: the requests of huggingface_hub's own client for uploading and downloading a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """Repositories by name, their commits, and what was asked."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> str:
        """Make a commit of the lines of a request."""
        files = dict(self.commits.get(self.branches.get((repo, branch), ""), {}))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        oid = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[oid], self.branches[repo, branch] = files, oid
        return oid


@contextmanager
def local_hub() -> Iterator[Hub]:
    """Serve a hub within the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, content: bytes = b"", status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _json(self, content: Any, status: int = 200) -> None:
            self._answer(json.dumps(content).encode(), status, Content_Type="application/json")

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            body, path = self._body(), self.path
            hub.asked.append(f"POST {path}")
            if path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif self.headers.get("Authorization") != "Bearer hf_secret":
                self._json({"error": "no token"}, 401)
            elif path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                hub.private[name] = asked.get("private", asked.get("visibility") == "private")
                self._json({"url": f"{hub.url}/{name}", "name": name})
            elif path.endswith(".git/info/lfs/objects/batch"):
                found = [
                    {**each, "actions": {"upload": {"href": f"{hub.url}/upload/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                self._json({"transfer": "basic", "objects": found})
            elif (match := re.fullmatch(r"/api/models/(\w+/\w+)/(\w+)/(\w+)", path)) is None:
                self._json({"error": "not found"}, 404)
            elif match[2] == "branch":
                hub.branches.setdefault((match[1], match[3]), "")
                self._json({})
            elif match[2] == "preupload":
                files = [
                    {"path": each["path"], "uploadMode": "lfs" if large(each["path"]) else "regular"}
                    for each in json.loads(body)["files"]
                ]
                self._json({"files": [{**each, "shouldIgnore": False} for each in files]})
            else:
                oid = hub.commit(match[1], match[3], [json.loads(line) for line in body.splitlines()])
                url = f"{hub.url}/{match[1]}/commit/{oid}"
                self._json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

        def do_PUT(self) -> None:
            content = self._body()
            hub.large[hashlib.sha256(content).hexdigest()] = content
            self._answer()

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            if match := re.fullmatch(r"/api/models/(\w+/\w+)/revision/(\w+)", path):
                oid = hub.branches.get((match[1], match[2]), match[2])
                if oid not in hub.commits:
                    self._answer(b"{}", 404, X_Error_Code="RevisionNotFound")
                    return
                names = [{"rfilename": name} for name in hub.commits[oid]]
                self._json({"id": match[1], "modelId": match[1], "sha": oid, "siblings": names, "tags": []})
            elif match := re.fullmatch(r"/api/models/\w+/\w+/tree/(\w+)", path):
                self._json([entry(name, content) for name, content in hub.commits[match[1]].items()])
            elif match := re.fullmatch(r"/\w+/\w+/resolve/(\w+)/(.+)", path):
                content = hub.commits[match[1]].get(match[2])
                if content is None:
                    self._answer(b"", 404, X_Error_Code="EntryNotFound")
                    return
                digest = entry(match[2], content)["oid"]
                self._answer(content, X_Repo_Commit=match[1], ETag=f'"{digest}"', Accept_Ranges="none")
            else:
                self._json({"error": "not found"}, 404)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def large(name: str) -> bool:
    """Whether a file is stored under its sha256, as the hub stores weights."""
    return name.endswith(".safetensors")


def entry(name: str, content: bytes) -> dict[str, Any]:
    """A file in a listing."""
    oid = (hashlib.sha256 if large(name) else hashlib.sha1)(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}
