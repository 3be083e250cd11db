"""Servers on loopback for the tests of remote caches: an S3 server (moto), a web server, and a proxy that does harm."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

# What the proxy does to a GET: "500", "cut" (half of the body), "wrong" (one bit), "reset", "stall"; None lets it pass.
Fault = Callable[[str], str | None]
# What it does to another request, by method and path: "500", "501", "reset" (before it arrives), "lost" (the answer, after it
# arrived), "slow", "hang", "unconditional" (the condition of a put is dropped); None lets it pass.
WriteFault = Callable[[str, str], str | None]
SLOW_S = 0.5
STALL_S = 30.0


class S3:
    """A new bucket of a moto server."""

    def __init__(self, endpoint: str, bucket: str) -> None:
        from obstore.store import S3Store

        self.endpoint = endpoint
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT"), timeout=20).close()
        self._store = S3Store(
            bucket, endpoint=endpoint, access_key_id="user", secret_access_key="secret", region="us-east-1",
            client_options={"allow_http": True},
        )  # fmt: skip

    def put(self, name: str, data: bytes) -> None:
        self._store.put(name, data)

    def delete(self, name: str) -> None:
        self._store.delete(name)

    def get_folder(self, name: str, folder: Path) -> None:
        for page in self._store.list(f"{name}/"):
            for item in page:
                path = folder / item["path"].removeprefix(f"{name}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(bytes(self._store.get(item["path"]).bytes()))

    def put_folder(self, folder: Path, name: str) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address) -> None:
        """Clients hang up in these tests; that is no news."""


class Proxy(_Quiet):
    """Forwards to `target`, counts what is asked for, and spoils answers as `fault` says."""

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target = target.removeprefix("http://")
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: Counter[str] = Counter()
        self.fault: Fault = lambda path: None
        self.put: Counter[str] = Counter()  # requests that write, by path
        self.refused: Counter[str] = Counter()  # conditional puts that were refused, by path
        self.conditions: Counter[str] = Counter()  # by header
        self.write_fault: WriteFault = lambda method, path: None
        self.lock = threading.Lock()
        self.one_put = threading.Lock()  # moto looks first and puts then; a store does both at once


class _Forward(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server: Proxy = self.server
        with server.lock:
            server.asked[self.path] += 1
            fault = server.fault(self.path)
        if fault == "reset":
            self.close_connection = True
            return
        if fault == "500":
            self._answer(500, [], b"out of order")
            return
        if fault == "stall":
            time.sleep(STALL_S)
        connection = http.client.HTTPConnection(server.target)
        with contextlib.closing(connection):
            headers = {
                key: value for key, value in self.headers.items() if key.lower() in ("range", "host", "authorization")
            }
            connection.request("GET", _plain(self.path), headers=headers)
            answer = connection.getresponse()
            body, kept = answer.read(), [(k, v) for k, v in answer.getheaders() if k.lower() not in _OWN]
        if fault == "wrong" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        self._answer(answer.status, kept, body, cut=fault == "cut")

    def do_HEAD(self) -> None:
        self._pass_on(b"", None)

    def do_PUT(self) -> None:
        self._write()

    def do_POST(self) -> None:
        self._write()

    def do_DELETE(self) -> None:
        self._write()

    def _write(self) -> None:
        server: Proxy = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with server.lock:
            server.put[self.path] += 1
            fault = server.write_fault(self.command, self.path)
        if fault == "reset":
            self.close_connection = True
        elif fault in ("500", "501"):
            word = {"500": b"out of order", "501": b"<Error><Code>NotImplemented</Code></Error>"}[fault]
            self._answer(int(fault), [], word)
        else:
            time.sleep({"slow": SLOW_S, "hang": STALL_S}.get(fault or "", 0.0))
            self._pass_on(body, fault)

    def _pass_on(self, body: bytes, fault: str | None) -> None:
        server: Proxy = self.server
        headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOPS}
        for name in ("if-none-match", "x-goog-if-generation-match"):
            if name in self.headers and self.command == "PUT":
                with server.lock:
                    server.conditions[f"{name}: {self.headers[name]}"] += 1
        if headers.pop("x-goog-if-generation-match", None) == "0":
            headers["If-None-Match"] = "*"  # the one word in which GCS's XML requests differ here from S3's
        if fault == "unconditional":
            headers = {key: value for key, value in headers.items() if key.lower() != "if-none-match"}
        with contextlib.closing(http.client.HTTPConnection(server.target)) as connection, server.one_put:
            connection.request(self.command, _plain(self.path), body=body or None, headers=headers)
            answer = connection.getresponse()
            found, kept = answer.read(), [(k, v) for k, v in answer.getheaders() if k.lower() not in _OWN]
        if answer.status == 412:
            with server.lock:
                server.refused[self.path] += 1
        if fault == "lost":
            self.close_connection = True
            return
        size = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self._answer(answer.status, kept, found, size=size)

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False, size: str | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        self.send_header("Content-Length", size or str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut


def _plain(path: str) -> str:
    """GCS's client quotes the slashes of names, which moto does not undo."""
    return path.replace("%2F", "/")


_HOPS = ("connection", "transfer-encoding", "content-length")
_OWN = ("content-length", "connection", "transfer-encoding", "date", "server")


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(server: http.server.HTTPServer) -> Iterator[None]:
    """The server runs in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def web(folder: Path) -> Iterator[str]:
    """A web server over a folder; it knows no ranges."""
    server = _Quiet(("127.0.0.1", 0), partial(_Files, directory=str(folder)))
    with serving(server):
        yield f"http://127.0.0.1:{server.server_address[1]}"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """A moto server; its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
