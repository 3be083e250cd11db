"""A hub on loopback, for one dataset repository that is a folder: what huggingface_hub asks of the real one to read it.

Answers repo_info, tree, paths-info, resolve (with ranges, and with the headers a download is keyed by), and takes what
`upload_folder` sends. Files come and go as small ones do, by their git blob's hash; the store for large ones is not here.
"""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections import Counter
from hashlib import sha1
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves `folder` as the dataset repository `name`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, name: str = "someone/shelf") -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.name = folder, name
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()

    def handle_error(self, request, client_address) -> None:
        """Clients hang up; that is no news."""

    def entry(self, path: Path) -> dict:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": sha1(name.encode()).hexdigest(), "size": 0, "path": name}
        return {"type": "file", "oid": blob(path), "size": path.stat().st_size, "path": name}


def blob(path: Path) -> str:
    """The hash git gives a file."""
    data = path.read_bytes()
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        hub, path = self.server, unquote(parts.path)
        with hub.lock:
            hub.asked[path] += 1
        api, files = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            names = [p for p in sorted(hub.folder.rglob("*")) if p.is_file()]
            siblings = [{"rfilename": p.relative_to(hub.folder).as_posix()} for p in names]
            self._json({"id": hub.name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0,
                        "siblings": siblings})  # fmt: skip
        elif path.startswith(f"{api}/tree/"):
            inner = path.removeprefix(f"{api}/tree/").partition("/")[2]
            folder = hub.folder / inner
            if not folder.is_dir():
                self._missing("EntryNotFound")
                return
            deep = parse_qs(parts.query).get("recursive", ["false"])[0].lower() == "true"
            self._json([hub.entry(p) for p in sorted(folder.rglob("*") if deep else folder.iterdir())])
        elif path.startswith(files):
            self._file(hub.folder / path.removeprefix(files).partition("/")[2])
        else:
            self._missing("RepoNotFound")

    def do_POST(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        with hub.lock:
            hub.asked[path] += 1
        api = f"/api/datasets/{hub.name}"
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
            return
        if path == f"{api}/preupload/main":
            self._json({"files": [
                {"path": item["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for item in json.loads(body)["files"]
            ]})  # fmt: skip
            return
        if path == f"{api}/commit/main":
            for item in map(json.loads, body.splitlines()):
                if item["key"] == "file":
                    target = hub.folder / item["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(item["value"]["content"]))
            self._json(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"{hub.endpoint}/datasets/{hub.name}/commit/{COMMIT}",
                }
            )
            return
        if "/paths-info/" not in path:
            self._missing("RepoNotFound")
            return
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        self._json([hub.entry(hub.folder / name) for name in wanted if (hub.folder / name).exists()])

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._missing("EntryNotFound")
            return
        data, status, headers = path.read_bytes(), 200, {}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        self._answer(status, data, {**headers, "ETag": f'"{blob(path)}"', "X-Repo-Commit": COMMIT,
                                    "Accept-Ranges": "bytes"})  # fmt: skip

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._answer(404, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
