"""What more processes are worth: two workers against one, and a large model in a process of its own."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import toy_onnx_models
from client.ask import send
from client.load_generator import LoadGenerator, make_exchanges, poisson_arrivals
from endpoints.base import Request
from endpoints.endpoint_onnx import OnnxEndpoint, TunedOnnxEndpoint
from endpoints.reference import load_expected, load_test_rows
from helpers import DEADLINE_S, start
from machine.priority import lifted_priority
from servers.process import ServerProcess

NEEDED_CORES = 4  # a core for each worker, one for the client, one for what stands between them


def with_workers(name: str, workers: int, folder: Path) -> ServerProcess:
    """Return a server of the endpoint `name` with that many worker processes; its settings are written to `folder`."""
    server = start(name)
    endpoint = server.endpoint
    if name == "onnx":
        endpoint.extra_options = ["--config", "tuned.toml", "--workers", str(workers)]
    elif name == "bentoml-tuned":
        settings = folder / f"{workers}.yaml"
        text = (endpoint.folder / "tuned.yaml").read_text()
        settings.write_text(text.replace("services:\n", f"services:\n  workers: {workers}\n"))
        endpoint.config = settings
    else:
        settings = folder / f"{workers}.properties"
        text = (endpoint.folder / "config-tuned.properties").read_text()
        one = '"minWorkers": 1, "maxWorkers": 1'
        assert one in text
        settings.write_text(text.replace(one, one.replace("1", str(workers))))
        endpoint.options = ("--config", str(settings), *endpoint.options[2:])
    return server


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize("name", ["onnx", "bentoml-tuned", "torchserve-tuned"])
def test_two_workers_answer_more_than_one_where_the_client_leaves_them_the_cores(name, tmp_path, capsys):
    """Requests of 1,000 rows keep a worker busy for milliseconds and the client for a tenth of that."""
    rows, _ = load_test_rows()
    many, expected = (rows * 9)[:1000], np.tile(load_expected("1"), (9, 1))[:1000]
    cores = len(os.sched_getaffinity(0))
    rates: dict[int, list[float]] = {1: [], 2: []}
    with (
        with_workers(name, 1, tmp_path) as one,
        with_workers(name, 2, tmp_path) as two,
    ):
        assert len(two.processes()) > len(one.processes())
        for number in range(6):
            for workers, server in ((1, one), (2, two)):
                exchanges = make_exchanges(server.endpoint, "1", many, expected, len(many))
                with LoadGenerator(server.endpoint, exchanges, 16) as load:
                    load.run_closed(0.5)
                    window = load.run_closed(1.0)
                assert (window.wrong, dict(window.errors)) == (0, {})
                if number:  # the first round warms up
                    rates[workers].append(window.rate)
    ratio = np.median([b / a for a, b in zip(rates[1], rates[2], strict=True)])
    with capsys.disabled():
        print(f"\n{name}: two workers answer {ratio:.2f} times as many requests of 1,000 rows as one, on {cores} cores")
    if cores >= NEEDED_CORES:
        assert ratio >= 1.6, rates


class LargeEndpoint(TunedOnnxEndpoint):
    """A model whose run takes some 50 ms."""

    has_model = False  # whose answers the tests know
    body = b'{"inputs": [{"name": "x", "shape": [1, 1024], "datatype": "FP32", "data": [%b]}]}' % b",".join(
        [b"1"] * 1024
    )

    def request(self, rows: list, version: str | None) -> Request:
        return Request("/v2/models/large/infer", self.body)

    def decode(self, reply: bytes) -> np.ndarray:
        return np.zeros((0, 2))


@contextlib.contextmanager
def asked_without_pause(endpoint: OnnxEndpoint) -> Iterator[list[tuple[int, bytes]]]:
    """Ask `endpoint`, one request after the other, as long as the block runs; yield the replies so far."""
    replies: list[tuple[int, bytes]] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            replies.append(send(endpoint.port, endpoint.request([], None)))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield replies
    finally:
        is_over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.timing
def test_a_small_model_keeps_its_p99_beside_a_large_one_in_a_process_of_its_own(tmp_path, capsys):
    """Each has a core, the large one's also carries the client: as onnx/REFERENCE.md arranges it, `--only-model`."""
    folder, options = tmp_path / "models", ["--config", "tuned.toml"]
    shutil.copytree(OnnxEndpoint.folder / "models" / "my_model", folder / "my_model")
    (folder / "large" / "1").mkdir(parents=True)
    (folder / "large" / "1" / "model.onnx").write_bytes(toy_onnx_models.make_chain())
    cores = sorted(os.sched_getaffinity(0))

    def serve(endpoint_class: type[OnnxEndpoint], core: int, *more: str) -> ServerProcess:
        endpoint = endpoint_class.on_free_ports()
        endpoint.start_timeout_s = DEADLINE_S
        endpoint.extra_options = [*options, "--model-repository", str(folder), *more]
        return ServerProcess(endpoint, {core}, goes_first=endpoint_class is TunedOnnxEndpoint)

    rows, _ = load_test_rows()
    latencies: dict[str, list[np.ndarray]] = {
        "alone": [],
        "beside, its own process": [],
        "beside, the same process": [],
    }
    with (
        lifted_priority(),
        serve(TunedOnnxEndpoint, cores[0], "--only-model", "my_model") as small,
        serve(LargeEndpoint, cores[-1], "--only-model", "large") as large,
        serve(TunedOnnxEndpoint, cores[0]) as both,
    ):
        both_large = LargeEndpoint(both.endpoint.ports)
        cases = [(small, None), (small, large.endpoint), (both, both_large)]
        for number in range(8):
            for (server, beside), found in zip(cases, latencies.values(), strict=True):
                exchanges = make_exchanges(server.endpoint, "1", rows, load_expected("1"))
                with (
                    LoadGenerator(server.endpoint, exchanges, 16) as load,
                    asked_without_pause(beside) if beside else contextlib.nullcontext([]) as replies,
                ):
                    load.run_closed(0.2)
                    window = load.run_open(poisson_arrivals(200, 2.0, number))
                assert (window.wrong, dict(window.errors)) == (0, {})
                assert {status for status, _ in replies} == ({200} if beside else set())
                found.append(window.latencies_s)
    p99_ms = {case: np.percentile(np.concatenate(found), 99) * 1e3 for case, found in latencies.items()}
    with capsys.disabled():
        print(
            f"\np99 ms of the small model at 200/s, on {len(cores)} cores:", {k: round(v, 2) for k, v in p99_ms.items()}
        )
    assert p99_ms["beside, its own process"] <= 2 * p99_ms["alone"], p99_ms
