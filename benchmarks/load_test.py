r"""Load one server with Locust's many simulated users, every reply checked,
response times to the microsecond.

    python load_test.py
        starts the onnx server, 8 users for 10 s, prints
    python load_test.py --endpoint bentoml --shape ramp
        users rise step by step; spike and soak are the others
    python load_test.py --address http://10.0.0.5/onnx
        starts none: the users ask whatever answers there
    python load_test.py --processes 2
        two worker processes and a master that adds them up
    locust -f load_test.py --endpoint onnx
        Locust's web page on port 8089, for a server that already runs
    locust -f load_test.py --endpoint onnx --headless --users 8 \
        --run-time 10s --csv results/users
    locust -f load_test.py --master --headless --expect-workers 2 \
        --users 8 --run-time 10s
    locust -f load_test.py --worker
        in another terminal, or on another machine

Without --host Locust asks the endpoint's usual port. Options that are not
listed below go to Locust. Writes nothing by default; --csv PREFIX writes
PREFIX_percentiles.csv and PREFIX_record.json next to Locust's own files. Locust
uses most of a core for some thousand requests a second, so benchmark_all.py
does the measuring and cross_check.py shows the difference; this is for users,
stages and failures.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import signal
import sys
import time
from pathlib import Path

import machine.packages  # noqa: F401

# isort: split
import gevent
import locust.argument_parser
import locust.stats
import numpy as np
from gevent.hub import Hub
from locust import FastHttpUser, LoadTestShape, constant, events, task
from locust.exception import CatchResponseError
from locust.runners import MasterRunner, WorkerRunner
from rich.console import Console

from client.load_record import LoadRecord
from client.locust_process import run_locust
from endpoints.base import Endpoint, Request, ServerError, describe_choices, load_endpoints
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from machine.environment import split_cpus, usable_cpus
from machine.free_ports import find_free_ports
from machine.signals import interrupt_on_sigterm
from servers.process import ServerProcess

ENDPOINTS = {name: value for name, value in load_endpoints().items() if value.protocol == "REST"}  # what Locust speaks
VERSION = "1"
USERS = 8
SHAPE_SECONDS = 60
STOP_TIMEOUT_S = 5.0  # users finish their request: one that is cut off would be only in the server's count
FINAL_REPORT_TIMEOUT_S = 5.0  # beyond STOP_TIMEOUT_S
USERS_INTERVAL_S = 0.05


class StagedShape(LoadTestShape):
    """A number of users that changes over the run and ends it: at most `users` of them, for `duration_s`.

    Locust asks `tick` once a second. `abstract` keeps it from choosing a shape by itself; --shape does.
    """

    abstract = True

    def __init__(self, users: int, duration_s: float):
        super().__init__()
        self.users = users
        self.duration_s = duration_s

    def share(self, position: float) -> float:
        """The share of the users, 0 to 1, that there are at `position`, 0 to 1, of the run."""
        raise NotImplementedError

    def tick(self) -> tuple[int, float] | None:
        run_time_s = self.get_run_time()
        if run_time_s >= self.duration_s:
            return None
        count = math.ceil(self.users * self.share(run_time_s / self.duration_s))
        return min(max(count, 1), self.users), self.users  # all that are missing within the second


class RampShape(StagedShape):
    """From one user to all in equal steps over three quarters of the run, then all: where does it slow down?"""

    abstract = True

    def share(self, position: float) -> float:
        return min(position / 0.75, 1.0)


class SpikeShape(StagedShape):
    """A tenth of the users, all of them in the middle fifth of the run, a tenth again: does it recover?"""

    abstract = True

    def share(self, position: float) -> float:
        return 1.0 if 0.4 <= position < 0.6 else 0.1


class SoakShape(StagedShape):
    """All users after the first tenth of the run, to its end, for hours: does it leak or slow down?"""

    abstract = True

    def share(self, position: float) -> float:
        return min((position + 0.01) / 0.1, 1.0)


SHAPES = {"ramp": RampShape, "spike": SpikeShape, "soak": SoakShape}


class RowUser(FastHttpUser):
    """A user who sends one row of test.csv after the other, on one keep-alive connection."""

    wait_time = constant(0)
    network_timeout = connection_timeout = 30.0
    endpoint: Endpoint  # this and `requests` are set by `prepare`
    requests: list[Request]
    expected = load_expected(VERSION)  # (n, 2)
    turn = itertools.count()  # shared, so that the users together go through all rows
    right_bodies: dict[int, bytes]  # row number -> a body that was decoded and found right

    @classmethod
    def prepare(cls, name: str) -> None:
        """Encode the rows for the endpoint `name`, once."""
        cls.endpoint = ENDPOINTS[name]()
        cls.requests = [cls.endpoint.request([row], VERSION) for row in load_test_rows()[0]]
        cls.right_bodies = {}

    @task
    def predict(self) -> None:
        number = next(self.turn) % len(self.requests)
        request = self.requests[number]
        with self.client.request(
            request.method,
            request.path,
            data=request.body,
            headers={"Content-Type": request.content_type, **request.headers},
            name=f"{self.endpoint.name} {request.path}",
            catch_response=True,
        ) as reply:
            body = reply.content
            if reply.status_code != 200 or body == self.right_bodies.get(number):
                return
            try:
                answer = self.endpoint.decode(body)
            except (ValueError, KeyError, TypeError) as error:
                reply.failure(f"no probabilities in the reply: {error}")
                return
            if self.endpoint.has_model and not np.abs(answer - self.expected[number]).max() <= TOLERANCE:
                reply.failure("wrong answer")
                return
            self.right_bodies[number] = body


class Recorder:
    """Listens to Locust's events and keeps one LoadRecord: of this process, or on a master of all its workers."""

    def __init__(self, environment):
        self.environment = environment
        self.runner = environment.runner
        self.record = LoadRecord()
        self.cpu_mark_s = time.process_time()
        self.waited_for: set[str] = set()  # workers whose last report is still to come
        events.test_start.add_listener(self.reset)
        events.quit.add_listener(self.finish)
        events.quitting.add_listener(self.decide_exit_code)
        if isinstance(self.runner, MasterRunner):
            events.worker_report.add_listener(self.merge_report)
            events.test_stop.add_listener(self.collect_last_reports)
            self.runner.register_message("last_report", self.take_last_report)
        else:
            events.request.add_listener(self.note_request)
        if isinstance(self.runner, WorkerRunner):
            events.report_to_master.add_listener(self.report)
            self.runner.register_message("stop_and_report", self.stop_and_report, concurrent=True)
        else:
            events.test_stop.add_listener(self.count_cpu)
            gevent.spawn(self.watch_users)

    def reset(self, **_) -> None:
        RowUser.prepare(self.environment.parsed_options.endpoint)  # here a worker has its master's options
        self.record = LoadRecord()
        self.cpu_mark_s = time.process_time()

    def note_request(self, response_time, exception, start_time, response, **_) -> None:
        latency_s = response_time / 1000  # Locust's float of time.perf_counter, not yet rounded
        if exception is None:
            self.record.note_answer(start_time, latency_s)
            return
        self.record.note_time(start_time, latency_s)
        if isinstance(exception, CatchResponseError):
            self.record.wrong += 1
        else:
            status = getattr(response, "status_code", 0)
            self.record.errors[f"status {status}" if status else type(exception).__name__] += 1

    def count_cpu(self, **_) -> None:
        now_s = time.process_time()
        if not isinstance(self.runner, MasterRunner):  # a master's own work is not the users'
            self.record.cpu_s += now_s - self.cpu_mark_s
        self.cpu_mark_s = now_s

    def watch_users(self) -> None:
        while True:
            if self.runner.user_count:
                self.record.note_users(time.time(), self.runner.user_count)
            gevent.sleep(USERS_INTERVAL_S)

    def take(self) -> dict:
        """Return a worker's observations since the last call."""
        self.count_cpu()
        taken, self.record = self.record, LoadRecord(self.record.width_s)
        return taken.to_dict()

    def report(self, client_id, data, **_) -> None:
        data["record"] = self.take()

    def merge_report(self, client_id, data, **_) -> None:
        self.record.merge(data["record"])

    def collect_last_reports(self, **_) -> None:
        """Stop the workers' users and wait for their last reports: Locust itself waits half a second."""
        if not self.environment.parsed_options.headless:
            return  # stopped from the web page: the workers stay and go on reporting
        self.waited_for = {client.id for client in self.runner.clients.all}
        for client_id in self.waited_for:
            self.runner.send_message("stop_and_report", client_id=client_id)
        with gevent.Timeout(self.environment.stop_timeout + FINAL_REPORT_TIMEOUT_S, False):
            while self.waited_for & {client.id for client in self.runner.clients.all}:
                gevent.sleep(0.02)

    def stop_and_report(self, environment, msg, **_) -> None:
        self.runner.stop()
        self.runner.send_message("last_report", self.take())

    def take_last_report(self, environment, msg, **_) -> None:
        self.record.merge(msg.data)
        self.waited_for.discard(msg.node_id)

    def decide_exit_code(self, environment, **_) -> None:
        """Fail a run that was started by itself and got no right answer; Locust fails it for wrong and failed ones."""
        options = environment.parsed_options
        if options.headless and not isinstance(self.runner, WorkerRunner) and not self.record.count:
            environment.process_exit_code = 1

    def finish(self, **_) -> None:
        if isinstance(self.runner, WorkerRunner) or not (self.record.count or self.record.errors or self.record.wrong):
            return
        console = Console(highlight=False)
        self.record.print(RowUser.endpoint.name, console)
        prefix = self.environment.parsed_options.csv_prefix
        if prefix:
            console.print(f"wrote {' and '.join(self.record.save(prefix))}", markup=False, soft_wrap=True)


