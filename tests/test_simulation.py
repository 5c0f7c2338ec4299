"""The simulation gives what queueing theory gives where there is a formula, and elsewhere what was measured."""

import importlib
import re

import numpy as np
import pytest

from figures.measured import Measured
from figures.result_file import SAMPLE_PATH, read_result
from helpers import call_main
from planning.capacity import CapacityError
from planning.simulation import (
    Agreement,
    Gateway,
    Policy,
    ServiceTimes,
    list_agreements,
    measure_service_times,
    poisson_arrivals,
    simulate,
)
from planted_queues import make_one_by_one
from planted_results import Planted, make_result

MEAN_S = 0.001


def run(service: ServiceTimes, rate: float, replicas: int = 1, count: int = 60_000, seed: int = 0, **gateway):
    random = np.random.default_rng(seed)
    return simulate(poisson_arrivals(rate, count, random), service, replicas, random, Gateway(**gateway))


def exponential() -> ServiceTimes:
    return make_one_by_one(np.random.default_rng(9).exponential(MEAN_S, 50_000))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_server_with_exponential_times_is_the_queue_m_m_1(load):
    """Its time in the system is exponential with rate μ - λ."""
    latencies_s = run(exponential(), load / MEAN_S)
    remaining = (1 - load) / MEAN_S
    assert latencies_s.mean() == pytest.approx(1 / remaining, rel=0.1)
    assert np.percentile(latencies_s, 99) == pytest.approx(np.log(100) / remaining, rel=0.15)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_server_with_constant_times_waits_as_pollaczek_and_khinchine_say(load):
    latencies_s = run(make_one_by_one(np.full(10, MEAN_S)), load / MEAN_S)
    assert latencies_s.mean() == pytest.approx(MEAN_S * (1 + load / (2 * (1 - load))), rel=0.05)
    assert latencies_s.min() == pytest.approx(MEAN_S)


def test_a_server_that_works_in_turns_takes_more_at_once_the_more_it_is_asked():
    """A turn costs 1 ms whatever it holds: 5,000 requests/s are then five a turn, and wait for less than two turns."""
    service = ServiceTimes(np.array([0, *[MEAN_S] * 64]), np.full(4, MEAN_S))
    latencies_s = run(service, 5000)
    assert latencies_s.min() >= MEAN_S - 1e-9
    assert latencies_s.max() <= 2 * MEAN_S + 1e-9
    assert latencies_s.mean() == pytest.approx(1.5 * MEAN_S, rel=0.05)


def test_replicas_that_are_chosen_at_random_are_so_many_queues_and_the_fewest_connections_do_better():
    def p99_s(policy: Policy) -> float:
        return float(np.percentile(run(exponential(), 4 * 0.7 / MEAN_S, replicas=4, policy=policy), 99))

    at_random = p99_s(Policy.RANDOM)
    assert at_random == pytest.approx(np.log(100) / (0.3 / MEAN_S), rel=0.15)
    assert p99_s(Policy.LEAST_CONNECTIONS) < p99_s(Policy.ROUND_ROBIN) < at_random


def test_a_gateway_delays_each_request_and_at_its_limit_all_of_them():
    service = make_one_by_one(np.full(4, 1e-5))
    quick = run(service, 1000, count=5000, cores=2, request_s=1e-4)
    slow = run(service, 25_000, count=5000, cores=2, request_s=1e-4)  # it can forward 20,000/s
    assert quick.min() == pytest.approx(1.1e-4)
    assert np.median(quick) < 2e-4
    assert slow[-1] > 100 * np.median(quick)


def test_no_request_is_lost_or_answered_before_it_came():
    latencies_s = run(exponential(), 5000, replicas=3, count=4000, cores=1, request_s=1e-5)
    assert latencies_s.shape == (4000,)
    assert (latencies_s > 0).all()


