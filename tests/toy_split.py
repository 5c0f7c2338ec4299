"""A gateway in miniature for the tests: splits users by a hash of their id, answers by the reference's numbers.

It speaks the ONNX server's form. `ToySplit` is a context manager; what version 2 does wrong is an argument.
"""

import json
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from reference import load_expected, load_test_rows

ROWS, _ = load_test_rows()
ANSWERS = {version: dict(zip(map(tuple, ROWS), load_expected(version).tolist(), strict=True)) for version in "12"}
ANSWERS["x"] = {row: [benign, malignant] for row, (malignant, benign) in ANSWERS["1"].items()}  # mostly wrong


class ToySplit:
    """The split at `url`; `share` per cent of the users get version 2."""

    def __init__(
        self,
        share: int = 50,
        versions: str = "12",  # what answers as version 1 and as version 2
        slow_s: float = 0.0,  # version 2 waits so long
        failing: int = 0,  # version 2 answers 500 to so many per cent
        shapeless: bool = False,  # version 2 answers 200 without a pair of probabilities
        sticky: bool = True,
        header: str = "X-Model-Version",
        throttles: int = 0,  # so many replies 429 first
    ):
        self.share = share
        self.asked = []  # user ids
        split = self
        lock = threading.Lock()
        asked, left = self.asked, [throttles]

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1  # one write a reply

            def do_POST(self):
                [row] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["data"]
                user = self.headers["X-User-Id"]
                with lock:
                    asked.append(user)
                    number = len(asked)
                    throttled = left[0] > 0
                    left[0] -= throttled
                if throttled:
                    return self.answer(429, {}, None)
                bucket = zlib.crc32((user if sticky else f"{user}{number}").encode()) % 100
                version = "2" if bucket < split.share else "1"
                answer = [ANSWERS[versions[int(version) - 1]][tuple(row)]]
                if version == "1":
                    return self.answer(200, {"predictions": answer}, "1")
                if slow_s:
                    time.sleep(slow_s)
                if number % 100 < failing:
                    return self.answer(500, {"error": "planted"}, "2")
                return self.answer(200, {"predictions": [1.0] if shapeless else answer}, "2")

            def answer(self, status: int, content: dict, version: str | None) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                if version:
                    self.send_header(header, version)
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "ToySplit":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
