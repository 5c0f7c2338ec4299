"""Load one server with Locust's many simulated users, every reply checked.

    python load_test.py --endpoint onnx     starts the server, 8 users for 10 s, prints Locust's table
    locust -f load_test.py --endpoint onnx  Locust's web page on port 8089, for a server that already runs
    locust -f load_test.py --endpoint onnx --headless --users 8 --run-time 10s

Without --host Locust asks the endpoint's usual port. Writes nothing unless Locust is told to (--csv).
Locust keeps its statistics in whole milliseconds and uses most of a core for some thousand requests
a second, so benchmark_all.py does the measuring; this shows users, ramps and failures.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
from endpoint import load_endpoints
from locust import FastHttpUser, constant, events, task
from reference import TOLERANCE, load_expected, load_test_rows
from server_process import ServerError, ServerProcess, find_free_ports, interrupt_on_sigterm

ENDPOINTS = load_endpoints()
VERSION = "1"


@events.init_command_line_parser.add_listener
def add_arguments(parser) -> None:
    parser.add_argument("--endpoint", choices=list(ENDPOINTS), default="onnx", help="which server (default: onnx)")
    parser.set_defaults(web_host="127.0.0.1")  # Locust's own default lets the whole network start a load


@events.init.add_listener
def choose_endpoint(environment, **_) -> None:
    endpoint = ENDPOINTS[environment.parsed_options.endpoint]()
    RowUser.endpoint = endpoint
    environment.host = environment.host or f"http://127.0.0.1:{endpoint.ports['rest']}"


class RowUser(FastHttpUser):
    """A user who sends one row of test.csv after the other, on one keep-alive connection."""

    endpoint = None  # set by choose_endpoint
    wait_time = constant(0)
    rows = load_test_rows()[0]
    expected = load_expected(VERSION)  # (n, 2)
    turn = itertools.count()  # shared, so that the users together go through all rows

    @task
    def predict(self) -> None:
        number = next(self.turn) % len(self.rows)
        request = self.endpoint.request([self.rows[number]], VERSION)
        with self.client.request(
            request.method,
            request.path,
            data=request.body,
            headers={"Content-Type": request.content_type},
            name=f"{self.endpoint.name} {request.path}",
            catch_response=True,
        ) as reply:
            if reply.status_code != 200 or not self.endpoint.has_model:
                return
            try:
                difference = np.abs(self.endpoint.decode(reply.content) - self.expected[number]).max()
            except (ValueError, KeyError, TypeError) as error:
                reply.failure(f"no probabilities in the reply: {error}")
                return
            if not difference <= TOLERANCE:
                reply.failure("wrong answer")


def main() -> int:
    interrupt_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", choices=list(ENDPOINTS), default="onnx", help="which server (default: onnx)")
    parser.add_argument("--users", type=int, default=8, help="simulated users (default: 8)")
    parser.add_argument("--seconds", type=int, default=10, help="how long (default: 10)")
    arguments = parser.parse_args()
    endpoint_class = ENDPOINTS[arguments.endpoint]
    endpoint = endpoint_class(find_free_ports(list(endpoint_class.default_ports)))
    with ServerProcess(endpoint):
        locust = [sys.executable, "-m", "locust", "-f", str(Path(__file__).resolve()), "--endpoint", endpoint.name]
        load = ["--headless", "--users", str(arguments.users), "--spawn-rate", str(arguments.users)]
        bounds = ["--run-time", f"{arguments.seconds}s", "--only-summary"]
        host = ["--host", f"http://127.0.0.1:{endpoint.ports['rest']}"]
        return subprocess.run([*locust, *load, *bounds, *host], check=False).returncode


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServerError as error:
        sys.exit(f"load_test: {error}")
    except KeyboardInterrupt:
        sys.exit("load_test: interrupted; the server is stopped")
