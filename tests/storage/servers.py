"""Object stores on loopback: gcp-storage-emulator and moto, each in a thread, with faults on demand.

The emulators' own code answers every request; a fault is applied to what goes in or comes out. What the GCS
emulator does not know is added here: conditions on an object's generation, and reads of one generation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import io
import json
import logging
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

BUCKET = "llama"


@dataclasses.dataclass
class Fault:
    """What happens to requests that match.

    Attributes:
      match: a regular expression for "METHOD url".
      kind: an HTTP status; or slow, truncated, or a function to call before the request is served.
      times: how many requests it happens to.
    """

    match: str
    kind: int | str | Callable[[], Any]
    times: int = 1 << 30


class Faults:
    """The faults of a server, and its log of requests."""

    def __init__(self) -> None:
        self.active: list[Fault] = []
        self.log: list[str] = []
        self.bytes_sent = 0
        self._lock = threading.Lock()

    def take(self, request: str) -> int | str | None:
        with self._lock:
            self.log.append(request)
            for fault in self.active:
                if fault.times > 0 and re.search(fault.match, request):
                    fault.times -= 1
                    break
            else:
                return None
        if callable(fault.kind):
            fault.kind()
            return None
        if fault.kind == "slow":
            time.sleep(3)
            return None
        return fault.kind

    @contextlib.contextmanager
    def injected(
        self, match: str, kind: int | str | Callable[[], Any], times: int = 1 << 30
    ) -> Iterator[Fault]:
        fault = Fault(match, kind, times)
        self.active.append(fault)
        try:
            yield fault
        finally:
            self.active.remove(fault)


@dataclasses.dataclass
class Store:
    """A running store.

    Attributes:
      scheme: gs or s3.
      url: of the server.
      faults: what is to go wrong.
      environment: the variables with which clients find it.
    """

    scheme: str
    url: str
    faults: Faults
    environment: dict[str, str]

    @property
    def root(self) -> str:
        return f"{self.scheme}://{BUCKET}"


@contextlib.contextmanager
def gcs() -> Iterator[Store]:
    """A GCS emulator with one bucket."""
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.handlers import buckets, objects
    from gcp_storage_emulator.storage import Storage

    for name in ("gcp_storage_emulator.server", "gcp_storage_emulator.handlers.objects"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    storage, faults, lock = Storage(use_memory_fs=True), Faults(), threading.RLock()
    buckets.create_bucket(BUCKET, storage)

    def generation(bucket: str, name: str) -> str:
        try:
            return str(storage.get_file_obj(bucket, name)["generation"])
        except Exception:
            return "0"

    def checked(handler: Any) -> Any:
        """A handler that first compares the generation that the request names with the object's."""

        @functools.wraps(handler)
        def check(request: Any, response: Any, *rest: Any) -> Any:
            query, params = request.query, request.params
            name = params.get("object_id") or query.get("name", [""])[0]
            if not name and isinstance(request.data, dict):
                name = request.data.get("meta", request.data).get("name", "")
            now = generation(params["bucket_name"], name)
            if "ifGenerationMatch" in query and query["ifGenerationMatch"][0] != now:
                response.status = http.HTTPStatus.PRECONDITION_FAILED
                return None
            if "ifGenerationNotMatch" in query and query["ifGenerationNotMatch"][0] == now:
                response.status = http.HTTPStatus.NOT_MODIFIED
                return None
            if "generation" in query and query["generation"][0] != now:
                response.status = http.HTTPStatus.NOT_FOUND
                return None
            if request.method == "GET" and query.get("alt") == ["media"]:
                response["x-goog-generation"] = now
                return objects.download(request, response, *rest)
            return handler(request, response, *rest)

        return check

    class Handler(emulator.RequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def __init__(self, *arguments: Any) -> None:
            super().__init__(storage, *arguments)

        def _serve(self, method: str) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else b""
            fault = faults.take(f"{method} {urllib.parse.unquote(self.path)}")
            if method == "DELETE" and "/upload/" in self.path:
                fault = 499  # an upload that is given up, which the emulator does not know
            if isinstance(fault, int):
                message = json.dumps({"error": {"code": fault, "message": f"injected {fault}"}}).encode()
                self.send_response(fault)
                self.send_header("Content-Length", str(len(message)))
                self.end_headers()
                self.wfile.write(message)
                return
            if fault == "truncated":
                self.close_connection = True
            connection, out = (self.rfile, self.wfile), io.BytesIO()
            self.rfile, self.wfile = io.BytesIO(body), out  # type: ignore[assignment]
            try:
                with lock:
                    emulator.Router(self).handle(method)
            finally:
                self.rfile, self.wfile = connection
            answer = out.getvalue()
            faults.bytes_sent += len(answer)
            self.wfile.write(answer[: len(answer) * 2 // 3] if fault == "truncated" else answer)

        def do_GET(self) -> None:
            self._serve("GET")

        def do_POST(self) -> None:
            self._serve("POST")

        def do_PUT(self) -> None:
            self._serve("PUT")

        def do_DELETE(self) -> None:
            self._serve("DELETE")

        def do_PATCH(self) -> None:
            self._serve("PATCH")

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:  # a client that has closed its connection
            pass

    original, read_data = emulator.HANDLERS, emulator._read_data
    emulator._read_data = lambda handler, query: _read_upload(handler, query, read_data)
    emulator.HANDLERS = tuple(
        (
            pattern,
            {
                method: checked(handler) if "bucket_name" in pattern else handler
                for method, handler in by.items()
            },
        )
        for pattern, by in original
    )
    with _serving(Server(("127.0.0.1", 0), Handler)) as url:
        environment = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_CLOUD_PROJECT": "test",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",  # TensorStore's
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        try:
            yield Store("gs", url, faults, environment)
        finally:
            emulator.HANDLERS, emulator._read_data = original, read_data


def _read_upload(handler: Any, query: Any, read_data: Any) -> Any:
    """The data of a request; the emulator's parser of emails loses a carriage return at an object's end."""
    kind = handler.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
        return read_data(handler, query)
    raw = handler.rfile.read(int(handler.headers["Content-Length"]))
    boundary = b"--" + re.search(r"boundary=[\"']?([^\"']+)", kind)[1].encode()  # type: ignore[index]
    _, first, second = raw.split(boundary, 2)
    meta, (headers, _, content) = re.split(rb"\r?\n\r?\n", first, maxsplit=1)[1], _split_headers(second)
    newline = b"\r\n" if b"\r\n" in headers else b"\n"
    return {
        "meta": json.loads(meta),
        "content": content[: content.rindex(newline + boundary)],
        "content-type": "application/octet-stream",
    }


def _split_headers(part: bytes) -> tuple[bytes, bytes, bytes]:
    return part.partition(b"\r\n\r\n" if b"\r\n\r\n" in part[:300] else b"\n\n")


@contextlib.contextmanager
def s3() -> Iterator[Store]:
    """An S3 emulator with one bucket."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import WSGIRequestHandler, make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    faults = Faults()
    application = DomainDispatcherApplication(create_backend_app)

    def faulty(environ: dict[str, Any], start_response: Any) -> Any:
        target = environ["PATH_INFO"] + "?" + environ.get("QUERY_STRING", "")
        fault = faults.take(f"{environ['REQUEST_METHOD']} {target}")
        if isinstance(fault, int):
            code = {403: "AccessDenied", 503: "SlowDown"}.get(fault, "InternalError")
            text = f"<Error><Code>{code}</Code><Message>injected {fault}</Message></Error>".encode()
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(
                f"{fault} injected", [("Content-Length", str(len(text))), ("Content-Type", "text/xml")]
            )
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [text]
        answer = application(environ, start_response)
        content = b"".join(answer)
        faults.bytes_sent += len(content)
        return [content[: len(content) * 2 // 3]] if fault == "truncated" else [content]

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

    server = make_server("127.0.0.1", 0, faulty, threaded=True, request_handler=Quiet)
    with _serving(server) as url:
        environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        s3_backends["123456789012"]["aws"].create_bucket(BUCKET, "us-east-1")
        yield Store("s3", url, faults, environment)


@contextlib.contextmanager
def _serving(server: Any) -> Iterator[str]:
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":  # both, until stopped: `python -m tests.storage.servers`
    with gcs() as google, s3() as amazon:
        for name, value in {**google.environment, **amazon.environment}.items():
            print(f"export {name}={value}", flush=True)
        while os.getppid() > 1:
            time.sleep(1)
