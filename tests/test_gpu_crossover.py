"""The crossover is found where it was planted, wrong answers are never timed, and without a GPU it says so."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from accelerator.crossover import (
    Crossover,
    Fit,
    TimedCell,
    bound_speedup,
    encode_cell,
    find_best,
    find_crossover,
    find_fitted_crossover,
    fit_time,
    make_timed_cells,
    rows_per_dollar,
)
from accelerator.measure import measure_cell
from accelerator.networks import OURS, WIDE, load_network, make_wide_network
from accelerator.variants import (
    MODEL_PATH,
    Variant,
    WrongAnswer,
    check_answers,
    has_cuda,
    list_variants,
    make_inputs,
    open_bound,
    open_plain,
)
from conftest import REPOSITORY_DIR
from drawing.crossover_words import NOT_MEASURED, describe_bound, describe_crossover
from figures.measured import Measured
from figures.result_file import SAMPLE_PATH, SCHEMA_VERSION, read_result, write_result
from helpers import DEADLINE_S, call_main, wait_until
from planted_results import Planted, make_result

ROWS = (1, 8, 64, 512, 4096, 32_768)
MEGA = 1e-6
SMALL = make_wide_network((16, 8))


def plant(
    truths: dict[str, tuple[float, float]], noise: float = 0.02, seed: int = 0, model: str = OURS
) -> list[TimedCell]:
    """Cells whose times are a + b · rows µs, by variant; names that begin with gpu are on CUDA."""
    random = np.random.default_rng(seed)
    return [
        TimedCell(
            model, rows, name, "cuda" if name.startswith("gpu") else "cpu", name == "gpu-resident", "×" in name,
            tuple((a + b * rows) * MEGA * random.normal(1, noise, 7)),
        )
        for name, (a, b) in truths.items()
        for rows in ROWS
    ]  # fmt: skip


def make_file(cells: list[TimedCell], gpu: str | None) -> dict:
    return {
        "schema_version": SCHEMA_VERSION, "complete": True, "environment": {"cpu": "A Processor"}, "settings": {},
        "gpu": gpu, "refused": [],
        "cells": [encode_cell(cell, [(1000, 1000 * value) for value in cell.seconds]) for cell in cells],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "truth"),
    [
        ((40, 0.001), (64, 512)),  # meets 8.5 + 0.11 rows at 289
        ((20, 0.02), (64, 512)),
        ((1, 0.001), (None, 1)),
        ((400, 0.2), (32_768, None)),  # dearer a row as well
    ],
)
def test_the_crossover_is_found_within_a_step_of_where_it_was_planted(gpu, truth):
    cells = plant({"cpu-1": (8.5, 0.11), "gpu-run": gpu})
    assert find_crossover(cells, OURS) == Crossover(OURS, *truth)
    fits = fit_time(cells, OURS, "cpu-1"), fit_time(cells, OURS, "gpu-run")
    meets = find_fitted_crossover(*fits)
    exact = (gpu[0] - 8.5) / (0.11 - gpu[1]) if gpu[1] < 0.11 else math.inf
    assert (meets is None) == (exact == math.inf)
    if exact not in (math.inf,) and exact > 1:
        assert meets == pytest.approx(exact, rel=0.25)


def test_within_the_noise_nobody_wins():
    cells = plant({"cpu-1": (8.5, 0.11), "gpu-run": (8.5, 0.11)}, noise=0.1)
    assert find_crossover(cells, OURS).above is None


def test_a_bound_that_no_request_sees_wins_nothing_and_all_cores_only_throughput():
    cells = plant({"cpu-1": (8.5, 0.11), "cpu-16×1": (0.5, 0.007), "gpu-run": (400, 0.2), "gpu-resident": (0.1, 1e-5)})
    assert find_crossover(cells, OURS) == Crossover(OURS, ROWS[-1], None)
    assert find_best(cells, OURS, 8, "cpu").variant == "cpu-1"
    assert find_best(cells, OURS, 8, "cpu", whole=True).variant == "cpu-16×1"
    assert find_best(cells, OURS, 8, "cuda").variant == "gpu-run"


def test_without_a_gpu_there_is_no_crossover():
    assert find_crossover(plant({"cpu-1": (8.5, 0.11)}), OURS) is None


@pytest.mark.parametrize(("a", "b"), [(8.5, 0.11), (620, 57), (40, 0.0001), (0.0, 2.0)])
def test_a_fit_on_half_of_the_sizes_tells_the_others(a, b):
    fit = fit_time(plant({"cpu-1": (a, b)}), OURS, "cpu-1")
    assert fit.held_out_error <= 0.25
    for rows in ROWS:
        assert fit.time_s(rows) == pytest.approx((a + b * rows) * MEGA, rel=0.25)
    assert fit.a_s >= 0
    assert fit.b_s >= 0
    assert fit_time(plant({"cpu-1": (a, b)})[:2], OURS, "cpu-1") is None


def test_a_time_that_is_no_line_shows_in_the_sizes_that_were_held_out():
    bent = [
        TimedCell(OURS, rows, "cpu-1", "cpu", False, False, tuple([(10 + rows**2 / 100) * MEGA] * 7)) for rows in ROWS
    ]
    assert fit_time(bent, OURS, "cpu-1").held_out_error > 0.25


def test_amdahls_bound_and_rows_for_a_dollar():
    assert bound_speedup(1.0, 0.0) == 1
    assert bound_speedup(1.0, 0.5) == 2
    with pytest.raises(ValueError, match="part"):
        bound_speedup(1.0, 1.5)
    assert rows_per_dollar(1000, 3.6) == 1e6
    assert find_fitted_crossover(Fit(1, 1, 0), Fit(0.5, 0.1, 0)) == 1


def test_the_bound_is_computed_from_both_files(tmp_path):
    """The server takes 1 ms at one row and 2.048 ms at 1,024; the model 0.1 and 1.024 ms of that."""
    measured = Measured(make_result({"onnx-tuned": Planted("local", p50_s=0.001, server_us_per_row=2, noise=0)}))
    path = tmp_path / "gpu.json"
    cells = [
        TimedCell(OURS, rows, "cpu-1", "cpu", False, False, tuple([seconds] * 7))
        for rows, seconds in ((1, 0.0001), (1024, 0.001024))
    ]
    write_result(make_file(cells, None), path)
    assert describe_bound(measured, path) == (
        "An infinitely fast GPU makes onnx-tuned faster by at most 1.11 × at 1, 2.00 × at 1,024 rows a request "
        "(Amdahl's law: the rest of the time is the server's, not the model's)."
    )
    assert "not known" in describe_bound(measured, tmp_path / "none.json")


def test_a_file_without_a_gpu_says_not_measured_and_one_with_names_it(tmp_path):
    path = tmp_path / "gpu.json"
    cells = plant({"cpu-1": (8.5, 0.11), "gpu-run": (40, 0.001)})
    write_result(make_file([cell for cell in cells if cell.device == "cpu"], None), path)
    assert describe_crossover(path) == NOT_MEASURED
    assert describe_crossover(tmp_path / "none.json") == NOT_MEASURED
    write_result(make_file(cells, "A GPU"), path)
    words = describe_crossover(path)
    assert words == "On A GPU against A Processor: ours: the GPU wins from between 64 and 512 rows on."
    assert [cell.variant for cell in make_timed_cells(read_result(path))] == [cell.variant for cell in cells]


# In process, on this machine's processor.


def test_ways_to_run_answer_alike_bound_buffers_too():
    inputs = make_inputs(8)
    reference = open_plain(SMALL, "cpu", 1, True)
    for run in (
        open_plain(SMALL, "cpu", 2, False),
        open_bound(SMALL, "cpu", 8),
        open_bound(SMALL, "cpu", 8, copies=False),
    ):
        check_answers(run, reference, inputs)
    values = [float(reference(rows).std()) for rows in inputs]
    assert min(values) > 1e-3  # a network that answers all alike would prove nothing


def test_wrong_answers_are_refused_and_never_timed():
    def off(model, _):
        right = open_plain(model, "cpu", 1, True)
        return lambda rows: right(rows) + np.float32(2e-5)

    with pytest.raises(WrongAnswer, match="off by 2"):
        check_answers(off(SMALL, 4), open_plain(SMALL, "cpu", 1, True), make_inputs(4))
    variants = [Variant("cpu-1", "cpu", lambda m, _: open_plain(m, "cpu", 1, True)), Variant("off", "cpu", off)]
    cells, refused = measure_cell("small", SMALL, 4, variants, 0.001, 2, 1.0)
    assert [cell["variant"] for cell in cells] == ["cpu-1"]
    assert [len(cell["rounds"]) for cell in cells] == [2]
    assert refused == [refused[0]]
    assert "off: not timed, off by 2" in refused[0]


def test_a_run_that_takes_too_long_is_left_out():
    variants = [Variant("cpu-1", "cpu", lambda m, _: open_plain(m, "cpu", 1, True))]
    cells, refused = measure_cell("small", SMALL, 4, variants, 0.001, 2, 1e-9)
    assert cells == []
    assert "a run takes" in refused[0]


def test_processes_share_the_machine_and_end():
    [variant] = [one for one in list_variants(2, False) if one.processes > 1]
    cells, refused = measure_cell("small", SMALL, 4, [variant], 0.01, 2, 1.0)
    assert refused == []
    assert cells[0]["is_whole"]
    assert all(part["calls"] > 0 for part in cells[0]["rounds"])
    import multiprocessing

    assert multiprocessing.active_children() == []


def test_the_variants_are_those_of_the_machine():
    assert [one.name for one in list_variants(1, False)] == ["cpu-1"]
    names = [one.name for one in list_variants(16, True)]
    assert names[:3] == ["cpu-1", "cpu-2", "cpu-2 without spinning"]
    assert {"cpu-16", "cpu-16×1", "gpu-run", "gpu-bound", "gpu-graph", "gpu-resident"} <= set(names)


def test_networks_are_made_and_unknown_ones_refused():
    assert load_network(OURS, MODEL_PATH) == MODEL_PATH.read_bytes()
    assert set(WIDE) == {"5-512²", "5-2048²", "5-4096³"}
    assert make_wide_network((16, 8)) == SMALL
    with pytest.raises(ValueError, match="no such network"):
        load_network("6-7", MODEL_PATH)


# The command.


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("gpu_crossover")


@pytest.mark.slow
def test_the_processors_half_runs_end_to_end(script, tmp_path):
    path = tmp_path / "gpu.json"
    done = call_main(
        script, "--device", "cpu", "--models", OURS, "--rows", "1", "32", "1024", "--seconds", "0.002", "--rounds", "6",
        "--output", path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = read_result(path)
    assert result["complete"]
    assert (result["kind"], result["gpu"]) == ("in-process", None)
    assert {cell["rows"] for cell in result["cells"]} == {1, 32, 1024}
    assert "µs a row" in done.stdout
    assert NOT_MEASURED in done.stdout
    assert f"wrote {path}" in done.stdout
    sample = read_result(SAMPLE_PATH)
    for cpu, words in ((result["environment"]["cpu"], "faster by at most"), ("another", "on another processor")):
        sample["environment"]["cpu"] = cpu
        assert words in describe_bound(Measured(sample), path)


def has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured_and_leaves_no_process(tmp_path):
    """SIGINT reaches the whole group, as in a terminal."""
    path, log = tmp_path / "gpu.json", tmp_path / "log"
    script = REPOSITORY_DIR / "benchmarks" / "gpu_crossover.py"
    options = ["--device", "cpu", "--models", OURS, "--rows", "1", "8", "64", "--seconds", "0.5", "--output", path]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, script, *options], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until(path.exists, lambda: log.read_text(), while_alive=process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "interrupted: what was measured is kept" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert read_result(path)["cells"]
    wait_until(lambda: not has_members(process.pid), "a process is left")  # multiprocessing's tracker ends last


def test_without_cuda_it_says_in_one_line_what_it_needs(script, tmp_path):
    if has_cuda():
        pytest.skip("there is CUDA here")
    path = tmp_path / "gpu.json"
    done = call_main(script, "--device", "cuda", "--output", path)
    assert done.returncode == 1
    assert done.stderr == (
        "gpu_crossover: CUDA was requested and is not here: it needs an NVIDIA GPU with its driver, CUDA and cuDNN\n"
    )
    assert not path.exists()
    write_result(make_file(plant({"cpu-1": (8.5, 0.11)}), None), path)
    done = call_main(script, "--output", path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].startswith("gpu_crossover: needs an NVIDIA GPU")
    assert "ours, cpu-1: 8." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--rows", "0"], "1 or more"), (["--models", "mine"], "invalid choice"), (["--rounds", "0"], "1 or more")],
)
def test_a_mistake_is_one_line(script, arguments, words):
    done = call_main(script, *arguments)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]


def test_a_file_of_another_kind_is_one_line(script, tmp_path):
    if has_cuda():
        pytest.skip("there is CUDA here")
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION}))
    done = call_main(script, "--output", path)
    assert done.returncode == 1
    assert "not a file of gpu_crossover.py" in done.stderr
