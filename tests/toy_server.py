"""A fifth server for the tests: answers by the reference's own numbers, or as badly as it is told to.

    python toy_server.py PORT [right|wrong|erring|dropping|silent|garbled|crashing|deaf|leaking]

Standard library only. `erring` answers 503 to every fourth request, `dropping` closes the connection
at every fourth, `wrong` is off by 0.01 (all three after 300 right answers), `silent` never answers
rightly, `garbled` answers 200 without probabilities, `crashing` ends at once, `deaf` ignores SIGTERM
and leaves a child behind, `leaking` keeps 50,000 bytes for each answer.
"""

import json
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from reference import load_expected, load_test_rows  # noqa: E402

PORT, MANNER = int(sys.argv[1]), (sys.argv[2:] or ["right"])[0]
ROWS, _ = load_test_rows()
ANSWERS = {version: dict(zip(map(tuple, ROWS), load_expected(version).tolist(), strict=True)) for version in "12"}
EVERY = 4
WRONG_AFTER = 300
KEPT = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    answered = 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answers = [ANSWERS[self.path.rsplit("/", 1)[1]][tuple(row)] for row in body["rows"]]
        Handler.answered += 1
        if MANNER == "leaking":
            KEPT.append(b"x" * 50_000)
        status = 200
        if MANNER == "silent" or (MANNER == "wrong" and Handler.answered > WRONG_AFTER):
            answers = [[p0 + 0.01, p1 - 0.01] for p0, p1 in answers]
        bad_turn = len(body["rows"]) == 1 and Handler.answered > WRONG_AFTER and Handler.answered % EVERY == 0
        if bad_turn and MANNER == "dropping":
            self.close_connection = True
            return
        if bad_turn and MANNER == "erring":
            status = 503
        reply = json.dumps({"oops" if MANNER == "garbled" else "answers": answers}).encode()
        self.send_response(status)
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
