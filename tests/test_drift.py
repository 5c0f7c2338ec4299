"""monitoring/drift.py against other ways to compute the same, and its promises in simulations with fixed chance."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from helpers import REPOSITORY_DIR, call_main, load_together

MONITORING = REPOSITORY_DIR / "monitoring"
drift, drift_table, patients = load_together(MONITORING, "drift", "drift_table", "patients")
REFERENCE = drift.Reference.read(REPOSITORY_DIR / "data")


def test_the_evidence_is_the_papers_formula():
    limits = np.array([0.55, 0.112])
    rng = np.random.default_rng(1)
    m = [[drift.HEAD_START] * len(drift.BETS) for _ in limits]
    observed = rng.random((300, 2)) ** 0.3  # high enough that the threshold is reached on the way
    reached = []
    for z in observed:
        for k, limit in enumerate(limits):
            for j, bet in enumerate(drift.BETS):
                m[k][j] = (m[k][j] + 1) * (1 + bet / limit * (z[k] - limit))
        reached.append([np.mean(each) >= 2 * (1e6 + drift.HEAD_START) for each in m])
    assert not reached[0][0] and reached[-1][0]
    for sizes in ([300], [1] * 300, [7, 64, 65, 128, 36]):  # however they are put together
        detectors, parts, start = drift.Detectors(limits, 1e6), [], 0
        for size in sizes:
            parts.append(detectors.observe(observed[start : start + size]))
            start += size
        assert np.allclose(detectors.evidence, m, rtol=1e-9)
        assert np.array_equal(np.concatenate(parts), reached)
        assert detectors.observations == 300
    assert detectors.threshold == 2 * (1e6 + drift.HEAD_START)
    many = drift_table.ManyDetectors(3, limits)
    for z in observed:
        largest = many.observe(np.tile(z, (3, 1)))
    assert np.allclose(largest, detectors.evidence.mean(axis=1).max() / 2 - drift.HEAD_START)


def test_an_observation_at_the_limit_is_worth_nothing_on_average():
    """With E[z] = m the expected evidence grows by one a step, whatever the bet: that is what the bound rests on."""
    for limit in (0.55, 0.112):
        for bet in drift.BETS / limit:
            assert 1 + bet * (0 - limit) > 0  # never negative, or it could not be a bound
            ends = (1 + bet * (0 - limit)) * (1 - limit) + (1 + bet * (1 - limit)) * limit
            assert ends == pytest.approx(1)


def test_the_expected_evidence_is_the_head_start_and_one_for_each_observation():
    """So the expected observations until the threshold, K (bound + head start), are at least the bound."""
    limit, n, expected = 0.112, 8, 0.0
    for ends in itertools.product((0.0, 1.0), repeat=n):
        detectors = drift.Detectors(np.array([limit]), 1e5, drift.ERROR_BETS)
        detectors.observe(np.array(ends)[:, None])
        wrong = sum(ends)
        expected += limit**wrong * (1 - limit) ** (n - wrong) * detectors.evidence.mean()
    assert expected == pytest.approx(drift.HEAD_START + n)
    assert detectors.threshold - drift.HEAD_START == 1e5


def test_ranks_and_bounds_are_those_of_scipy():
    rng = np.random.default_rng(2)
    known = np.array(REFERENCE.features).T  # (455, 5)
    values = known[rng.integers(455, size=20)]
    expected = [[stats.percentileofscore(known[:, i], row[i], kind="mean") / 100 for i in range(5)] for row in values]
    assert np.allclose(drift.rank(values, REFERENCE.features), expected)
    assert REFERENCE.errors["1"] == (7, 114)
    for errors, n in ((7, 114), (0, 50), (49, 50)):
        assert drift.bound_error(errors, n) == pytest.approx(stats.beta.ppf(0.95, errors + 1, n - errors), abs=1e-9)


def test_one_request_of_many_rows_is_one_observation():
    watch = drift.Watch(REFERENCE, "1")
    rows = np.repeat([[column[-1] for column in REFERENCE.features]], 2000, axis=0)  # the largest of everything
    assert watch.observe(rows, np.full(2000, 0.5), np.array([0])) == []
    assert watch.detectors["input"].observations == 1
    assert np.allclose(
        watch.detectors["input"].evidence[0],
        (drift.HEAD_START + 1) * (1 + drift.BETS / 0.55 * (1 - 0.5 / 455 - 0.55)),
    )
    u = np.random.default_rng(1).random((6, 5))
    means = drift.spread_out(u, np.array([0, 1, 4]))
    assert np.allclose(means[1], np.concatenate([u[1:4], 1 - u[1:4], np.abs(2 * u[1:4] - 1)], axis=1).mean(axis=0))
    assert means.shape == (3, 15)


def watch_patients(shift: dict[str, float], requests: int, seed: int = 1, quiet: int = 0) -> tuple[drift.Watch, list]:
    population = patients.Population(REPOSITORY_DIR / "data", shift)
    plain = patients.Population(REPOSITORY_DIR / "data", {})
    rng, watch, alarms = np.random.default_rng(seed), drift.Watch(REFERENCE, "1"), []
    benign = REFERENCE.benign["1"][0]
    for number in range(quiet + requests):
        rows, _ = (plain if number < quiet else population).draw(1, rng)
        found = watch.observe(rows, rng.choice(benign, 1), np.array([0]))
        alarms += [(number - quiet, *alarm) for alarm in found]
    return watch, alarms


def test_patients_without_drift_raise_no_alarm_and_changed_ones_do_by_the_features_name():
    assert watch_patients({}, 4000)[1] == []
    _, alarms = watch_patients({"mean texture": 0.5}, 1000, quiet=1000)
    number, kind, statistic = alarms[0]
    assert 0 <= number <= 800
    assert (kind, statistic) == ("input", "mean texture higher")
    assert not [alarm for alarm in alarms if "texture" not in alarm[2]]


def test_the_ab_tests_users_raise_no_alarm_though_they_draw_114_rows_again_and_again():
    rows = np.loadtxt(REPOSITORY_DIR / "data" / "test.csv", delimiter=",", skiprows=1)[:, :5]
    watch, rng = drift.Watch(REFERENCE, "2"), np.random.default_rng(3)
    z = drift.spread_out(drift.rank(rows, REFERENCE.features), np.arange(114))
    detectors = watch.detectors["input"]
    assert not detectors.observe(z[rng.integers(114, size=20_000)]).any()
    assert detectors.progress.max() < 0.8


@pytest.mark.parametrize(("error", "least", "most"), [(7 / 114, None, None), (0.3, 20, 400), (0.5, 8, 100)])
def test_errors_are_an_alarm_when_there_are_more_than_the_reference_allows(error, least, most):
    watch, rng = drift.Watch(REFERENCE, "1"), np.random.default_rng(4)
    assert watch.observe_labels(rng.random(3000) < error) == ([] if least is None else [("accuracy", "errors")])
    assert least is None or least <= watch.alarms["accuracy"]["errors"] <= most


def test_an_alarm_stays_until_the_reset_and_survives_a_restart():
    watch, alarms = watch_patients({"mean symmetry": 2.0}, 300)
    assert alarms
    again = drift.Watch(REFERENCE, "1")
    again.load(json.loads(json.dumps(watch.dump())))
    assert again.alarms == watch.alarms
    assert np.allclose(again.detectors["input"].evidence, watch.detectors["input"].evidence)
    again.observe(np.tile(np.median(REFERENCE.features, axis=1), (200, 1)), np.full(200, 0.9), np.arange(200))
    assert again.alarms["input"].keys() >= watch.alarms["input"].keys()
    again.reset()
    assert not any(again.alarms.values())
    assert again.detectors["input"].observations == 0
    again.load({"detectors": {"input": [7, [[1.0]]], "other": [1, []]}, "alarms": {}})  # of other statistics
    assert again.detectors["input"].observations == 0
    for wrong in (math.nan, math.inf, -1.0):  # NaN would never raise an alarm
        damaged = watch.dump()
        damaged["detectors"]["input"][1][0][0] = wrong
        with pytest.raises(ValueError, match="evidence"):
            again.load(damaged)


def test_a_version_without_a_reference_is_watched_by_its_inputs():
    watch = drift.Watch(REFERENCE, "default")
    assert watch.detectors.keys() == {"input"}
    assert watch.observe(np.array(REFERENCE.features).T[:3], np.array([0.1, 0.2, 0.3]), np.arange(3)) == []
    assert watch.observe_labels(np.array([1])) == []


def test_patients_are_like_those_of_the_files_but_none_twice():
    population = patients.Population(REPOSITORY_DIR / "data", {})
    rows, targets = population.draw(20_000, np.random.default_rng(5))
    assert len(np.unique(rows, axis=0)) > 19_900
    assert abs(targets.mean() - population.targets.mean()) < 0.02
    assert np.all(rows >= 0)
    for column in range(5):
        assert stats.ks_2samp(rows[:, column], population.rows[:, column]).statistic < 0.04
    moved, _ = patients.Population(REPOSITORY_DIR / "data", {"mean radius": 1.0}).draw(20_000, np.random.default_rng(5))
    assert (moved[:, 0] - rows[:, 0]).mean() == pytest.approx(population.rows[:, 0].std(), rel=0.01)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--drift", "mean texture"), "write a feature and a shift"),
        (("--drift", "mean size=+1sd"), "no feature 'mean size'; there are mean radius"),
        (("--servers", "nobody"), "no server called 'nobody'; there are bentoml"),
        (("--rate", "0"), "expected a number above 0"),
        (("--rate", "inf"), "expected a number above 0"),
        (("--count", "0"), "expected a whole number from 1"),
        (("--labels-after", "nan"), "expected a number of seconds from 0 on"),
        (("--gateway", "localhost"), "expected a name and a port"),
        (("--wrong-labels", "2"), "wrong-labels is 0 to 1"),
        (("--ca", "/nowhere/tls.pem"), "no certificate /nowhere/tls.pem: start the gateway"),
    ],
)
def test_wrong_words_to_patients_are_refused_in_one_line(words, reason, monkeypatch):
    monkeypatch.setenv("KEY", "gw_key")
    try:
        done = call_main(patients, *words)
        text = done.stderr
        assert done.returncode != 0
    except patients.PatientsError as error:
        text = str(error)
    assert reason in text


@pytest.mark.slow
def test_the_table_of_the_readme_holds():
    """No false alarm in 20,000,000 requests, and the delays that the page names; chance is fixed."""
    printed = []
    found = drift_table.compare(quick=False, rng=np.random.default_rng(1), say=printed.append)
    print("\n".join(printed))
    ours = found["e-detector, bound 1 in 1e8"]
    assert (ours["alarms"], ours["requests"]) == (0, 20_000_000)
    for case in ("a mean that wanders by up to 0.13 sd", "8 rows a request"):
        assert found[case]["alarms"] == 0
    # The limit that the page names: patients who come sorted break the bound's condition, and are an alarm.
    assert found["neighbours alike in their radius (AR 0.9)"]["alarms"] > 0

    def p90(delays: list[float]) -> float:
        return float(np.quantile(delays, 0.9, method="higher"))

    assert p90(ours["delays"]) <= 630
    assert p90(found["+1 sd in one feature"]["delays"]) <= 130
    assert p90(found["+0.5 sd from the first request on"]["delays"]) <= 630
    assert p90(found["errors 0.200"]["delays"]) <= 400
    assert not np.isfinite(found["errors 0.061"]["delays"]).any()
    # REFERENCE.md has each delay as it was printed.
    page = re.sub(r" labels| requests|,", "", (MONITORING / "REFERENCE.md").read_text())
    delays = {case: figures["delays"] for case, figures in found.items() if "delays" in figures}
    assert len(delays) == 13
    for case, numbers in delays.items():
        if np.isfinite(numbers).any():
            assert drift_table.describe(np.array(numbers)).replace(",", "") in page, case
