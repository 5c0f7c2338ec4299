"""Two worker processes against one, for the servers that have workers, each set as its README says."""

import os
from pathlib import Path

import numpy as np
import pytest

from client.load_generator import LoadGenerator, make_exchanges
from endpoints.reference import load_expected, load_test_rows
from helpers import start
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
