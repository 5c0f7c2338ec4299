"""A fifth server for the tests: answers by the reference's own numbers, or as badly as it is told to.

    python toy_server.py PORT [right|late|wrong|erring|dropping|unequal|silent|garbled|crashing|deaf|leaking]

Standard library only. Once it has answered rightly GOOD_ANSWERS times, `late` answers LATE_S later, `wrong` is off by
0.01, `erring` answers 503 to every fourth request, `dropping` closes the connection at every fourth. `unequal` is off
by 0.01 for all rows but the first, `silent` for all, `garbled` answers 200 without probabilities, `crashing` ends at
once, `deaf` ignores SIGTERM and leaves a child behind, `leaking` keeps 50,000 bytes for each answer.
"""

import itertools
import json
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from endpoints.reference import load_expected, load_test_rows  # noqa: E402

PORT, MANNER = int(sys.argv[1]), (sys.argv[2:] or ["right"])[0]
ROWS, _ = load_test_rows()
ANSWERS = {version: dict(zip(map(tuple, ROWS), load_expected(version).tolist(), strict=True)) for version in "12"}
GOOD_ANSWERS = 1 + 2 * (len(ROWS) + 1)  # what a start and the check of both versions ask
EVERY = 4
LATE_S = 0.05
KEPT = []
NUMBERS = itertools.count(1)  # of requests; its next() is one step, whatever the threads


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answers = [ANSWERS[self.path.rsplit("/", 1)[1]][tuple(row)] for row in body["rows"]]
        number = next(NUMBERS)
        turned = number > GOOD_ANSWERS
        bad_turn = turned and number % EVERY == 0
        is_off = {"silent": True, "unequal": body["rows"] != ROWS[:1], "wrong": turned}.get(MANNER, False)
        if is_off:
            answers = [[p0 + 0.01, p1 - 0.01] for p0, p1 in answers]
        if MANNER == "leaking":
            KEPT.append(b"x" * 50_000)
        if MANNER == "late" and turned:
            time.sleep(LATE_S)
        if MANNER == "dropping" and bad_turn:
            self.close_connection = True
            return
        reply = json.dumps({"oops" if MANNER == "garbled" else "answers": answers}).encode()
        self.send_response(503 if MANNER == "erring" and bad_turn else 200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # the standard library's 5 lets the sixth of many connections at once wait for a second


if __name__ == "__main__":
    if MANNER == "crashing":
        sys.exit("toy: the model is missing; make one")
    if MANNER == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Server(("127.0.0.1", PORT), Handler).serve_forever()