def round_to_three_digits(response_time: float) -> float:
    """Replace Locust's rounding to whole milliseconds: its web page and its JSON then show 0.412 ms, not 0."""
    if response_time <= 0:
        return 0
    return round(response_time, 2 - math.floor(math.log10(response_time)))


locust.stats.bucket_response_time = round_to_three_digits
# A worker of Locust 2.47 builds this once for each option whenever the number of users changes: on a busy machine that
# takes so long that its master takes it for lost.
locust.argument_parser.default_args_dict = functools.cache(locust.argument_parser.default_args_dict)
Hub.NOT_ERROR = (*Hub.NOT_ERROR, KeyboardInterrupt)  # Ctrl-C may reach any greenlet: no traceback of it


def interrupt_once(*_) -> None:
    """Unwind as Ctrl-C does, and let no later SIGTERM disturb that: the kernel sends one a thread of a dead parent."""
    ignore_sigterm()
    raise KeyboardInterrupt


@events.quitting.add_listener
def ignore_sigterm(**_) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@events.init_command_line_parser.add_listener
def add_arguments(parser) -> None:
    parser.add_argument(
        "--endpoint", choices=list(ENDPOINTS), default="onnx", metavar="NAME", help=describe_choices(ENDPOINTS)
    )
    parser.set_defaults(web_host="127.0.0.1")  # Locust's own default lets the whole network start a load
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="stages, up to --users in --run-time (default: all users at all times)"
    )


