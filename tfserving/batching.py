"""Request batching: concurrent requests to one signature share a run of the graph (--enable_batching).

The parameters are those of TensorFlow Serving's batching_parameters_file (tensorflow_serving/batching/README.md).
"""

import asyncio
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FORM = re.compile(r"(\w+)\s*(?:\{\s*value\s*:\s*(-?\d+)\s*\}|:\s*(\d+))")
WRAPPED = ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads")


class BatchingError(Exception):
    """The parameters cannot be used; the message is one line."""


@dataclass(frozen=True)
class BatchingParameters:
    """TensorFlow Serving's parameters with its default values."""

    max_batch_size: int = 1000  # rows in one run; a larger request is refused
    batch_timeout_micros: int = 0  # how long a batch that is not full waits for more; 0: only for what is there
    max_enqueued_batches: int = 10  # full batches that may wait; a request beyond them is refused
    num_batch_threads: int = 1  # batches run at once; the local server has one thread and ignores it
    allowed_batch_sizes: tuple[int, ...] = field(default=())  # a batch is padded to the next of them


def read_parameters(path: Path) -> BatchingParameters:
    """Return the parameters in the text-format BatchingParameters file `path`. Raises BatchingError.

    Read by hand: the stubs of tensorflow-serving-api lack session_bundle_config_pb2.
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
    if parameters.max_batch_size < 1 or parameters.max_enqueued_batches < 1 or parameters.batch_timeout_micros < 0:
        raise BatchingError(f"{path}: max_batch_size and max_enqueued_batches must be positive")
    if sizes and (list(sizes) != sorted(set(sizes)) or sizes[-1] != parameters.max_batch_size):
        raise BatchingError(f"{path}: allowed_batch_sizes must rise, and the last must equal max_batch_size")
    return parameters


class Batcher:
    """Collects requests to one signature. Lives on the event loop; `run` does the work, once for all of a batch."""

    def __init__(self, run, parameters: BatchingParameters):
        """`run` takes the input arrays, each with the rows in its first dimension, to the output arrays."""
        self.run = run
        self.parameters = parameters
        self.waiting: list[tuple[list[np.ndarray], int, asyncio.Future]] = []
        self.rows = 0
        self.flush_asked = False

    def add(self, arrays: list[np.ndarray], rows: int) -> asyncio.Future | None:
        """Return a future of the output arrays for these `rows`, or None where the queue is full."""
        parameters = self.parameters
        if self.rows + rows > parameters.max_batch_size * parameters.max_enqueued_batches:
            return None
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self.waiting.append((arrays, rows, future))
        self.rows += rows
        if not self.flush_asked:
            self.flush_asked = True
            if parameters.batch_timeout_micros and self.rows < parameters.max_batch_size:
                loop.call_later(parameters.batch_timeout_micros / 1e6, self.flush)
            else:
                # One turn later: those whose requests the event loop has read by then have joined.
                loop.call_soon(loop.call_soon, self.flush)
        return future

    def flush(self) -> None:
        """Run what waits, in batches of at most max_batch_size rows (a request is never split)."""
        waiting, self.waiting, self.rows, self.flush_asked = self.waiting, [], 0, False
        batch, count = [], 0
        for request in waiting:
            if batch and count + request[1] > self.parameters.max_batch_size:
                self._run(batch, count)
                batch, count = [], 0
            batch.append(request)
            count += request[1]
        self._run(batch, count)

    def _run(self, batch: list, count: int) -> None:
        try:
            columns = zip(*(arrays for arrays, _, _ in batch), strict=True)
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
                for request in batch:  # each alone: one that is wrong must not fail the others
                    self._run([request], request[1])
            elif not batch[0][2].done():
                batch[0][2].set_exception(error)
            return
        start = 0
        for _, rows, future in batch:
            if not future.done():  # done: cancelled, its client has gone
                future.set_result([array[start : start + rows] for array in outputs])
            start += rows


def rows_of(arrays: list[np.ndarray]) -> int | None:
    """Return the size of the arrays' common first dimension; None where they have none, so cannot be batched."""
    sizes = {array.shape[0] if array.ndim else math.nan for array in arrays}
    return sizes.pop() if len(sizes) == 1 and not any(array.ndim == 0 for array in arrays) else None