def test_service_times_are_those_of_the_closed_loops():
    measured = Measured(make_result({"a": Planted(p50_s=0.001, flat_out=4000, noise=0, cpu_s=0.001)}))
    service = measure_service_times(measured, "a")
    assert (service.most, service.delay_s) == (64, 0)
    assert service.turn_s[[0, 1, 64]] == pytest.approx([0, 0.001, 64 / 4000])
    assert service.draws_s.mean() == pytest.approx(service.turn_s[1])
    result = make_result({"a": Planted()})
    result["windows"] = [window for window in result["windows"] if window["connections"] == 1]
    with pytest.raises(CapacityError, match="1 connection and at more"):
        measure_service_times(Measured(result), "a")


@pytest.mark.parametrize(
    ("measured_ms", "rounds_ms", "simulated_ms", "agrees"),
    [
        (10, (9, 12), 12.5, True),
        (10, (9, 12), 12.6, False),
        (10, (9, 12), 7.4, False),
        (10, (4, 12), 3.1, True),  # the rounds differ by 3 ×
        (10, (4, 12), 2.9, False),
        (10, (4, 12), 15.1, False),
    ],
)
def test_agreement_is_a_quarter_of_what_was_measured(measured_ms, rounds_ms, simulated_ms, agrees):
    low_s, high_s = (value / 1e3 for value in rounds_ms)
    assert Agreement("a", 1, measured_ms / 1e3, (low_s, high_s), simulated_ms / 1e3).agrees is agrees


def test_what_the_server_does_not_work_delays_a_reply_and_holds_up_nobody():
    """The server works 0.4 ms of each; the rest is the client's, or a timer's. Over 64 connections it never rests."""
    measured = Measured(make_result({"a": Planted(p50_s=MEAN_S, flat_out=2500, noise=0, cpu_s=0.0004)}))
    service = measure_service_times(measured, "a")
    assert service.delay_s == pytest.approx(0.0006, rel=0.01)
    assert service.turn_s[1] == pytest.approx(0.0004, rel=0.01)
    assert service.turn_s[64] == pytest.approx(64 / 2500, rel=0.05)
    plain, later = (
        make_one_by_one(np.full(4, 0.0004)),
        ServiceTimes(np.array([0, 0.0004]), np.full(4, 0.0004), 0.0006),
    )
    assert run(later, 1500) == pytest.approx(run(plain, 1500) + 0.0006)


def plant_queue(scale: float = 1.0) -> Measured:
    """A result whose open loop is a queue M/D/1 of 1 ms a request, and whose closed loops say `scale` times that."""
    result = make_result(
        {"a": Planted(p50_s=MEAN_S * scale, flat_out=1000 / scale, noise=0, cpu_s=MEAN_S * scale, sweep={300.0: 1.0})}
    )
    service = make_one_by_one(np.full(4, MEAN_S))
    for number, window in enumerate(w for w in result["windows"] if w["load"] == "open"):
        latencies_s = run(service, 300, count=3000, seed=100 + number)
        window["latency_us_counts"] = [[round(value * 1e6), 1] for value in latencies_s]
        window["elapsed_s"] = 10.0
    return Measured(result)


def test_a_planted_queue_is_found_again_and_a_slower_server_is_not(monkeypatch):
    monkeypatch.setattr("planning.simulation.REPEATS", 2)
    [found] = list_agreements(plant_queue(), ["a"])
    assert found.is_steady
    assert found.agrees
    [found] = list_agreements(plant_queue(1.6), ["a"])
    assert not found.agrees


def test_the_measured_servers_of_the_sample_have_the_p99_that_is_simulated():
    """At three of four rates at least: of ten intervals of 95 % one may miss, and a window lasts half a second."""
    measured = Measured(read_result(SAMPLE_PATH))
    found = list_agreements(measured, [name for name in measured.knees if name.endswith("-tuned")])
    assert len(found) >= 4
    misses = [(one.server, one.rate, one.measured_s, one.simulated_s) for one in found if not one.agrees]
    assert len(misses) <= len(found) / 4, misses


def test_the_command_simulates_replicas_behind_a_gateway():
    done = call_main(importlib.import_module("capacity"), "--simulate", "--rate", "4000", "--servers", "onnx-tuned")
    assert done.returncode == 0
    assert "measured and simulated" in done.stdout
    assert re.search(r"Within 25% of the measured p99: \d+ of \d+ steady rates, \d+ of all \d+", done.stdout)
    assert "behind a gateway of 4 cores" in done.stdout
