"""soak.py: a server that keeps what it was asked is told from one that does not."""

import contextlib
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import soak
from figures.result_file import Window, encode_window
from helpers import Done, call_main
from soak import LEAST_GROWTH_BYTES, WARM_UP_SHARE, describe_drift, measure_growth
from toy_endpoint import Toy

KEPT_BYTES = 50_000  # by the leaking toy, for each answer


@pytest.fixture(scope="module")
def leaking_toy(tmp_path_factory) -> tuple[Done, dict]:
    """What soak.py prints and writes about a real server that leaks, under real load."""
    output = tmp_path_factory.mktemp("soak") / "leaking.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_MANNER", "leaking")
        patch.setattr(soak, "load_endpoints", lambda with_peers: {"toy": Toy})
        done = call_main(soak, "--endpoint", "toy", "--rate", "100", "--seconds", "3", "--output", output)
    return done, json.loads(output.read_text())


def settled(result: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return time in s, memory in bytes and answers so far, (n,) each, after the warm-up."""
    at_s, memory_bytes = (np.array([s[key] for s in result["slices"]]) for key in ("at_s", "server_rss_bytes"))
    answers = np.cumsum([sum(count for _, count in s["latency_us_counts"]) for s in result["slices"]])
    after = at_s > result["settings"]["warm_up_share"] * at_s[-1]
    return at_s[after], memory_bytes[after], answers[after]


@pytest.mark.slow
def test_memory_is_seen_to_grow_by_what_a_server_keeps_of_each_answer(leaking_toy):
    done, result = leaking_toy
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failed, 0 wrong" in done.stdout
    _, memory_bytes, answers = settled(result)
    assert np.polyfit(answers, memory_bytes, 1)[0] == pytest.approx(KEPT_BYTES, rel=0.2)


@pytest.mark.timing
def test_a_real_leak_is_found_and_its_slope_is_right(leaking_toy):
    """The slope is over time: it needs answers that come at a steady rate."""
    done, result = leaking_toy
    at_s, _, answers = settled(result)
    assert result["memory"]["grows"]
    assert "it grows: find what is kept" in done.stdout
    assert result["memory"]["bytes_per_s"]["estimate"] == pytest.approx(
        KEPT_BYTES * np.polyfit(at_s, answers, 1)[0], rel=0.2
    )


def soak_given(
    monkeypatch, tmp_path, memory_bytes: np.ndarray, errors: int = 0, connect_s: float = 0.0
) -> tuple[Done, dict]:
    """Return what soak.py prints and writes, had it read `memory_bytes` (n,) a second apart."""
    seen = {"latencies_s": np.full(5, 0.001), "connect_s": connect_s}
    windows = [Window(1, errors=Counter({"status 503": errors}), **seen) for _ in memory_bytes]
    slices = [
        encode_window(window, at_s=float(number), server_rss_bytes=int(bytes_now))
        for number, (window, bytes_now) in enumerate(zip(windows, memory_bytes, strict=True), start=1)
    ]
    server = contextlib.nullcontext(SimpleNamespace(kind="local"))
    monkeypatch.setattr(soak, "load_endpoints", lambda with_peers: {"toy": Toy})
    monkeypatch.setattr(soak, "ServerProcess", lambda *_: server)
    monkeypatch.setattr(soak, "soak", lambda *_: (5.0, windows, slices))
    done = call_main(soak, "--endpoint", "toy", "--output", tmp_path / "soak.json")
    return done, json.loads((tmp_path / "soak.json").read_text())


def test_a_leaks_slope_is_that_of_the_readings_after_the_warm_up(monkeypatch, tmp_path):
    at_s = np.arange(1, 101)
    filling = 5e6 * np.minimum(at_s, WARM_UP_SHARE * at_s[-1])  # what fills up during the warm-up is no leak
    done, result = soak_given(monkeypatch, tmp_path, 200e6 + filling + 40e3 * at_s)
    assert result["memory"]["grows"]
    assert result["memory"]["bytes_per_s"]["estimate"] == pytest.approx(40e3, rel=1e-6)
    assert "+144.0 MB/h (+144.0 to +144.0): it grows: find what is kept" in done.stdout
    assert done.returncode == 0


def test_a_server_that_keeps_nothing_is_not_called_leaking_and_its_failures_fail_the_run(monkeypatch, tmp_path):
    noise = np.random.default_rng(4).normal(0, 1e6, 100)
    done, result = soak_given(monkeypatch, tmp_path, 200e6 + noise, errors=2)
    assert "no lasting growth" in done.stdout
    assert not result["memory"]["grows"]
    assert sum(s["errors"].get("status 503", 0) for s in result["slices"]) == 200
    assert "200 failed, 0 wrong" in done.stdout
    assert done.returncode == 1
    assert "listen backlog" not in done.stdout


def test_a_server_that_takes_connections_slowly_is_told(monkeypatch, tmp_path):
    done, _ = soak_given(monkeypatch, tmp_path, np.full(100, 200e6), connect_s=3.1)
    assert "connections took 3.1 s to open: raise the server's listen backlog" in done.stdout


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
