"""Decide when and where a model runs: requests that arrive together share a run, and a slow run blocks no other.

When several connections have sent requests, the event loop reads all of them in one turn. The run starts after the
first turn that brings no further request, so it includes those that arrived while the others were read. No request
waits for a timer, only while there is something to read. A single request that follows a single request does not wait
at all.
"""

import asyncio
import concurrent.futures
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

SLOW_S = 1e-3  # a run that takes longer goes to a thread; handing it over and back takes a tenth of that
SLOW_RUNS = 3  # in a row: a single slow run may be chance
MANY_JOBS = 256  # with this many waiting, the run starts without waiting for more
RUNS_AT_ONCE = os.cpu_count() or 1  # of one model in threads

threads = concurrent.futures.ThreadPoolExecutor(4 * RUNS_AT_ONCE, thread_name_prefix="run")


class Job:
    """The input of one request to a model, and the callback that receives the answer."""

    __slots__ = ("asker", "done", "feeds", "key", "rows", "size", "wanted")

    asker: Any  # the request that gets the answer
    done: Callable[["Job", Any], None]  # called on the event loop with this job and its answer, or the exception

    def __init__(self, feeds: Any, rows: int, size: int, key: Any, wanted: Any = None):
        self.feeds = feeds  # input of the model's `run`
        self.rows = rows  # along the first dimension
        self.size = size  # number of elements, a measure of the work
        self.key = key  # jobs with equal keys share a run; None: never shared
        self.wanted = wanted  # the outputs to write, for the codec that read the request


class Counts(NamedTuple):
    """Counts of a model's work."""

    executions: int
    rows: int  # predicted
    run_s: float


class Batcher:
    """Runs the jobs of one model."""

    def __init__(self, run: Callable[[list[Job]], list], max_rows: int, quick_size: int):
        """`run` returns the answers to jobs of one key; `max_rows` limits the rows of a shared run, 0: none is shared.

        `quick_size`: this many elements at once are known to take less than SLOW_S.
        """
        self.run = run
        self.max_rows = max_rows
        self.quick_size = quick_size
        self.slow_size = math.inf  # this many were slow in a thread too: they never return to the event loop
        self.slow_runs = 0
        self.waiting: list[Job] = []
        self.joined = 0  # number waiting in the last turn
        self.is_busy = False  # jobs arrive together: the next one waits for others
        self.running = 0  # in threads
        self.lock = threading.Lock()  # of the counts
        self.counts = Counts(0, 0, 0.0)

    def add(self, job: Job) -> None:
        """Compute `job`, together with others if it may, and call its `done`."""
        if self.max_rows and job.key is not None:
            if self.waiting:
                self.waiting.append(job)
            elif self.is_busy or job.size > self.quick_size:
                self.joined = 0
                self.waiting.append(job)
                asyncio.get_running_loop().call_soon(self.flush_when_complete)
            else:  # the previous one came without others: this one does not wait either
                self.is_busy = True
                asyncio.get_running_loop().call_soon(self.end_turn)
                self.compute([job])
        elif job.size <= self.quick_size:
            self.compute([job])
        else:
            self.waiting.append(job)
            self.flush()

    def end_turn(self) -> None:
        """Note whether other jobs came in the turn of a job that was computed at once."""
        self.is_busy = bool(self.waiting)

    def flush_when_complete(self) -> None:
        """Start the waiting jobs once a turn of the event loop has brought no new one."""
        count = len(self.waiting)
        if self.joined < count < MANY_JOBS:
            self.joined = count
            asyncio.get_running_loop().call_soon(self.flush_when_complete)
        else:
            self.is_busy = count > 1
            self.flush()

    def flush(self) -> None:
        """Start the waiting jobs."""
        while self.waiting and self.running < RUNS_AT_ONCE:
            batch, size = self.take()
            if size <= self.quick_size:
                self.compute(batch)
            else:
                self.running += 1
                loop = asyncio.get_running_loop()
                threads.submit(self.compute_in_thread, batch, size, loop)

    def take(self) -> tuple[list[Job], int]:
        """Take the jobs of the next run from the waiting ones, at least one; return them and their elements."""
        waiting = self.waiting
        first = waiting[0]
        if first.key is None or not self.max_rows:
            del waiting[0]
            return [first], first.size
        batch, others, rows, size = [], [], 0, 0
        for place, job in enumerate(waiting):
            if job.key != first.key:
                others.append(job)
            elif batch and rows + job.rows > self.max_rows:  # one job is never split
                others += waiting[place:]
                break
            else:
                batch.append(job)
                rows += job.rows
                size += job.size
        self.waiting = others
        return batch, size

    def compute(self, batch: list[Job]) -> None:
        """Run the jobs on the event loop."""
        started_s = time.thread_time()
        answers = self.answer(batch)
        self.note(time.thread_time() - started_s)
        for job, answer in zip(batch, answers, strict=True):
            job.done(job, answer)

    def note(self, seconds: float) -> None:
        """Check that runs on the event loop are still quick."""
        if seconds <= SLOW_S:
            self.slow_runs = 0
            return
        self.slow_runs += 1
        if self.slow_runs >= SLOW_RUNS:
            self.slow_runs = 0
            self.quick_size //= 2  # larger ones go to a thread, and return if they are quick there

    def compute_in_thread(self, batch: list[Job], size: int, loop: asyncio.AbstractEventLoop) -> None:
        started_s = time.thread_time()
        answers = self.answer(batch)
        seconds = time.thread_time() - started_s
        loop.call_soon_threadsafe(self.finish, batch, answers, size, seconds)

    def finish(self, batch: list[Job], answers: list, size: int, seconds: float) -> None:
        """Hand out the answers, on the event loop again; start the jobs that have arrived since."""
        self.running -= 1
        if seconds > SLOW_S:
            self.slow_size = min(self.slow_size, size)
        elif seconds < SLOW_S / 2 and size < self.slow_size:
            self.quick_size = max(self.quick_size, size)
        for job, answer in zip(batch, answers, strict=True):
            job.done(job, answer)
        self.flush()

    def answer(self, batch: list[Job]) -> list:
        """Return the jobs' answers; if the run fails, run each separately, so that none fails because of another."""
        started_s = time.perf_counter()
        try:
            answers = self.run(batch)
            rows, run_s = sum([job.rows for job in batch]), time.perf_counter() - started_s
            with self.lock:
                done = self.counts
                self.counts = Counts(done.executions + 1, done.rows + rows, done.run_s + run_s)
            return answers
        except Exception as error:  # noqa: BLE001 - it becomes the answer to the request
            if len(batch) == 1:
                return [error]
            return [answer for job in batch for answer in self.answer([job])]

    def take_counts(self) -> Counts:
        """Return the counts since the last call, and reset them."""
        with self.lock:
            counts, self.counts = self.counts, Counts(0, 0, 0.0)
        return counts
