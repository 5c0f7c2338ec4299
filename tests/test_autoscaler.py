"""The autoscaler does what Kubernetes' documentation says, case by case, and a load that it follows is served."""

import importlib

import numpy as np
import pytest

from helpers import call_main
from planning.autoscaler import CURVES, SYNC_S, Autoscaler, Behavior, Server, day, ramp, run, step

SERVER = Server(1000.0, (0.0, 1000.0, 1200.0), (0.0, 0.8, 0.96), 1, start_s=10.0, objective_s=0.05)
TARGET = 0.56  # 700 requests/s a replica


def scaler(replicas: int, least: int = 2, most: int = 1000, **behavior) -> Autoscaler:
    return Autoscaler(0.5, least, most, Behavior(**behavior), replicas)


@pytest.mark.parametrize(
    ("replicas", "usage", "wanted"),
    [
        (10, 0.5, 10),
        (10, 0.549, 10),  # within the tolerance of a tenth
        (10, 0.56, 12),  # ⌈10 × 1.12⌉
        (4, 1.0, 8),
        (4, 1.5, 8),  # ⌈4 × 3⌉ = 12, and the policy allows a doubling in 15 s
        (2, 0.9, 4),
        (2, 2.0, 4),  # two pods or a doubling: both are four
        (1, 2.0, 3),  # two pods are more than a doubling
    ],
)
def test_a_step_up_is_the_documented_formula_within_tolerance_and_policy(replicas, usage, wanted):
    assert scaler(replicas, least=1).sync(0, usage, replicas) == wanted


def test_the_bounds_hold():
    assert scaler(4, most=6).sync(0, 1.0, 4) == 6
    assert scaler(3, least=3, down_window_s=0, down_percent=100).sync(0, 0.01, 3) == 3


def test_replicas_that_start_count_as_using_nothing():
    assert scaler(8).sync(0, 1.0, 4) == 8  # 4 of 8 serve: 1.0 × 4 ÷ 8 is the target
    assert scaler(8).sync(0, 1.0, 6) == 12  # ⌈8 × 1.5⌉


def test_a_step_down_waits_for_the_window_and_then_takes_a_fifth_a_minute():
    """A hundred replicas of which fifty would do."""
    assert scaler(100).sync(0, 0.25, 100) == 80  # nothing else was recommended before
    one = scaler(100)
    one.sync(0, 0.5, 100)  # as many as there are
    counts = {now_s: one.sync(now_s, 25 / one.replicas, one.replicas) for now_s in range(SYNC_S, 901, SYNC_S)}
    assert {counts[now_s] for now_s in range(SYNC_S, 300, SYNC_S)} == {100}
    assert (counts[300], counts[345], counts[360], counts[405], counts[420]) == (80, 80, 64, 64, 51)
    assert counts[900] == 51  # within the tolerance of fifty
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


def test_a_policy_counts_what_was_changed_within_its_period():
    one = scaler(4, up_period_s=60)
    assert one.sync(0, 2.0, 4) == 8
    assert one.sync(15, 2.0, 8) == 8  # four were added in this minute
    assert one.sync(60, 2.0, 8) == 16


def test_a_constant_load_is_left_alone():
    outcome = run(np.full(3600, 2000.0), SERVER, Autoscaler(TARGET, 3, 20))
    assert (outcome.short_s, outcome.late, outcome.refused) == (0, 0, 0)
    assert (outcome.least, outcome.most) == (3, 3)
    assert outcome.replica_hours == pytest.approx(3)
    assert outcome.requests == 3600 * 2000


def test_a_step_leaves_too_few_until_the_new_replicas_serve():
    outcome = run(step(10_000.0), SERVER, Autoscaler(TARGET, 4, 40))
    assert SYNC_S < outcome.short_s < 120
    assert 0 < outcome.late_share < 0.2
    assert outcome.most >= 10_000 / 700
    slower = Server(**{**SERVER.__dict__, "start_s": 60.0})
    worse = run(step(10_000.0), slower, Autoscaler(TARGET, 4, 40))
    assert worse.short_s > outcome.short_s
    assert worse.late > outcome.late


def test_enough_replicas_from_the_beginning_make_nothing_late():
    outcome = run(step(10_000.0), SERVER, Autoscaler(TARGET, 15, 40))
    assert (outcome.short_s, outcome.late, outcome.refused) == (0, 0, 0)


def test_without_room_to_grow_the_rest_is_refused():
    outcome = run(step(10_000.0), SERVER, Autoscaler(TARGET, 4, 5))
    assert outcome.refused == pytest.approx(780 * 5000, rel=0.05)
    assert outcome.short_s == 780


def test_a_day_costs_less_than_its_peak_all_day_long():
    outcome = run(day(10_000.0), SERVER, Autoscaler(TARGET, 4, 40))
    assert outcome.short_s == 0
    assert outcome.replica_hours < 0.8 * 24 * outcome.most
    assert outcome.most >= 10_000 / 700 / 1.1


def test_the_curves_are_what_they_are_called():
    assert CURVES.keys() == {"step", "ramp", "day"}
    for make in (step, ramp, day):
        curve = make(1000.0)
        assert curve.min() == pytest.approx(250, rel=0.001)
        assert curve.max() == pytest.approx(1000, rel=0.001)
    assert len(day(1.0)) == 86_400
    assert day(1000.0).argmax() == 12 * 3600


def test_the_command_shows_every_curve():
    done = call_main(importlib.import_module("capacity"), "--autoscale", "--rate", "20000", "--servers", "onnx-tuned")
    assert done.returncode == 0
    assert [word for word in CURVES if word not in done.stdout] == []
