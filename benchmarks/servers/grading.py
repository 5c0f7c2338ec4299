"""The assignment "add a fifth server", decided by a program: is it right, does it refuse, does it hold, does it end?"""

import hashlib
import http.client
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from client.ask import send
from client.load_generator import LoadGenerator, make_exchanges, poisson_arrivals
from endpoints.base import Endpoint, Request, ServerError
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from figures.result_file import Window
from machine.environment import describe_environment
from servers.parity import find_problem, max_abs_difference
from servers.process import ServerProcess

MOST_POINTS = {"starts": 10, "right answers": 40, "bad input": 20, "load": 20, "ends": 10}
GOOD_ROW = [13.82, 24.49, 0.1162, 0.1357, 0.2275]
JUNK_BYTES = 1_000_000
CONNECTIONS = 16
LOAD_S = 3.0
OPEN_SHARE = 0.3  # of the closed loop's rate that the open loop offers
OBJECTIVE_P99_S = 0.05
LEAST_FOR_P99 = 1000  # requests
ANSWER_TIMEOUT_S = 30.0


@dataclass
class Part:
    """One part of the grade."""

    name: str
    most: int  # points
    points: int = 0
    found: list[str] = field(default_factory=list)  # what was seen, a sentence each


@dataclass
class Grade:
    """The receipt of one endpoint."""

    endpoint: str
    file: str
    file_sha256: str
    environment: dict[str, Any]
    parts: list[Part]

    @property
    def points(self) -> int:
        return sum(part.points for part in self.parts)

    @property
    def most(self) -> int:
        return sum(part.most for part in self.parts)

    @property
    def passed(self) -> bool:
        """Whether the assignment is done: it starts, is right, and loses nothing under load."""
        return all(part.points == part.most for part in self.parts if part.name in ("starts", "right answers", "load"))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "points": self.points, "most": self.most, "passed": self.passed}


def grade(endpoint_class: type[Endpoint], tell: Callable[[str], None] = lambda _: None) -> Grade:
    """Start an endpoint's server on free ports, judge it, and stop it; a server that does not start gets no points."""
    file = find_file(endpoint_class)
    parts = {name: Part(name, most) for name, most in MOST_POINTS.items()}
    result = Grade(
        endpoint_class.name, file.name, hashlib.sha256(file.read_bytes()).hexdigest(),
        describe_environment(endpoint_class.packages), list(parts.values()),
    )  # fmt: skip
    endpoint = endpoint_class.on_free_ports()
    try:
        tell("starts")
        with ServerProcess(endpoint) as server:
            parts["starts"].points = parts["starts"].most
            parts["starts"].found.append(f"the first right answer came after {server.ready_s:.1f} s")
            for name, judge in (("right answers", judge_answers), ("bad input", judge_refusals), ("load", judge_load)):
                tell(name)
                try:
                    judge(endpoint, parts[name])
                except (ServerError, OSError, ValueError, http.client.HTTPException) as error:
                    parts[name].points = 0
                    parts[name].found.append(str(error))
            processes = server.processes()
        tell("ends")
        left = [process.pid for process in processes if process.is_running() and not _is_zombie(process)]
        parts["ends"].points = 0 if left else parts["ends"].most
        parts["ends"].found.append(
            f"processes {left} are left" if left else f"of {len(processes)} processes none is left"
        )
    except (ServerError, OSError) as error:
        parts["starts"].found.append(str(error))
    return result


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def find_file(endpoint_class: type[Endpoint]) -> Path:
    """Return the file that an endpoint's class stands in."""
    return Path(inspect.getfile(endpoint_class))


def judge_answers(endpoint: Endpoint, part: Part) -> None:
    """Half of the points for each version whose every row is the reference's, one by one and all at once."""
    if not endpoint.has_model:
        part.found.append("it has no model: nothing is right or wrong")
        return
    for version in endpoint.versions:
        difference = max_abs_difference(endpoint, version)
        is_right = difference <= TOLERANCE
        part.points += part.most // len(endpoint.versions) * is_right
        part.found.append(f"version {version}: max |Δp| {difference:.1e}, {'equal' if is_right else 'NOT equal'}")


def list_bad_requests(endpoint: Endpoint) -> Iterator[tuple[str, Request]]:
    """Yield bad requests in the endpoint's own format with their names."""
    row = GOOD_ROW
    bodies: dict[str, Any] = {
        "four features": [row[:4]], "six features": [[*row, 1.0]], "ragged rows": [row, row[:4]], "no rows": [],
        "a string among numbers": [["abc", *row[1:]]], "null among numbers": [[None, *row[1:]]], "null for rows": None,
        "NaN": [[float("nan"), *row[1:]]],
    }  # fmt: skip
    for name, rows in bodies.items():
        yield name, endpoint.request(rows, "1")
    path = endpoint.path("1")
    yield "malformed JSON", Request(path, endpoint.body([row], "1")[:-3])
    yield "an empty body", Request(path, b"")
    yield "a megabyte of junk", Request(path, b"x" * JUNK_BYTES)
    yield "an unknown version", endpoint.request([row], "99")


