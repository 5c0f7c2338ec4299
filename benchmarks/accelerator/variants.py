"""Ways to run a network: threads, processes, and on a GPU plain, bound, as a graph and without copies.

`onnx_inference.py` of onnx/ opens the sessions, as the server does: float32, TF32 off, and CUDA that is requested never
falls back. The bound ways work on the CPU as well, where the tests run them.
"""

import contextlib
import importlib.util
import multiprocessing
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from machine.environment import REPOSITORY_DIR

ONNX_DIR = REPOSITORY_DIR / "onnx"
MODEL_PATH = ONNX_DIR / "model.onnx"
TOLERANCE = 1e-5  # of the repository: answers that differ by more are never timed
INPUTS = 4  # different ones in turn, so that none is found in a cache by luck
GRAPH_WARMUPS = 2  # runs before a CUDA graph is captured
PROCESS_TIMEOUT_S = 120.0

Run = Callable[[np.ndarray], np.ndarray]  # rows (n, 5) float32 in, answers (n, k) out


class DeviceMissing(RuntimeError):
    """The device cannot be used here; the message is one line."""


class WrongAnswer(RuntimeError):
    """A variant answers differently from the reference; the message says by how much."""


@dataclass(frozen=True)
class Variant:
    """One way to run a network. `open` returns the function that runs it on that many rows."""

    name: str
    device: str
    open: Callable[[bytes, int], Run]
    is_bound: bool = False
    processes: int = 1


def load_inference() -> Any:
    """Return onnx/onnx_inference.py as a module."""
    spec = importlib.util.spec_from_file_location("onnx_inference", ONNX_DIR / "onnx_inference.py")
    assert spec and spec.loader  # noqa: S101 (the file is part of the repository)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def has_cuda() -> bool:
    """Whether a session on CUDA can be opened here."""
    inference = load_inference()
    try:
        inference.open_session(MODEL_PATH, "cuda", 1, True)
    except (inference.DeviceError, *inference.LOAD_ERRORS):
        return False
    return True


def open_plain(model: bytes, device: str, threads: int, spinning: bool) -> Run:
    """One `session.run` with arrays of NumPy, as server.py does it."""
    session = load_inference().open_session(model, device, threads, spinning)
    name = session.get_inputs()[0].name

    def run(rows: np.ndarray) -> np.ndarray:
        answer: np.ndarray = session.run(None, {name: rows})[0]
        return answer

    return run


def open_bound(model: bytes, device: str, rows: int, graph: bool = False, copies: bool = True) -> Run:
    """Buffers made once and bound; each run copies in and out. With `graph` as a CUDA graph; without `copies` neither.

    Without copies the answer is that of the first rows, whatever comes: a bound that no request sees.
    """
    import onnxruntime as ort

    inference = load_inference()
    if graph:
        options = ort.SessionOptions()
        options.log_severity_level = inference.LOG_FATAL
        ort.preload_dlls()
        provider = (inference.CUDA[0], {**inference.CUDA[1], "enable_cuda_graph": "1"})
        session = ort.InferenceSession(model, options, [provider], enable_fallback=0)
    else:
        session = inference.open_session(model, device, 1, True)
    source, target = session.get_inputs()[0], session.get_outputs()[0]
    width = target.shape[1]
    given = ort.OrtValue.ortvalue_from_numpy(np.zeros((rows, source.shape[1]), np.float32), device, 0)
    answer = ort.OrtValue.ortvalue_from_numpy(np.zeros((rows, width), np.float32), device, 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input(source.name, given)
    binding.bind_ortvalue_output(target.name, answer)
    is_filled = False

    def run(values: np.ndarray) -> np.ndarray:
        nonlocal is_filled
        if copies or not is_filled:
            given.update_inplace(values)
            is_filled = True
        session.run_with_iobinding(binding)
        if copies:
            out: np.ndarray = answer.numpy()
            return out
        binding.synchronize_outputs()
        return values

    if graph:
        for _ in range(GRAPH_WARMUPS):
            run(np.zeros((rows, source.shape[1]), np.float32))
    if not copies:
        return _ResidentRun(run, answer.numpy)
    return run


@dataclass
class _ResidentRun:
    """A run whose answer stays on the device; `read` fetches it, for the check."""

    run: Run
    read: Callable[[], np.ndarray]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return self.run(rows)


def _plain(device: str, threads: int, spinning: bool) -> Callable[[bytes, int], Run]:
    return lambda model, _: open_plain(model, device, threads, spinning)


def list_variants(cores: int, cuda: bool) -> list[Variant]:
    """Return the ways to run on this machine: one to all cores in powers of two, processes, and CUDA if it is here."""
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < cores] + [cores]
    found = []
    for count in dict.fromkeys(counts):
        for spinning in (True, False) if count > 1 else (True,):
            name = f"cpu-{count}" + ("" if spinning else " without spinning")
            found.append(Variant(name, "cpu", _plain("cpu", count, spinning)))
    if cores > 1:
        found.append(Variant(f"cpu-{cores}×1", "cpu", _plain("cpu", 1, True), processes=cores))
    if cuda:
        found += [
            Variant("gpu-run", "cuda", _plain("cuda", 1, True)),
            Variant("gpu-bound", "cuda", lambda model, rows: open_bound(model, "cuda", rows)),
            Variant("gpu-graph", "cuda", lambda model, rows: open_bound(model, "cuda", rows, graph=True)),
            Variant(
                "gpu-resident", "cuda", lambda model, rows: open_bound(model, "cuda", rows, copies=False), is_bound=True
            ),
        ]
    return found


