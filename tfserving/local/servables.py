"""The local server's models: find version folders, load and run SavedModels, report their status.

A servable is one loaded version of one model, in TensorFlow Serving's terms. Nothing here knows of REST or
gRPC: both ask a `Library` for a servable, call `predict`, and turn a `ServingError` into a reply.
"""

import asyncio
import errno
import functools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from batching import Batcher, BatchingParameters, rows_of
from model_config import choose_versions
from quiet_tensorflow import tf
from tensorflow.core.framework import tensor_pb2
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2

DEFAULT_SIGNATURE = "serving_default"
INIT_SIGNATURE = "__saved_model_init_op"  # written by TensorFlow 2 for the loader, not for clients
SLOW_RUN_S = 0.01  # a signature whose runs take longer is run on a thread
FLOAT = tf.float32.as_datatype_enum
MAX_TENSOR_BYTES = 2**31  # protobuf's own limit: a larger tensor can only be a forged shape


class ServingError(Exception):
    """A request's or a start's failure: `code` is the gRPC name of the status, `message` TensorFlow Serving's text."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
        self.message = message


def as_serving_error(error: Exception) -> ServingError:
    """Return `error` as a ServingError with the gRPC name of its code."""
    if isinstance(error, ServingError):
        return error
    if isinstance(error, tf.errors.OpError):
        names = {value: name for name, value in vars(tf.errors).items() if isinstance(value, int)}
        return ServingError(names.get(error.error_code, "UNKNOWN"), error.message)
    missing = isinstance(error, OSError) and (error.errno == errno.ENOENT or "does not exist" in str(error))
    return ServingError("NOT_FOUND" if missing else "DATA_LOSS", str(error))


def type_name(dtype: int) -> str:
    """Return TensorFlow's C++ name of a data type: "float", "double", "int64", "string"."""
    name = tf.dtypes.as_dtype(dtype).name
    return {"float32": "float", "float64": "double", "float16": "half"}.get(name, name)


def numpy_type(dtype: int) -> np.dtype:
    """Return the type of an array that holds TensorFlow's `dtype`; strings are objects."""
    return np.dtype(tf.dtypes.as_dtype(dtype).as_numpy_dtype)


