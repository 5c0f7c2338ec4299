"""One version of one model: its inputs and outputs, its runs, and the results of its trial."""

import itertools
import json
import re
import struct
import threading
import time
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from batching import SLOW_S, Batcher, Job
from http_messages import Refusal
from onnx_inference import LOAD_ERRORS, ModelError, open_session, shorten
from settings import Settings
from tensors import Tensor, UnsupportedError

# A row takes some 10 µs and is best computed at once. A megabyte takes some 20 ms to read, during which the event loop
# would answer no other request: a larger request is handled in a thread (ONNX Runtime releases Python's lock).
INLINE_BYTES = 32_000
TRIAL_ROWS = (1, 2, 3, 32, 256)  # a row must get the same answer by itself and among this many
TRIAL_LONG_S = 0.1  # a longer run is neither repeated nor tried with many rows
TRIAL_LIMIT_S = 60.0  # then the trial is aborted: a loop in the model may never end
TRIAL_TOLERANCE = 1e-5  # relative to the larger of 1 and the answer; sums are added in another order
BOUND_ROWS = 64  # up to this many rows are computed in memory that is kept
WORDS = ("a", "some words", "", "13.5", "Zürich")  # inputs for the trial of text models


def find_missing(error: Exception) -> str:
    """Return a message about a missing file of weights; ONNX Runtime's own names the server's folder."""
    if not re.search("External data path|model_path must not be empty", str(error)):
        return ""
    name = re.search(r'path does not exist: "(?:[^"]*/)?([^"/]+)"', str(error))
    return f"it keeps weights in {name[1] if name else 'a file'}, which is not in its version's folder"


class Codec(Protocol):
    """One form of request to one model: reads it into a job, and writes the answer."""

    def read(self, request: Any) -> Job:
        """Return the job of `request`; Refusal if it does not fit this model."""

    def write(self, wanted: Any, answer: list) -> Any:
        """Return the reply: `answer` holds lists of rows or every output, like the job's feeds; or raise Refusal."""


class BoundRows:
    """A model of rows bound to memory that is kept, for one number of rows; one run at a time.

    `session.run` makes options, tensors and arrays for each run, which costs as much as a small model itself: a run
    takes some 24 µs with this, 45 without.
    """

    def __init__(self, model: "Model", rows: int):
        (tensor,) = model.outputs.values()
        values, self.answers = (np.zeros((rows, width), np.float32) for width in (model.features, tensor.shape[1]))
        self.session, self.binding, self.options = model.session, model.session.io_binding(), ort.RunOptions()
        self.options.add_run_config_entry("gpu_graph_id", "-1")  # 1.31 reads it each time; without: an exception, 50 µs
        self.binding.bind_ortvalue_input(model.input_name, ort.OrtValue.ortvalue_from_numpy(values))
        self.binding.bind_ortvalue_output(tensor.name, ort.OrtValue.ortvalue_from_numpy(self.answers))
        self.layout, self.memory = struct.Struct(f"<{values.size}f"), memoryview(values).cast("B")

    def run(self, rows: list[list[float]]) -> list[list[float]]:
        """Return the answers; raise ONNX Runtime's error if the model does not give one for each row."""
        self.layout.pack_into(self.memory, 0, *(rows[0] if len(rows) == 1 else itertools.chain.from_iterable(rows)))
        self.session.run_with_iobinding(self.binding, self.options)
        return self.answers.tolist()