def judge_refusals(endpoint: Endpoint, part: Part) -> None:
    """A share of the points for each bad request that is refused with a 4xx and leaves the server answering rightly."""
    if endpoint.protocol != "REST":
        part.points = part.most
        part.found.append("asked over REST only: not judged over gRPC")
        return
    requests = list(list_bad_requests(endpoint))
    good = 0
    for name, request in requests:
        try:
            status, _ = send(endpoint.port, request, ANSWER_TIMEOUT_S)
            is_refused, seen = 400 <= status < 500, f"answered {status}"
        except (OSError, http.client.HTTPException) as error:
            is_refused, seen = False, f"gave no answer ({type(error).__name__})"
        problem = find_problem(endpoint, "1")
        good += is_refused and not problem
        if not is_refused:
            part.found.append(f"{name}: {seen}, not 4xx")
        if problem:
            part.found.append(f"after {name} it does not answer rightly: {problem}")
    part.points = part.most * good // len(requests)
    part.found.append(f"{good} of {len(requests)} bad requests are refused with a 4xx and change nothing")


def judge_load(endpoint: Endpoint, part: Part) -> None:
    """Half of the points for a closed loop, half for an open one, each without a failed or wrong answer."""
    rows, _ = load_test_rows()
    expected = load_expected("1") if endpoint.has_model else np.empty((len(rows), 2))
    exchanges = make_exchanges(endpoint, "1", rows, expected, 1)
    with LoadGenerator(endpoint, exchanges, CONNECTIONS) as load:
        closed = load.run_closed(LOAD_S)
        rate = max(OPEN_SHARE * closed.rate, 1.0)
        opened = load.run_open(poisson_arrivals(rate, LOAD_S, seed=1))
    for window, what in ((closed, f"{CONNECTIONS} connections"), (opened, f"{rate:,.0f} requests/s offered")):
        bad = _count_bad(window)
        part.points += part.most // 2 * (not bad and len(window.latencies_s) > 0)
        part.found.append(f"{what} for {LOAD_S:g} s: {len(window.latencies_s):,} right answers, {bad} failed or wrong")
    if len(opened.latencies_s) >= LEAST_FOR_P99:
        p99_s = float(np.percentile(opened.latencies_s, 99))
        within = "within" if p99_s <= OBJECTIVE_P99_S else "NOT within"
        part.found.append(f"p99 {p99_s * 1e3:.1f} ms there, {within} {OBJECTIVE_P99_S * 1e3:g} ms (told, not graded)")


def _count_bad(window: Window) -> int:
    return window.errors.total() + window.wrong


def format_receipt(result: Grade) -> str:
    """Return the receipt, one page of Markdown that ends with the digest of what stands above."""
    environment = result.environment
    lines = [
        f"# {result.endpoint}: {result.points} of {result.most} points, {'passed' if result.passed else 'NOT passed'}",
        "",
        "| part | points | seen |",
        "|---|---:|---|",
    ]
    for part in result.parts:
        seen = "; ".join(part.found).replace("|", "\\|").replace("\n", " ") or "not reached"
        lines.append(f"| {part.name} | {part.points} of {part.most} | {seen} |")
    lines += [
        "",
        "Passed: it starts, every row of both versions is the reference's, and no request is lost under load.",
        "",
        f"- `{result.file}`, SHA-256 {result.file_sha256}",
        f"- {environment['utc']}, {environment['cpu']}, {environment['cores']} cores, {environment['system']}, Python "
        f"{environment['python']}, commit {environment['git_commit'] or 'unknown'}"
        f"{' with changes' if environment['git_dirty'] else ''}",
    ]
    text = "\n".join(lines) + "\n"
    return f"{text}\nDigest of the lines above: {hashlib.sha256(text.encode()).hexdigest()}\n"


def is_receipt_whole(text: str) -> bool:
    """Whether a receipt's digest is that of its lines: it was not edited by somebody who did not mean to forge it."""
    body, mark, digest = text.rpartition("\nDigest of the lines above: ")
    return bool(mark) and hashlib.sha256(body.encode()).hexdigest() == digest.strip()


def write_receipt(result: Grade, folder: Path) -> Path:
    """Write grade-<endpoint>.md and .json; return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"grade-{result.endpoint}.md"
    page.write_text(format_receipt(result))
    page.with_suffix(".json").write_text(json.dumps(result.as_dict(), indent=1) + "\n")
    return page
