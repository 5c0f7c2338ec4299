"""When and where a model runs: requests that arrive together share a run, and a slow run blocks nobody.

When several connections have sent something, the event loop hears of all of them in one turn. The first request asks
for a run once a turn has brought no further one: by then the others have joined, and those that came while they were
read. Nobody waits on a clock, only while there is something to read; and who comes alone, after one who came alone,
does not wait at all.
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
SLOW_RUNS = 3  # so many in a row, because anything may be late once
MANY_JOBS = 256  # that have joined are not kept waiting for more
RUNS_AT_ONCE = os.cpu_count() or 1  # of one model in threads

threads = concurrent.futures.ThreadPoolExecutor(4 * RUNS_AT_ONCE, thread_name_prefix="run")


class Job:
    """What one request wants computed, and who is told of the answer."""

    __slots__ = ("asker", "done", "feeds", "key", "rows", "size", "wanted")

    asker: Any  # the request that gets the answer
    done: Callable[["Job", Any], None]  # is called on the event loop with this job and its answer, or the exception

    def __init__(self, feeds: Any, rows: int, size: int, key: Any, wanted: Any = None):
        self.feeds = feeds  # what the model's `run` takes
        self.rows = rows  # along the first dimension
        self.size = size  # elements: how much work it is
        self.key = key  # jobs share a run if these are equal; None: with no other
        self.wanted = wanted  # what is to be written of the answer, for the codec that has read this


class Counts(NamedTuple):
    """What a model has done."""

    executions: int
    rows: int  # predicted
    run_s: float


class Batcher:
    """Runs the jobs of one model."""

    def __init__(self, run: Callable[[list[Job]], list], max_rows: int, quick_size: int):
        """`run` computes jobs of one key to their answers; `max_rows` bounds what shares a run, 0: nothing does.

        `quick_size`: so many elements at once are known to take less than SLOW_S.
        """
        self.run = run
        self.max_rows = max_rows
        self.quick_size = quick_size
        self.slow_size = math.inf  # so many have taken longer in a thread: they never come back to the event loop
        self.slow_runs = 0
        self.waiting: list[Job] = []
        self.joined = 0  # that many waited in the last turn
        self.is_busy = False  # jobs come together: the next one is made to wait for others
        self.running = 0  # in threads
        self.lock = threading.Lock()  # of the counts
        self.counts = Counts(0, 0, 0.0)

    def add(self, job: Job) -> None:
        """Compute `job`, together with others where it may; then it is `done`."""
        if self.max_rows and job.key is not None:
            if self.waiting:
                self.waiting.append(job)
            elif self.is_busy or job.size > self.quick_size:
                self.joined = 0
                self.waiting.append(job)
                asyncio.get_running_loop().call_soon(self.flush_when_complete)
            else:  # nobody came with the one before: this one does not wait for others either
                self.is_busy = True
                asyncio.get_running_loop().call_soon(self.end_turn)
                self.compute([job])
        elif job.size <= self.quick_size:
            self.compute([job])
        else:
            self.waiting.append(job)
            self.flush()

    def end_turn(self) -> None:
        """After the turn of a job that was computed at once: whether others came in it."""
        self.is_busy = bool(self.waiting)

    def flush_when_complete(self) -> None:
        """Start what waits once a turn of the event loop has brought nobody new."""
        count = len(self.waiting)
        if self.joined < count < MANY_JOBS:
            self.joined = count
            asyncio.get_running_loop().call_soon(self.flush_when_complete)
        else:
            self.is_busy = count > 1
            self.flush()

    def flush(self) -> None:
        """Start what waits."""
        while self.waiting and self.running < RUNS_AT_ONCE:
            batch, size = self.take()
            if size <= self.quick_size:
                self.compute(batch)
            else:
                self.running += 1
                loop = asyncio.get_running_loop()
                threads.submit(self.compute_in_thread, batch, size, loop)

    def take(self) -> tuple[list[Job], int]:
        """Take from what waits the jobs of the next run, at least one; return them and their elements."""
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
        """Run here, on the event loop."""
        started_s = time.thread_time()
        answers = self.answer(batch)
        self.note(time.thread_time() - started_s)
        for job, answer in zip(batch, answers, strict=True):
            job.done(job, answer)

    def note(self, seconds: float) -> None:
        """Look whether runs on the event loop are as quick as they were."""
        if seconds <= SLOW_S:
            self.slow_runs = 0
            return
        self.slow_runs += 1
        if self.slow_runs >= SLOW_RUNS:
            self.slow_runs = 0
            self.quick_size //= 2  # what is larger goes to a thread, and comes back if it is quick there

    def compute_in_thread(self, batch: list[Job], size: int, loop: asyncio.AbstractEventLoop) -> None:
        started_s = time.thread_time()
        answers = self.answer(batch)
        seconds = time.thread_time() - started_s
        loop.call_soon_threadsafe(self.finish, batch, answers, size, seconds)

    def finish(self, batch: list[Job], answers: list, size: int, seconds: float) -> None:
        """Back on the event loop: hand out the answers, start what has waited meanwhile."""
        self.running -= 1
        if seconds > SLOW_S:
            self.slow_size = min(self.slow_size, size)
        elif seconds < SLOW_S / 2 and size < self.slow_size:
            self.quick_size = max(self.quick_size, size)
        for job, answer in zip(batch, answers, strict=True):
            job.done(job, answer)
        self.flush()

    def answer(self, batch: list[Job]) -> list:
        """Return the jobs' answers; where the run fails, each runs alone, so that none fails for another."""
        started_s = time.perf_counter()
        try:
            answers = self.run(batch)
            rows, run_s = sum([job.rows for job in batch]), time.perf_counter() - started_s
            with self.lock:
                done = self.counts
                self.counts = Counts(done.executions + 1, done.rows + rows, done.run_s + run_s)
            return answers
        except Exception as error:  # noqa: BLE001 - it becomes the answer to whoever asked
            if len(batch) == 1:
                return [error]
            return [answer for job in batch for answer in self.answer([job])]

    def take_counts(self) -> Counts:
        """Return what was done since this was last asked."""
        with self.lock:
            counts, self.counts = self.counts, Counts(0, 0, 0.0)
        return counts