def make_inputs(rows: int, seed: int = 0) -> list[np.ndarray]:
    """Return INPUTS different arrays, (rows, 5) float32."""
    random = np.random.default_rng(seed)
    return [random.uniform(0, 10, (rows, 5)).astype(np.float32) for _ in range(INPUTS)]


def check_answers(run: Run, reference: Run, inputs: list[np.ndarray]) -> None:
    """WrongAnswer unless every input is answered as the reference does, within TOLERANCE."""
    for rows in inputs:
        answer = run(rows)
        if isinstance(run, _ResidentRun):
            answer, rows = run.read(), inputs[0]
        expected = reference(rows)
        difference = float(np.abs(answer - expected).max()) if answer.shape == expected.shape else float("inf")
        if not difference <= TOLERANCE:
            raise WrongAnswer(f"off by {difference:.1e} from the CPU's answer")


def time_round(run: Run, inputs: list[np.ndarray], seconds: float) -> tuple[int, float]:
    """Run for `seconds` at least; return (calls, elapsed seconds)."""
    calls, started_s = 0, time.perf_counter()
    while True:
        run(inputs[calls % len(inputs)])
        calls += 1
        elapsed_s = time.perf_counter() - started_s
        if elapsed_s >= seconds:
            return calls, elapsed_s


def _work(pipe: Connection, model: bytes, rows: int) -> None:
    """A process of the machine's throughput: opens the network, and times a round on request."""
    run, inputs = open_plain(model, "cpu", 1, True), make_inputs(rows)
    run(inputs[0])
    with contextlib.suppress(EOFError, BrokenPipeError):  # who started this is gone
        pipe.send("ready")
        while (seconds := pipe.recv()) is not None:
            pipe.send(time_round(run, inputs, seconds))


@contextlib.contextmanager
def processes_of(model: bytes, rows: int, count: int) -> Iterator[Callable[[float], tuple[int, float]]]:
    """Open `count` processes of one thread; the function times a round of all at once: (all calls, elapsed seconds)."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    try:
        for _ in range(count):
            own, other = context.Pipe()
            worker = context.Process(target=_work, args=(other, model, rows), daemon=True)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the process inherits it: Ctrl-C
            try:  # reaches the whole group, and the one that started this ends it
                worker.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            other.close()
            pipes.append(own)
            workers.append(worker)
        for pipe in pipes:
            _receive(pipe)

        def run_round(seconds: float) -> tuple[int, float]:
            for pipe in pipes:
                pipe.send(seconds)
            parts = [_receive(pipe) for pipe in pipes]
            return sum(calls for calls, _ in parts), max(elapsed_s for _, elapsed_s in parts)

        yield run_round
    finally:
        for pipe in pipes:
            try:
                pipe.send(None)
            except OSError:
                continue  # it has ended
        for worker in workers:
            worker.join(PROCESS_TIMEOUT_S)
            if worker.is_alive():
                worker.kill()


def _receive(pipe: Connection) -> Any:
    if not pipe.poll(PROCESS_TIMEOUT_S):
        raise DeviceMissing(f"a process did not answer within {PROCESS_TIMEOUT_S:g} s")
    try:
        return pipe.recv()
    except EOFError:
        raise DeviceMissing("a process ended before it answered") from None


def describe_gpu() -> str | None:
    """Return the name of the first GPU, if nvidia-smi reports it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None if done.returncode == 0 else None