class Model:
    """One version of one model, loaded and tried.

    `is_rows`: one FP32 tensor (n, k) to one (n, m). Such a model has /predict, and its requests stay lists of
    rows from decoder to encoder: arrays for each request would cost 2 µs of 10.
    """

    def __init__(self, name: str, version: str, files: dict[str, bytes], settings: Settings):
        """Load `files`, by their paths in the version's folder; raise ModelError with a message of one line."""
        self.name = name
        self.version = version
        # A model names its files of weights in UTF-8: a file with another name holds none.
        external = {path: files[path] for path in files if path != "model.onnx" and path.isprintable()}
        try:
            self.session = open_session(
                files["model.onnx"], settings.device, settings.intra_op_threads, settings.allow_spinning, external
            )
            self.inputs = {node.name: Tensor.declared(node) for node in self.session.get_inputs()}
            self.outputs = {node.name: Tensor.declared(node) for node in self.session.get_outputs()}
        except UnsupportedError as error:
            raise ModelError(str(error)) from None
        except LOAD_ERRORS as error:
            raise ModelError(f"ONNX Runtime cannot load it: {find_missing(error) or shorten(error)}") from None
        self.providers = self.session.get_providers()
        self.output_names = list(self.outputs)
        tensors = [*self.inputs.values(), *self.outputs.values()]
        self.is_rows = (len(self.inputs), len(self.outputs)) == (1, 1) and all(
            tensor.datatype.name == "FP32" and not tensor.is_zip_map and tensor.shape[:1] == (-1,)
            and len(tensor.shape) == 2 and tensor.shape[1] > 0
            for tensor in tensors
        )  # fmt: skip
        self.input_name = tensors[0].name if self.inputs else ""
        self.features = tensors[0].shape[1] if self.is_rows else 0
        self.feature_names = self.read_feature_names()
        options = ort.RunOptions()
        limit = threading.Timer(TRIAL_LIMIT_S, setattr, (options, "terminate", True))
        limit.daemon = True
        limit.start()
        quick_size, rows_are_independent = self.try_out(options)
        limit.cancel()
        self.is_rows = self.is_rows and rows_are_independent is not None
        self.bound: dict[int, BoundRows] = {}  # by the number of rows, made on first use
        self.may_bind = self.is_rows and bool(rows_are_independent) and self.providers[0] == "CPUExecutionProvider"
        self.binding_lock = threading.Lock()
        max_rows = settings.batch_rows if rows_are_independent else 0
        self.batcher = Batcher(self.run, max_rows, quick_size)

    def read_feature_names(self) -> list[str]:
        """Return the names in the model's property `features`, if it is a JSON list with one for each column."""
        try:
            names = json.loads(self.session.get_modelmeta().custom_metadata_map.get("features", ""))
        except ValueError:
            names = None
        if isinstance(names, list) and len(names) == self.features and all(isinstance(name, str) for name in names):
            return names
        return [f"feature {i}" for i in range(self.features)]

    def describe(self, versions: list[str]) -> dict:
        """Return the metadata of the Open Inference Protocol, with all `versions` of the model."""
        return {
            "name": self.name,
            "versions": versions,
            "platform": "onnxruntime_onnx",
            "inputs": [tensor.describe() for tensor in self.inputs.values()],
            "outputs": [tensor.describe() for tensor in self.outputs.values()],
        }

    def name_place(self, message: str) -> str:
        """Return the decoder's `message` with row and feature in place of the position in the JSON."""
        if place := re.search(r"\[(\d+)\]\[(\d+)\]`$", message):
            if int(place[2]) < len(self.feature_names):
                message += f" (row {place[1]}, {self.feature_names[int(place[2])]})"
        elif place := re.search(r" of length .*\[(\d+)\]`$", message):
            message += f" (row {place[1]}; the features are {', '.join(self.feature_names)})"
        return message

    # Running

    def answer_apart(self, codec: Codec, request: Any) -> Any:
        """Read, run and write in this thread; return the reply, or raise Refusal or any other error."""
        job = codec.read(request)
        (answer,) = self.batcher.answer([job])
        if isinstance(answer, Exception):
            raise answer
        return codec.write(job.wanted, answer)

    def run_arrays(self, feeds: dict[str, np.ndarray], options: ort.RunOptions | None = None) -> list[np.ndarray]:
        """Return every output for these inputs; Refusal 400 with ONNX Runtime's reason if the model rejects them.

        A model that passed its trial and fails now fails because of its inputs: their shape or values.
        """
        try:
            values = self.session.run(self.output_names, feeds, options)
        except LOAD_ERRORS as error:
            raise Refusal(400, f"the model does not accept this: {shorten(error)}") from None
        for place, tensor in enumerate(self.outputs.values()):
            if tensor.is_zip_map:
                scores = [[row[label] for label in sorted(row)] for row in values[place]]
                values[place] = np.array(scores, np.float32).reshape(len(scores), -1 if scores else 0)
        return values

    def run(self, jobs: list[Job]) -> list:
        """Return the answers to jobs of one key, from one run of the model."""
        if type(jobs[0].feeds) is list:
            return self.run_rows(jobs)
        if len(jobs) == 1:
            return [self.run_arrays(jobs[0].feeds)]
        feeds = {name: np.concatenate([job.feeds[name] for job in jobs]) for name in self.inputs}
        outputs = self.run_arrays(feeds)
        ends = list(itertools.accumulate(job.rows for job in jobs))
        if any(output.shape[:1] != (ends[-1],) for output in outputs):
            self.batcher.max_rows = 0  # the trial did not detect it
            raise ValueError("the rows of this model are not independent")
        parts = [np.split(output, ends[:-1]) for output in outputs]
        return [list(answer) for answer in zip(*parts, strict=True)]

    def run_rows(self, jobs: list[Job]) -> list[list]:
        """Return the answers to jobs whose feeds are lists of rows, from one run."""
        rows = jobs[0].feeds if len(jobs) == 1 else [row for job in jobs for row in job.feeds]
        answers = self.run_bound(rows) or self.run_unbound(rows)
        if len(jobs) == 1:
            return [answers]
        parts, start = [], 0
        for job in jobs:
            parts.append(answers[start : start + job.rows])
            start += job.rows
        return parts

    def run_bound(self, rows: list[list[float]]) -> list[list[float]]:
        """Return the answers to a few rows; [] if they are many, the memory is in use, or the run fails."""
        if not self.may_bind or len(rows) > BOUND_ROWS or not self.binding_lock.acquire(blocking=False):
            return []
        try:
            bound = self.bound.get(len(rows))
            if bound is None:
                bound = self.bound[len(rows)] = BoundRows(self, len(rows))
            return bound.run(rows)
        except Exception:  # noqa: BLE001 - of many kinds, if the model does not answer each row; the caller reports it
            self.may_bind = False
            return []
        finally:
            self.binding_lock.release()

    def run_unbound(self, rows: list[list[float]]) -> list[list[float]]:
        """Return the answers to any rows."""
        values = struct.pack(f"<{len(rows) * self.features}f", *itertools.chain.from_iterable(rows))  # 2 x np.array
        feeds = {self.input_name: np.frombuffer(values, np.float32).reshape(len(rows), self.features)}
        (output,) = self.run_arrays(feeds)
        if output.shape[0] != len(rows):
            self.batcher.max_rows = 0
            raise Refusal(400, f"the model answers {len(rows)} rows with {output.shape[0]}: send one row at a time")
        return output.tolist()

    # The trial

    def try_out(self, options: ort.RunOptions) -> tuple[int, bool | None]:
        """Run made-up inputs; return how many elements take less than SLOW_S, and whether rows are independent.

        Rows are independent, so that requests may share a run, if each gets the same answer by itself and among
        others; None if a model that could be one of rows does not answer each row. A failed trial is no reason to
        refuse the model: it need not accept made-up inputs.
        """
        free = all(tensor.shape[:1] == (-1,) for tensor in [*self.inputs.values(), *self.outputs.values()])
        quick_size, independent = 0, bool(free and self.inputs)
        alone: list[list[np.ndarray]] = []
        for count in TRIAL_ROWS if independent else (1,):
            feeds = self.make_feeds(count)
            size = sum(array.size for array in feeds.values())
            try:
                times_s: list[float] = []
                while len(times_s) < 3 and max(times_s, default=0) <= TRIAL_LONG_S:
                    started_s = time.thread_time()
                    outputs = self.run_arrays(feeds, options)
                    times_s.append(time.thread_time() - started_s)
                if independent and not alone:
                    few = self.make_feeds(len(WORDS))
                    alone = [
                        self.run_arrays({name: array[row : row + 1] for name, array in few.items()}, options)
                        for row in range(len(WORDS))
                    ]
            except Refusal:
                return quick_size, False
            if min(times_s) < SLOW_S:
                quick_size = size
            if independent and any(np.shape(output)[:1] != (count,) for output in outputs):
                return quick_size, None
            if independent and not self.answers_alike(outputs, alone):
                independent = False
            if count > 2 and min(times_s) > TRIAL_LONG_S:  # fewer rows cannot show independence
                break
        return quick_size, independent

    def make_feeds(self, rows: int) -> dict[str, np.ndarray]:
        return {name: self.make_up(tensor, rows) for name, tensor in self.inputs.items()}

    def answers_alike(self, outputs: list[np.ndarray], alone: list[list[np.ndarray]]) -> bool:
        """Return whether the first rows of `outputs` equal the answers to each row by itself."""
        for together, *apart in zip(outputs, *alone, strict=True):
            for row, single in enumerate(apart[: len(together)]):
                ours, theirs = np.asarray(together[row]), np.asarray(single[0])
                if ours.shape != theirs.shape:
                    return False
                if ours.dtype.kind == "f":
                    if not np.allclose(ours, theirs, TRIAL_TOLERANCE, TRIAL_TOLERANCE, equal_nan=True):
                        return False
                elif not np.array_equal(ours, theirs):
                    return False
        return True

    def make_up(self, tensor: Tensor, rows: int) -> np.ndarray:
        """Return values for `tensor`, of which each row differs; the same row whatever `rows` is."""
        shape = [rows if place == 0 and size == -1 else max(size, 1) for place, size in enumerate(tensor.shape)]
        count = int(np.prod(shape))
        kind = tensor.datatype.numpy.kind
        if kind == "O":
            values = np.resize(np.array(WORDS, object), count)
        elif kind in "biu":
            values = np.random.default_rng(0).random(count) < 0.5  # 0 and 1 are indices into almost anything
        else:
            values = np.random.default_rng(0).normal(size=count)
        return values.astype(tensor.datatype.numpy).reshape(shape)