class Signature:
    """One entry point of a servable: named inputs → named outputs, both in alphabetical order."""

    def __init__(
        self,
        session: tf.compat.v1.Session,
        definition: meta_graph_pb2.SignatureDef,
        batching: BatchingParameters | None = None,
    ):
        self.batching = batching
        self._batcher: Batcher | None = None
        self.inputs = dict(sorted(definition.inputs.items()))  # alias → TensorInfo
        self.outputs = dict(sorted(definition.outputs.items()))
        self.defaults = {alias: tf.make_ndarray(tensor) for alias, tensor in definition.defaults.items()}
        self._types = [(alias, numpy_type(info.dtype)) for alias, info in self.inputs.items()]
        self._session = session
        self.run_s = 0.0  # how long a run takes, smoothed over about eight

    @property
    def is_slow(self) -> bool:
        return self.run_s > SLOW_RUN_S

    @functools.cached_property
    def _run(self) -> Callable:
        """Make the callable at the first call: a signature that cannot run must not prevent serving the others."""
        feed = [info.name for info in self.inputs.values()]
        fetch = [info.name for info in self.outputs.values()]
        return _make_callable(self._session, feed, fetch)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return every output by alias. ServingError if the inputs do not fit or the graph fails."""
        arrays = self.check(inputs)
        try:
            return dict(zip(self.outputs, self._run_timed(*arrays), strict=True))
        except tf.errors.OpError as error:
            raise as_serving_error(error) from None

    def _run_timed(self, *arrays: np.ndarray) -> list[np.ndarray]:
        run = self._run  # made at its first use, which is not timed
        started_s = time.perf_counter()
        # A string without a shape comes back as Python's bytes.
        outputs = [out if isinstance(out, (np.ndarray, np.generic)) else np.array(out, object) for out in run(*arrays)]
        self.run_s += (time.perf_counter() - started_s - self.run_s) / 8
        return outputs

    async def run_batched(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return every output as `run` does, on the event loop, in a run shared with others if batching is on."""
        arrays = self.check(inputs)
        rows = rows_of(arrays) if self.batching else None
        if rows is None:
            return await asyncio.to_thread(self.run, inputs) if self.is_slow else self.run(inputs)
        if self._batcher is None:
            self._batcher = Batcher(self._run_timed, self.batching, lambda: self.is_slow)
        future = self._batcher.add(arrays, rows)
        if future is None:
            raise ServingError("UNAVAILABLE", "The batch scheduling queue to which this task was submitted is full")
        try:
            return dict(zip(self.outputs, await future, strict=True))
        except tf.errors.OpError as error:
            raise as_serving_error(error) from None
        except ValueError as error:
            raise ServingError("FAILED_PRECONDITION", str(error)) from None

    def check(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the input arrays in the signature's order. ServingError if they do not fit it."""
        if self.defaults:
            inputs = {**self.defaults, **inputs}
        if inputs.keys() != self.inputs.keys():
            raise self._wrong_names(inputs.keys())
        arrays = []
        for alias, dtype in self._types:
            if inputs[alias].dtype != dtype:
                wanted, given = (type_name(tf.dtypes.as_dtype(d)) for d in (dtype, inputs[alias].dtype))
                raise ServingError(
                    "INVALID_ARGUMENT", f"Expects arg[{len(arrays)}] to be {wanted} but {given} is provided"
                )
            arrays.append(inputs[alias])
        if self.batching and (rows_of(arrays) or 0) > self.batching.max_batch_size:
            raise ServingError(
                "INVALID_ARGUMENT",
                f"Task size {rows_of(arrays)} is larger than maximum input batch size {self.batching.max_batch_size}",
            )
        return arrays

    def _wrong_names(self, given) -> ServingError:
        wanted = self.inputs.keys()
        if len(given) == len(wanted):
            extra = min(given - wanted)
            return ServingError(
                "INVALID_ARGUMENT",
                f"input tensor alias not found in signature: {extra}. "
                f"Inputs expected to be in the set {{{','.join(wanted)}}}.",
            )
        return ServingError(
            "INVALID_ARGUMENT",
            f"input size does not match signature: {len(given)}!={len(wanted)} "
            f"len({{{','.join(sorted(given))}}}) != len({{{','.join(wanted)}}}). "
            f"Sent extra: {{{','.join(sorted(given - wanted))}}}. "
            f"Missing but required: {{{','.join(sorted(wanted - given))}}}.",
        )


def _make_callable(session: tf.compat.v1.Session, feed: list[str], fetch: list[str]) -> Callable:
    """Return a function from one array per name in `feed` to one array per name in `fetch`.

    The call with options is private to TensorFlow. It takes 16 µs, the public one 160-230, because
    inter_op_thread_pool -1 runs the graph on the caller's thread. Both use the DirectSession that
    TensorFlow Serving uses, with the same error texts.
    """
    if hasattr(session, "_make_callable_from_options"):
        options = config_pb2.CallableOptions(feed=feed, fetch=fetch)
        options.run_options.inter_op_thread_pool = -1
        return session._make_callable_from_options(options)
    tensor = session.graph.get_tensor_by_name
    return session.make_callable([tensor(name) for name in fetch], feed_list=[tensor(name) for name in feed])


@dataclass(frozen=True)
class LoadSettings:
    """The flags of tensorflow_model_server for loading and running versions, with its default values."""

    batching: BatchingParameters | None = None  # how requests share runs; None: not at all
    tags: tuple[str, ...] = (tf.saved_model.SERVING,)  # of the graph in the SavedModel
    warm_up_iterations: int = 0  # how often each recorded request is replayed, by `warm_up`
    warm_up: Callable[["Servable", Path], None] | None = None
    checks_method_names: bool = False  # whether classify and regress refuse signatures for another verb
    max_retries: int = 5  # how often a failed version is tried again while its files are unchanged
    retry_interval_s: float = 60.0  # between two attempts


class Servable:
    """One loaded version of one model."""

    def __init__(self, name: str, version: int, folder: Path, settings: LoadSettings = LoadSettings()):
        """Load the SavedModel in `folder` and warm it up. A damaged one can raise anything."""
        self.name = name
        self.version = version
        graph = tf.Graph()
        with graph.as_default():
            # One thread: the graphs served here are small, and requests are the unit of parallelism.
            config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
            session = tf.compat.v1.Session(graph=graph, config=config)
            meta_graph = tf.compat.v1.saved_model.load(session, list(settings.tags), str(folder))
        self.definitions = {
            key: definition for key, definition in meta_graph.signature_def.items() if key != INIT_SIGNATURE
        }
        self.signatures = {
            key: Signature(session, definition, settings.batching) for key, definition in self.definitions.items()
        }
        self.checks_method_names = settings.checks_method_names
        for _ in range(settings.warm_up_iterations):
            settings.warm_up(self, folder)

    @property
    def is_slow(self) -> bool:
        """Whether requests should be answered on a thread, so that others do not wait for them."""
        return any(signature.is_slow for signature in self.signatures.values())

    def predict(
        self, inputs: dict[str, np.ndarray], signature_name: str = "", output_filter: list[str] = ()
    ) -> dict[str, np.ndarray]:
        """Return the outputs by alias, all or those of `output_filter`. Raises ServingError."""
        signature = self.choose(signature_name, output_filter)
        outputs = signature.run(inputs)
        return {alias: outputs[alias] for alias in output_filter} if output_filter else outputs

    async def predict_batched(
        self, inputs: dict[str, np.ndarray], signature_name: str = "", output_filter: list[str] = ()
    ) -> dict[str, np.ndarray]:
        """Return the outputs as `predict` does, on the event loop, in a run shared with others if batching is on."""
        signature = self.choose(signature_name, output_filter)
        outputs = await signature.run_batched(inputs)
        return {alias: outputs[alias] for alias in output_filter} if output_filter else outputs

    def choose(self, signature_name: str, output_filter: list[str]) -> Signature:
        """Return the signature. ServingError if it or one of the outputs in `output_filter` is unknown."""
        signature_name = signature_name or DEFAULT_SIGNATURE
        signature = self.signatures.get(signature_name)
        if signature is None:
            raise ServingError("FAILED_PRECONDITION", f'Serving signature key "{signature_name}" not found.')
        for i, alias in enumerate(output_filter):
            if alias not in signature.outputs:
                raise ServingError(
                    "INVALID_ARGUMENT",
                    f"output tensor alias not found in signature: {alias} "
                    f"Outputs expected to be in the set {{{','.join(signature.outputs)}}}.",
                )
            if alias in output_filter[:i]:
                raise ServingError("INVALID_ARGUMENT", f"duplicate output tensor alias: {alias}")
        return signature

    def metadata(self) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """Return the signatures: names, types and shapes of every input and output."""
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name = self.name
        response.model_spec.version.value = self.version
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for name, definition in self.definitions.items():
            signatures.signature_def[name].CopyFrom(definition)
            signatures.signature_def[name].ClearField("defaults")  # TensorFlow Serving does not show them
        response.metadata["signature_def"].Pack(signatures)
        return response


def read_tensors(tensors) -> dict[str, np.ndarray]:
    """Return the arrays of a map alias → TensorProto. ServingError if a tensor contradicts itself."""
    arrays = {}
    for alias, tensor in tensors.items():
        sizes = [dim.size for dim in tensor.tensor_shape.dim]
        content = tensor.tensor_content
        if tensor.dtype == FLOAT and len(content) == 4 * math.prod(sizes) > 0 and min(sizes, default=1) > 0:
            # The usual case in a fifth of the time; a copy, because TensorFlow needs its own memory.
            arrays[alias] = np.frombuffer(content, "<f4").reshape(sizes).copy()
            continue
        try:
            item_size = tf.dtypes.as_dtype(tensor.dtype).size or 1
            if min(sizes, default=1) < 0 or np.prod(sizes, dtype=object) * item_size > MAX_TENSOR_BYTES:
                raise ValueError
            try:
                arrays[alias] = tf.make_ndarray(tensor)
            except OverflowError:
                arrays[alias] = tf.make_ndarray(cut_values(tensor))
        except (ValueError, TypeError, KeyError, OverflowError):
            raise ServingError("INVALID_ARGUMENT", f"tensor parsing error: {alias}") from None
    return arrays


def cut_values(tensor: tensor_pb2.TensorProto) -> tensor_pb2.TensorProto:
    """Return the tensor with values of its small type, to which C++ casts what is out of range: 300 is 44 as uint8."""
    cut = tensor_pb2.TensorProto()
    cut.CopyFrom(tensor)
    dtype = numpy_type(tensor.dtype)
    if dtype.kind in "iu":
        cut.int_val[:] = np.array(tensor.int_val, np.int32).astype(dtype).tolist()
    cut.half_val[:] = [value & 0xFFFF for value in tensor.half_val]
    return cut


@dataclass
class VersionStatus:
    """The status of one version."""

    state: str  # a ModelVersionStatus.State: LOADING, also between two attempts; AVAILABLE; END
    error_code: str = "OK"
    error_message: str = ""


@dataclass(frozen=True)
class Failure:
    """The last attempt to load a version, which failed."""

    folder_state: int  # of the files, see folder_state()
    retries: int  # attempts before it with the same files
    retry_at_s: float  # when to try again even if no file has changed; time.monotonic()


@dataclass
class Model:
    """One configured model: its loaded versions, the status of each that was tried, and its labels.

    The dictionaries are replaced, never changed: a request may read them while another thread loads a version.
    """

    name: str
    servables: dict[int, Servable] = field(default_factory=dict)
    statuses: dict[int, VersionStatus] = field(default_factory=dict)  # newest first
    labels: dict[str, int] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    unread: str = ""  # the reason why its folder could not be listed last time

    def label_version(self, label: str) -> int:
        if label not in self.labels:
            raise ServingError("INVALID_ARGUMENT", f"Unrecognized servable version label: {label}")
        return self.labels[label]

    def set_status(self, version: int, status: VersionStatus) -> None:
        self.statuses = dict(sorted({**self.statuses, version: status}.items(), reverse=True))


class Library:
    """All models by name, shared by REST and gRPC."""

    def __init__(self, settings: LoadSettings = LoadSettings()):
        self.models: dict[str, Model] = {}
        self.configs: list = []  # one ModelConfig for each model that poll() serves
        self.lock = threading.Lock()  # held while loading and retiring
        self.settings = settings
        self.batching = settings.batching

    def find(self, name: str, version: int | None = None, label: str | None = None) -> Servable:
        """Return the requested servable, the newest loaded one if neither version nor label is given."""
        if not name:
            raise ServingError("INVALID_ARGUMENT", "ModelSpec has no name specified.")
        model = self.models.get(name)
        if label is not None:
            version = (model or Model(name)).label_version(label)
        servables = model.servables if model else {}
        if version is None:
            if servables:
                return servables[max(servables)]
            raise ServingError("NOT_FOUND", f"Servable not found for request: Latest({name})")
        if version not in servables:
            raise ServingError("NOT_FOUND", f"Servable not found for request: Specific({name}, {version})")
        return servables[version]

    def status(
        self, name: str, version: int | None = None, label: str | None = None
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """Return the status of every version, newest first, or of the requested one."""
        model = self.models.get(name, Model(name))
        if not model.statuses:
            raise ServingError("NOT_FOUND", f"Could not find any versions of model {name}")
        if label is not None:
            version = model.label_version(label)
        if version is not None and version not in model.statuses:
            raise ServingError("NOT_FOUND", f"Could not find version {version} of model {name}")
        response = get_model_status_pb2.GetModelStatusResponse()
        for number in model.statuses if version is None else [version]:
            status = model.statuses[number]
            state = get_model_status_pb2.ModelVersionStatus.State.Value(status.state)
            entry = response.model_version_status.add(version=number, state=state)
            entry.status.error_code = getattr(tf.errors, status.error_code)
            entry.status.error_message = status.error_message
        return response

    def update(self, config) -> list[str]:
        """Load and retire versions until exactly those of a ModelConfig are served. Return the changes as lines.

        A version that fails is tried again when its files change and, up to max_retries times, after
        retry_interval_s; until then its state is LOADING. As long as no requested version can be served, the
        present ones stay: a damaged new version never replaces a good one.
        """
        model = self.models.get(config.name) or Model(config.name)
        changes = []
        try:
            wanted = choose_versions(config)
            model.unread = ""
        except OSError as error:  # a folder that cannot be listed for a moment is not empty
            if model.unread == error.strerror:
                return []
            model.unread = error.strerror
            self.models = {**self.models, config.name: model}
            return [f"{config.base_path}: {error.strerror}; what was served of it is kept"]
        for version, folder in sorted(wanted.items(), reverse=True):
            if version in model.servables:
                continue
            state = folder_state(folder)
            failure = model.failures.get(version)
            if failure and failure.folder_state == state:
                if failure.retries == self.settings.max_retries or time.monotonic() < failure.retry_at_s:
                    continue
                retries = failure.retries + 1
            else:
                retries = 0
            model.set_status(version, VersionStatus("LOADING"))
            self.models = {**self.models, config.name: model}  # makes the status available while it loads
            try:
                servable = Servable(config.name, version, folder, self.settings)
                model.servables = {**model.servables, version: servable}
                model.failures.pop(version, None)
                model.set_status(version, VersionStatus("AVAILABLE"))
                changes.append(f"{config.name} version {version} loaded")
            except Exception as error:  # noqa: BLE001 - these files may come from anyone
                reason = as_serving_error(error)
                retry_at_s = time.monotonic() + self.settings.retry_interval_s
                model.failures[version] = Failure(state, retries, retry_at_s)
                if retries == self.settings.max_retries:
                    # The status shows no path of this machine; the log has it.
                    told = reason.message.replace(str(folder), f"{config.name}/{version}")
                    model.set_status(version, VersionStatus("END", reason.code, told))
                changes.append(f"{config.name} version {version} not loaded: {' '.join(reason.message.split())}")
        for version in model.failures.keys() - wanted.keys():  # its folder is gone: nothing to try again
            del model.failures[version]
            model.set_status(version, VersionStatus("END"))
        if not wanted or wanted.keys() & model.servables.keys():
            for version in model.servables.keys() - wanted.keys():
                model.servables = {number: kept for number, kept in model.servables.items() if number != version}
                model.set_status(version, VersionStatus("END"))
                changes.append(f"{config.name} version {version} retired")
        model.labels = dict(config.version_labels)
        self.models = {**self.models, config.name: model}
        return changes

    def poll(self) -> list[str]:
        """Update all models to the configs and the folders; return the changes."""
        with self.lock:
            return [change for config in self.configs for change in self.update(config)]

    def reload(self, configs: list) -> list[str]:
        """Serve the models of `configs` and no other; return the changes.

        Raises ServingError and changes nothing if a config repeats a model, finds no version, or gives a new label
        to a version that is not there or has failed to load.
        """
        names = [config.name for config in configs]
        if len(set(names)) < len(names):
            raise ServingError("INVALID_ARGUMENT", "Illegal to list a model twice in the config")
        for config in configs:
            try:
                wanted = choose_versions(config)
            except OSError:
                wanted = {}
            if not wanted:
                raise ServingError("NOT_FOUND", f"No versions of servable {config.name} found under {config.base_path}")
            model = self.models.get(config.name) or Model(config.name)
            for label, version in config.version_labels.items():
                if model.labels.get(label) != version and (version not in wanted or version in model.failures):
                    raise ServingError(
                        "FAILED_PRECONDITION",
                        f"Request to assign label to version {version} of model {config.name}, which is not currently "
                        "available for inference",
                    )
        with self.lock:
            self.configs = list(configs)
            changes = [change for config in configs for change in self.update(config)]
            self.models = {name: model for name, model in self.models.items() if name in names}
        return changes


def folder_state(folder: Path) -> int:
    """Return a number that changes with the files of a version folder: their names, sizes, times and inodes.

    The times are not enough: a file system's clock may advance only every few milliseconds. Of the times, programs
    that copy set that of the modification, to any value.
    """
    try:
        paths = sorted([folder, *folder.rglob("*")])
    except OSError:
        return 0  # it is being removed
    return hash(tuple((str(path), *stamp(path)) for path in paths))


def stamp(path: Path) -> tuple[int, ...]:
    """Return numbers that change with a file; none for a link that leads nowhere."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
