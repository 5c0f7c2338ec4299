"""A server whose delay is known: it waits 2.2 ms and 2.7 ms in turn, then answers rightly.

    python delayed_server.py PORT [MANNER]

Takes the toy endpoint's requests. Appends one byte for each answer to the file `answered` in its folder.
"""

import itertools
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from endpoints.reference import load_expected, load_test_rows  # noqa: E402

DELAYS_S = itertools.cycle((0.0022, 0.0027))
ANSWERS = dict(zip(map(tuple, load_test_rows()[0]), load_expected("1").tolist(), strict=True))
COUNT_FILE = os.open(Path(__file__).with_name("answered"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = json.dumps({"answers": [ANSWERS[tuple(row)] for row in body["rows"]]}).encode()
        time.sleep(next(DELAYS_S))
        os.write(COUNT_FILE, b".")
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
