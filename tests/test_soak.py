"""soak.py: a server that keeps what it was asked is told from one that does not."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY_DIR
from load_generator import Window
from soak import LEAST_GROWTH_BYTES, describe_drift, measure_growth

SECONDS = 4
RATE = 100
KEPT_BYTES = 50_000  # by the leaking toy, for each answer


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of benchmarks/ and data/ with the toy endpoint."""
    house = tmp_path_factory.mktemp("house")
    shutil.copytree(REPOSITORY_DIR / "data", house / "data")
    shutil.copytree(REPOSITORY_DIR / "benchmarks", house / "benchmarks", ignore=shutil.ignore_patterns("results"))
    (house / "tests").mkdir()
    shutil.copy2(REPOSITORY_DIR / "tests" / "toy_server.py", house / "tests")
    shutil.copy2(REPOSITORY_DIR / "tests" / "toy_endpoint.py", house / "benchmarks" / "endpoint_toy.py")
    return house


def soak(house, manner: str) -> tuple[subprocess.CompletedProcess, dict]:
    output = house / f"{manner}.json"
    command = [sys.executable, house / "benchmarks" / "soak.py", "--endpoint", "toy", "--rate", str(RATE)]
    done = subprocess.run(
        [*command, "--seconds", str(SECONDS), "--output", output],
        env={**os.environ, "TOY_MANNER": manner, "TOY_FOLDER": str(house / "tests"), "COLUMNS": "200"},
        capture_output=True, text=True, timeout=120, cwd=house,
    )  # fmt: skip
    return done, json.loads(output.read_text()) if output.exists() else {}


def test_a_leak_is_found_and_its_slope_is_right(house):
    done, result = soak(house, "leaking")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MB/h" in done.stdout
    assert "it grows: find what is kept" in done.stdout
    assert ", 0 failed, 0 wrong" in done.stdout
    at_s = np.array([s["at_s"] for s in result["slices"]])
    answers = np.cumsum([sum(count for _, count in s["latency_us_counts"]) for s in result["slices"]])
    settled = at_s > result["settings"]["warm_up_share"] * at_s[-1]
    true_slope = KEPT_BYTES * np.polyfit(at_s[settled], answers[settled], 1)[0]
    assert result["memory"]["grows"]
    assert result["memory"]["bytes_per_s"]["estimate"] == pytest.approx(true_slope, rel=0.2)


def test_a_server_that_keeps_nothing_is_not_said_to_leak_and_its_failures_are_counted(house):
    done, result = soak(house, "erring")
    assert "no lasting growth" in done.stdout, done.stdout + done.stderr
    assert not result["memory"]["grows"]
    assert all(s["server_rss_bytes"] > 0 for s in result["slices"])
    errors = sum(s["errors"].get("status 503", 0) for s in result["slices"])
    assert errors > 0
    assert f"{errors:,} failed, 0 wrong" in done.stdout
    assert done.returncode == 1


AT_S = np.linspace(0, 1440, 288)


def test_a_slow_leak_under_the_noise_of_single_samples_is_found():
    noise = np.random.default_rng(1).normal(0, 2e6, len(AT_S))
    growth = measure_growth(AT_S, 200e6 + 5e3 * AT_S + noise)
    assert growth.grows
    assert growth.bytes_per_s.low < 5e3 < growth.bytes_per_s.high


def test_noise_is_hardly_ever_called_a_leak_and_its_interval_holds_the_truth():
    random = np.random.default_rng(2)
    found = [measure_growth(AT_S, 200e6 + random.normal(0, 5e6, len(AT_S))) for _ in range(400)]
    assert sum(growth.grows for growth in found) <= 20
    covered = np.mean([growth.bytes_per_s.low <= 0 <= growth.bytes_per_s.high for growth in found])
    assert covered == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_one_step_up_is_no_leak(share):
    assert not measure_growth(AT_S, 200e6 + 30e6 * np.heaviside(AT_S - share * AT_S[-1], 0)).grows


def test_less_than_an_allocator_keeps_is_no_leak():
    assert not measure_growth(AT_S, 200e6 + 0.5 * LEAST_GROWTH_BYTES * AT_S / AT_S[-1]).grows


def test_constant_memory_has_no_slope():
    growth = measure_growth(AT_S, np.full(len(AT_S), 200e6))
    assert vars(growth.bytes_per_s) == {"estimate": 0.0, "low": 0.0, "high": 0.0}
    assert growth.describe() == "+0.0 MB/h (+0.0 to +0.0): no lasting growth"


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "no drift"), (1.02, "no drift"), (1.3, "it rises"), (0.7, "it falls")]
)
def test_a_latency_that_drifts_is_told_from_one_that_does_not(factor, verdict):
    random = np.random.default_rng(3)
    factors = np.linspace(1, factor, 60)
    windows = [Window(1, latencies_s=random.lognormal(-7, 0.5, 400) * step) for step in factors]
    assert describe_drift(windows).endswith(verdict)


def test_latency_without_answers_is_not_judged():
    assert describe_drift([Window(1)] * 60) == "too few answers to say"