@events.init.add_listener
def prepare(environment, **_) -> None:
    signal.signal(signal.SIGTERM, interrupt_once)  # until Locust listens for it: only when a shape has ended
    gevent.signal_handler(signal.SIGINT, interrupt_once)  # in its own greenlet, not in a user's
    gevent.get_hub().loop.update_now()  # or --run-time counts from when gevent was imported
    options = environment.parsed_options
    environment.host = environment.host or f"http://127.0.0.1:{ENDPOINTS[options.endpoint]().port}"
    environment.stop_timeout = environment.stop_timeout or STOP_TIMEOUT_S
    if options.shape:
        environment.shape_class = SHAPES[options.shape](options.num_users or USERS, options.run_time or SHAPE_SECONDS)
        environment.shape_class.runner = environment.runner
    Recorder(environment)


def main() -> int:
    interrupt_on_sigterm()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--endpoint", choices=list(ENDPOINTS), default="onnx", metavar="NAME", help=describe_choices(ENDPOINTS)
    )
    parser.add_argument("--users", type=int, default=USERS, help=f"simulated users, at most (default: {USERS})")
    parser.add_argument("--seconds", type=int, default=10, help="how long (default: 10)")
    parser.add_argument("--shape", choices=list(SHAPES), help="stages (default: all users at all times)")
    parser.add_argument("--address", metavar="URL", help="ask what answers there (default: start the server)")
    arguments, for_locust = parser.parse_known_args()
    if arguments.users < 1 or arguments.seconds < 1:
        parser.error("--users and --seconds: expected at least 1")
    endpoint_class = ENDPOINTS[arguments.endpoint]
    endpoint = endpoint_class.at(arguments.address) if arguments.address else endpoint_class.on_free_ports()
    server_cpus, _ = split_cpus()
    between_processes = []
    if any(option.startswith("--processes") for option in for_locust):  # Locust's own port is fixed, on all addresses
        port = str(find_free_ports(["master"])["master"])
        between_processes = ["--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-port", port]
    with contextlib.nullcontext() if arguments.address else ServerProcess(endpoint, server_cpus):
        if server_cpus is not None and not arguments.address:
            os.sched_setaffinity(0, set(usable_cpus()) - server_cpus)  # Locust inherits it
        return run_locust([
            "--headless", "--only-summary", "--endpoint", endpoint.name,
            "--host", f"http://{endpoint.host}:{endpoint.port}{endpoint.prefix}",
            "--users", str(arguments.users), "--spawn-rate", str(arguments.users),
            "--run-time", f"{arguments.seconds}s",
            *(["--shape", arguments.shape] if arguments.shape else []),
            *between_processes, *for_locust,
        ])  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServerError as error:
        sys.exit(f"{Path(__file__).stem}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{Path(__file__).stem}: interrupted; the server is stopped")
