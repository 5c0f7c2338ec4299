"""Request batching: concurrent requests to one signature share a run of the graph (--enable_batching).

The parameters are those of TensorFlow Serving's batching_parameters_file (tensorflow_serving/batching/README.md).
"""

import asyncio
import collections
import functools
import itertools
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

FORM = re.compile(r"(\w+)\s*(?:\{\s*value\s*:\s*(-?\d+)\s*\}|:\s*(\d+))")
WRAPPED = ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads")
WHOLE_WAIT_EVERY = 256  # batches


class BatchingError(Exception):
    """The parameters cannot be used; the message is one line."""


@dataclass(frozen=True)
class BatchingParameters:
    """TensorFlow Serving's parameters with its default values."""

    max_batch_size: int = 1000  # rows in one run; a larger request is refused
    batch_timeout_micros: int = 0  # the longest wait of a batch that is not full; 0: no wait
    max_enqueued_batches: int = 10  # full batches that may wait; further requests are refused
    num_batch_threads: int = field(default_factory=lambda: os.cpu_count() or 1)  # batches of a slow graph run at once
    allowed_batch_sizes: tuple[int, ...] = field(default=())  # a batch is padded to the next of them


def read_parameters(path: Path) -> BatchingParameters:
    """Return the parameters in the text-format BatchingParameters file `path`. Raises BatchingError.

    Parsed here, because the stubs of tensorflow-serving-api lack session_bundle_config_pb2.
    """
    try:
        text = re.sub(r"#[^\n]*", "", path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise BatchingError(f"{path}: {error}; check --batching_parameters_file") from None
    values: dict = {}
    position = 0
    while rest := text[position:].lstrip():
        position = len(text) - len(rest)
        match = FORM.match(text, position)
        name = match[1] if match else rest.split()[0]
        if match and name == "allowed_batch_sizes" and match[3]:
            values.setdefault(name, []).append(int(match[3]))
        elif match and name in WRAPPED and match[2] and name not in values:
            values[name] = int(match[2])
        else:
            raise BatchingError(
                f"Error parsing text-format tensorflow.serving.BatchingParameters: {path}: near {name!r}"
            )
        position = match.end()
    sizes = tuple(values.pop("allowed_batch_sizes", ()))
    parameters = BatchingParameters(**values, allowed_batch_sizes=sizes)
    positive = {name: getattr(parameters, name) for name in WRAPPED if name != "batch_timeout_micros"}
    if min(positive.values()) < 1 or parameters.batch_timeout_micros < 0:
        raise BatchingError(f"{path}: {', '.join(positive)} must be positive, batch_timeout_micros not negative")
    if sizes and (list(sizes) != sorted(set(sizes)) or sizes[-1] != parameters.max_batch_size):
        raise BatchingError(f"{path}: allowed_batch_sizes must rise, and the last must equal max_batch_size")
    return parameters


class Waiting(NamedTuple):
    """A request that waits for its batch."""

    arrays: list[np.ndarray]
    rows: int
    future: asyncio.Future


class Batcher:
    """Collects requests to one signature, on the event loop, and calls `run` once for each batch.

    A batch waits until it has as many requests as the batch before it, and batch_timeout_micros at most: clients
    that ask again after each answer come back in the same number, and a single client is not delayed. Every 256th
    batch waits the whole time, to detect more clients.

    A quick graph runs on the event loop. A slow one would delay all other requests, so its batches run on
    num_batch_threads threads; while all of them are busy, requests collect for the next batch.
    """

    def __init__(
        self,
        run: Callable[..., list[np.ndarray]],
        parameters: BatchingParameters,
        is_slow: Callable[[], bool] = lambda: False,
    ):
        """`run` maps the input arrays, with the rows in their first dimension, to the output arrays."""
        self.run = run
        self.parameters = parameters
        self.is_slow = is_slow
        self.waiting: collections.deque[Waiting] = collections.deque()
        self.rows = 0
        self.running = 0  # batches on threads
        self.flush_asked = False
        self.timer: asyncio.TimerHandle | None = None
        self.batches = 0
        self.last_requests = 0  # in the batch before this one

    def add(self, arrays: list[np.ndarray], rows: int) -> asyncio.Future | None:
        """Return a future of the output arrays for these `rows`, or None if the queue is full."""
        parameters = self.parameters
        if self.rows + rows > parameters.max_batch_size * parameters.max_enqueued_batches:
            return None
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.waiting.append(Waiting(arrays, rows, future))
        self.rows += rows
        if not self.flush_asked:
            if self._is_due():
                self.flush_asked = True
                self._stop_timer()
                # One turn later, so that the requests that the event loop reads until then can join.
                loop.call_soon(loop.call_soon, self.flush)
            elif self.timer is None:
                self.timer = loop.call_later(parameters.batch_timeout_micros / 1e6, self.flush)
        return future

    def _is_due(self) -> bool:
        if not self.parameters.batch_timeout_micros or self.rows >= self.parameters.max_batch_size:
            return True
        return len(self.waiting) >= self.last_requests and self.batches % WHOLE_WAIT_EVERY != 0

    def _stop_timer(self) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer = None

    def flush(self) -> None:
        """Run the waiting requests in batches of at most max_batch_size rows; a request is never split."""
        self._stop_timer()
        self.flush_asked = False
        is_slow = self.is_slow()
        if is_slow and self.running == self.parameters.num_batch_threads:
            return  # more may join until a thread is free
        self.batches += 1
        self.last_requests = len(self.waiting)
        while self.waiting:
            if not is_slow:
                deliver(self._compute(self._take()))
            elif self.running < self.parameters.num_batch_threads:
                self.running += 1
                loop = asyncio.get_running_loop()
                loop.run_in_executor(self._threads, self._compute, self._take()).add_done_callback(self._end)
            else:
                break

    def _end(self, computed: asyncio.Future) -> None:
        self.running -= 1
        deliver(computed.result())
        if self.waiting and not self.flush_asked and self.timer is None:
            self.flush()

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.parameters.num_batch_threads, "batch")

    def _take(self) -> list[Waiting]:
        """Remove a batch from the waiting requests, without those that were cancelled."""
        batch, count = [], 0
        while self.waiting and (not batch or count + self.waiting[0].rows <= self.parameters.max_batch_size):
            request = self.waiting.popleft()
            self.rows -= request.rows
            if not request.future.done():  # done means cancelled: its client has left
                batch.append(request)
                count += request.rows
        return batch

    def _compute(self, batch: list[Waiting]) -> list[tuple[asyncio.Future, list[np.ndarray] | Exception]]:
        """Run a batch; return each future with its result or exception."""
        if not batch:
            return []
        count = sum(request.rows for request in batch)
        try:
            columns = zip(*(request.arrays for request in batch), strict=True)
            joined = [column[0] if len(batch) == 1 else np.concatenate(column) for column in columns]
            size = next((size for size in self.parameters.allowed_batch_sizes if size >= count), count)
            if size > count:  # padded with copies of the first row, as TensorFlow Serving does
                joined = [np.concatenate([array, np.repeat(array[:1], size - count, axis=0)]) for array in joined]
            outputs = self.run(*joined)
            if any(array.ndim == 0 or len(array) != size for array in outputs):
                raise ValueError(
                    "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension sizes"
                )
        except Exception as error:  # noqa: BLE001 - it becomes the requests' own error
            if len(batch) > 1 and not isinstance(error, MemoryError):
                # Each separately: a bad request must not fail the others.
                return [answer for request in batch for answer in self._compute([request])]
            return [(request.future, error) for request in batch]
        ends = itertools.accumulate(request.rows for request in batch)
        return [
            (request.future, [array[end - request.rows : end] for array in outputs])
            for request, end in zip(batch, ends, strict=True)
        ]


def deliver(answers: list[tuple[asyncio.Future, list[np.ndarray] | Exception]]) -> None:
    """Set the result or exception of each future; called on the event loop."""
    for future, answer in answers:
        if future.done():  # cancelled while the batch ran
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def rows_of(arrays: list[np.ndarray]) -> int | None:
    """Return the size of the arrays' common first dimension; None if they have none and cannot be batched."""
    sizes = {array.shape[0] if array.ndim else math.nan for array in arrays}
    return sizes.pop() if len(sizes) == 1 and not any(array.ndim == 0 for array in arrays) else None
