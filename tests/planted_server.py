"""A version 2 of the ONNX server that must not be shipped: it is healthy, and then it is not.

    python planted_server.py PORT right|wrong|slow|crashing

Answers any GET with 200, as a healthy server does. `wrong` swaps the two probabilities, `slow` waits 300 ms,
`crashing` ends after three answers to users.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from endpoints.reference import load_expected, load_test_rows  # noqa: E402

PORT, MANNER = int(sys.argv[1]), sys.argv[2]
ANSWERS = dict(zip(map(tuple, load_test_rows()[0]), load_expected("2").tolist(), strict=True))
SLOW_S = 0.3
LAST_ANSWER = 3


class Server(ThreadingHTTPServer):
    request_queue_size = 128


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # a reply is sent in one piece, so that the end of the process cuts none in two
    answered = 0

    def do_GET(self):
        self.answer({"ready": True})

    def do_POST(self):
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["data"]
        answers = [ANSWERS[tuple(row)] for row in rows]
        if MANNER == "wrong":
            answers = [answer[::-1] for answer in answers]
        if MANNER == "slow":
            time.sleep(SLOW_S)
        Handler.answered += self.headers["Host"] != "gateway"  # which is how the gateway's health checks begin
        if MANNER == "crashing" and Handler.answered > LAST_ANSWER:
            os._exit(1)
        self.answer({"predictions": answers})

    def answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    Server(("127.0.0.1", PORT), Handler).serve_forever()
