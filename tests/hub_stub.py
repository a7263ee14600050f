"""A model hub of one repository in memory: as much of the protocol as a push and a pull need."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0" * 40


class Hub(ThreadingHTTPServer):
    """On a free port, with the `files` that were pushed; the caller runs and stops it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def reply(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        headers |= {"Content-Length": str(len(body)), "X-Repo-Commit": SHA}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://{self.headers['Host']}/user/name"
        answer: dict[str, Any] = {
            "url": here,
            "commitUrl": f"{here}/commit/{SHA}",
            "commitOid": SHA,
        }
        if "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            answer = {"files": [{"path": f["path"], **how} for f in json.loads(body)["files"]]}
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
        self.reply(json.dumps(answer).encode())

    def do_GET(self) -> None:
        files = self.server.files
        if "/resolve/" in self.path:
            name = self.path.rpartition("/")[2]
            return self.reply(files[name], ETag=f'"{name}"')
        facts = {"type": "file", "oid": SHA}
        tree = [{**facts, "path": name, "size": len(content)} for name, content in files.items()]
        answer = tree if "/tree/" in self.path else {"id": "user/name", "sha": SHA}
        return self.reply(json.dumps(answer).encode())

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass
