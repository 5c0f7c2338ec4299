"""The A/B test: boundaries against published tables, verdicts by simulation, and whole runs through a toy split."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from scipy import stats

import ab_test
from helpers import DEADLINE_S, REPOSITORY_DIR, call_main, run_python
from machine.free_ports import find_free_ports
from rollout.alpha_spending import find_boundaries, find_drift, find_power
from rollout.decision import PROMOTE, ROLL_BACK, UNDECIDED, find_difference, judge, make_plan
from rollout.experiment import baseline_accuracy, decode_users, judge_look, plan_of
from rollout.split_users import SplitError
from simulated_users import LABELS, of_version, run_to_the_end, share_of, simulate, table, with_accuracy
from toy_split import ToySplit

RUNS = 1000  # the standard error of a share of 0.05 is 0.007, of 0.9 it is 0.009
ACCURACY = baseline_accuracy()
EVEN_FIFTHS = (0.2, 0.4, 0.6, 0.8, 1.0)


def test_boundaries_are_the_published_ones():
    """Two-sided 0.05, five even looks: Jennison and Turnbull 2000, chapter 7; R's ldbounds prints the same."""
    late = [4.8769, 3.3569, 2.6803, 2.2898, 2.0310]
    evenly = [2.438, 2.427, 2.410, 2.397, 2.386]
    np.testing.assert_allclose(find_boundaries(EVEN_FIFTHS, 0.05, "late"), late, atol=2e-4)
    np.testing.assert_allclose(find_boundaries(EVEN_FIFTHS, 0.05, "evenly"), evenly, atol=1e-3)


def test_one_look_is_the_classical_test():
    assert find_boundaries([1.0], 0.05, "late") == pytest.approx(stats.norm.isf(0.025))
    assert find_drift([1.0], [stats.norm.isf(0.025)], 0.9) == pytest.approx(stats.norm.isf(0.025) + stats.norm.isf(0.1))


@pytest.mark.parametrize("spending", ["late", "evenly"])
def test_uneven_looks_are_crossed_by_chance_as_often_as_alpha_says(spending):
    fractions = [0.02, 0.1, 0.15, 0.5, 0.55, 1.0]
    boundaries = find_boundaries(fractions, 0.05, spending)
    assert 2 * find_power(fractions, boundaries, 0.0) == pytest.approx(0.05, abs=1e-4)
    steps = np.random.default_rng(1).normal(size=(200_000, 6)) * np.sqrt(np.diff([0, *fractions]))
    walks = np.cumsum(steps, axis=1) / np.sqrt(fractions)
    assert np.mean((abs(walks) > boundaries).any(axis=1)) == pytest.approx(0.05, abs=0.002)  # four standard errors
    drift = find_drift(fractions, boundaries, 0.8)
    moved = np.cumsum(steps + drift * np.diff([0, *fractions]), axis=1) / np.sqrt(fractions)
    assert np.mean((moved > boundaries).any(axis=1)) == pytest.approx(0.8, abs=0.005)


def test_the_difference_of_one_step_is_scipys_welch_up_to_the_thirty_users_of_the_pooled_variance():
    plan = make_plan(ACCURACY, 0.02, 0.2, users_per_step=20_000, looks_per_step=1)
    [tally] = simulate(plan, (of_version("1"), of_version("2")), 1, seed=3)
    estimate, error, _ = find_difference(tally, "brier")
    [[ones, twos]] = tally.measured[0]
    means = tally.sums["brier"][0, 0] / tally.measured[0, 0]
    spreads = np.sqrt((tally.squares["brier"][0, 0] - tally.measured[0, 0] * means**2) / (tally.measured[0, 0] - 1))
    oracle = stats.ttest_ind_from_stats(means[1], spreads[1], twos, means[0], spreads[0], ones, equal_var=False)
    assert estimate[0] / error[0] == pytest.approx(oracle.statistic, rel=2e-3)


def test_a_change_over_time_does_not_pass_for_a_difference():
    """Both versions slow down twofold from step to step, and version 2's share grows: pooled means would differ."""
    plan = make_plan(ACCURACY, 0.05, 0.2, shares=(0.05, 0.25, 0.5), looks_per_step=1, users_per_step=2000)
    *_, tally = simulate(plan, (of_version("1"), of_version("1")), 200, seed=4, drift=float(np.log(2)))
    pooled = tally.sums["latency"].sum(-2) / tally.measured.sum(-2)
    assert np.all(pooled[:, 1] - pooled[:, 0] > 0.3)
    estimate, error, _ = find_difference(tally, "latency")
    assert abs(estimate.mean()) < 0.01
    assert np.mean(abs(estimate) > 1.96 * error) == pytest.approx(0.05, abs=0.05)


@pytest.mark.parametrize("version", ["1", "2"])
def test_equal_versions_get_a_verdict_in_at_most_one_of_twenty_runs_though_ten_looks_are_taken(version):
    plan = make_plan(ACCURACY, 0.02, 0.2)
    same = of_version(version)
    verdicts, looks = run_to_the_end(plan, simulate(plan, (same, same), RUNS, seed=1))
    assert share_of(verdicts, PROMOTE, ROLL_BACK) <= 0.05
    assert looks.mean() > 9.8


def test_ten_looks_with_the_boundary_of_one_would_have_inflated_it():
    """The simulation can fail: the same runs judged at 1.96 give a false verdict far more often."""
    plan = make_plan(ACCURACY, 0.02, 0.2)
    naive = type(plan)(**{**vars(plan), "quality_z": np.full(10, 1.96), "guard_z": np.full(10, 1.96)})
    same = of_version("1")
    verdicts, _ = run_to_the_end(plan=naive, tallies=simulate(naive, (same, same), 500, seed=1))
    assert share_of(verdicts, PROMOTE, ROLL_BACK) > 0.12


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_the_planned_power_is_had(share):
    plan = make_plan(ACCURACY, 0.02, 0.2, power=0.9, shares=(share,))
    worse = (with_accuracy(ACCURACY), with_accuracy(ACCURACY - 0.02))
    verdicts, _ = run_to_the_end(plan, simulate(plan, worse, RUNS, seed=2))
    assert share_of(verdicts, ROLL_BACK) == pytest.approx(0.9, abs=0.03)  # three standard errors
    assert share_of(verdicts, PROMOTE) < 0.002


def test_fewer_users_than_planned_have_the_power_that_the_plan_then_states():
    plan = make_plan(ACCURACY, 0.02, 0.2, users_per_step=1500)
    worse = (with_accuracy(ACCURACY), with_accuracy(ACCURACY - 0.02))
    verdicts, _ = run_to_the_end(plan, simulate(plan, worse, RUNS, seed=2))
    assert 0.3 < plan.power < 0.7
    assert share_of(verdicts, ROLL_BACK) == pytest.approx(plan.power, abs=0.05)  # three standard errors


def test_the_number_of_users_is_the_textbooks_where_there_is_one_look():
    plan = make_plan(0.9, 0.03, 0.2, rows_per_user=1, looks_per_step=1)
    z = stats.norm.isf(0.05 / 4 / 2) + stats.norm.isf(0.1)
    a_version = z**2 * (0.9 * 0.1 + 0.87 * 0.13) / 0.03**2
    assert plan.users[-1] == pytest.approx(2 * a_version, abs=1)


CASES = {
    "version 2 is ours": ({"tables": ("1", "2")}, PROMOTE),
    "version 2 is the old one": ({"tables": ("2", "1")}, ROLL_BACK),
    "version 2 is slow": ({"tables": ("1", "2"), "slower": 1.6}, ROLL_BACK),
    "version 2 fails": ({"tables": ("1", "2"), "failing": (0.001, 0.05)}, ROLL_BACK),
    "both fail alike": ({"tables": ("1", "1"), "failing": (0.05, 0.05)}, UNDECIDED),
    "the split is not the one set": ({"tables": ("1", "2"), "share": 0.4}, UNDECIDED),
}


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_is_the_right_one(case):
    about, wanted = CASES[case]
    about = {**about, "tables": tuple(map(of_version, about["tables"]))}
    plan = make_plan(ACCURACY, 0.02, 0.2)
    verdicts, _ = run_to_the_end(plan, simulate(plan, runs=300, seed=5, **about))
    assert share_of(verdicts, wanted) >= 0.85


def test_a_mismatch_of_the_split_comes_before_all_else():
    plan = make_plan(ACCURACY, 0.02, 0.2, looks_per_step=1)
    awful = table(1 - of_version("1")["brier"])
    [tally] = simulate(plan, (of_version("1"), awful), 5, seed=6, share=0.3)
    judgement = judge(plan, tally, 0)
    assert set(judgement.verdict) == {UNDECIDED}
    assert all(reason.startswith("sample ratio mismatch") for reason in judgement.reason)
    [ones, twos] = tally.users[0, 0]
    assert judgement.mismatch_p[0] == pytest.approx(stats.binomtest(int(twos), int(ones + twos), 0.5).pvalue, rel=1e-6)


# Whole runs through a toy split.


@pytest.fixture
def run_ab_test(monkeypatch, tmp_path):
    """Run the command in this process; return (the printed lines, the result file).

    No socket is opened, and no latency is this machine's, unless `sockets`.
    """
    output = tmp_path / "ab.json"

    def run(
        split: ToySplit, *options: str, code: int = 0, sockets: bool = False, plot: bool = False
    ) -> tuple[list[str], dict]:
        with monkeypatch.context() as patch, split if sockets else contextlib.nullcontext():
            if not sockets:
                split.stand_in(patch)
            if not plot:  # drawing takes longer than all the rest
                patch.setattr("rollout.plot.draw", lambda *_: None)
            where = ["--url", split.url, "--api-key", "k", "--share", "50", "--output", output]
            done = call_main(ab_test, *where, "--timeout", DEADLINE_S, *options)
        assert done.returncode == code, done.stderr
        return done.stdout.splitlines(), json.loads(output.read_text())

    return run


FEW = ("--margin", "6", "--latency-margin", "300", "--looks", "4")


def test_our_version_2_is_promoted_and_the_file_tells_it_all_again(run_ab_test, tmp_path):
    split = ToySplit()
    lines, result = run_ab_test(split, *FEW, plot=True)
    assert lines[0].startswith("plan: ")
    assert lines[-2].startswith("verdict: promote (version 2's probabilities are better (Brier score), and no harm; ")
    assert lines[-1] == f"wrote {tmp_path / 'ab.json'} and ab.png"
    users = decode_users(result["looks"])
    assert len(split.asked) == 3 * len(users) == 3 * len(set(split.asked))
    plot = tmp_path / "ab.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    plot.unlink()
    again, _ = run_ab_test(split, "--read", tmp_path / "ab.json", plot=True)
    assert again[:-1] == lines[:-1]
    assert plot.exists()


def test_printed_figures_follow_from_what_the_users_saw_over_real_sockets(run_ab_test):
    lines, result = run_ab_test(ToySplit(), *FEW, "--users", "200", sockets=True)
    right = {"1": [], "2": []}
    for user in decode_users(result["looks"]):
        answers = zip(user.benign, user.rows, strict=True)
        right[user.version].append(np.mean([(p >= 0.5) == LABELS[row] for p, row in answers]))
    difference = 100 * (np.mean(right["2"]) - np.mean(right["1"]))
    printed = re.findall(r"accuracy     ([-+.\d]+) ", "\n".join(lines))
    assert float(printed[-1]) == pytest.approx(difference, abs=0.005)
    judgement, _ = judge_look(result, plan_of(result), len(result["looks"]) - 1)
    assert lines[-2].startswith(f"verdict: {judgement.verdict} ({judgement.reason}; ")


BAD = {
    "wrong answers": ({"versions": "21"}, "roll back (version 2's probabilities are worse"),
    "slow": ({"slow_s": 0.05}, "roll back (version 2 is slower than allowed"),
    "errors": ({"failing": 40}, "roll back (version 2 fails more users"),
    "shapeless answers": ({"shapeless": True}, "roll back (version 2 fails more users"),
    "no answers": ({"hangs": True}, "roll back (version 2 fails more users"),
    "another split": ({"share": 20}, "not enough evidence (sample ratio mismatch"),
    "the same version twice": (
        {"versions": "22"},
        "not enough evidence (no harm, and no gain that is more than chance",
    ),
    "not sticky": ({"sticky": False}, "not enough evidence (users saw both versions or none"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_version_or_split_gets_its_verdict(case, run_ab_test):
    manner, verdict = BAD[case]
    lines, _ = run_ab_test(ToySplit(**manner), *FEW)
    assert lines[-2].startswith(f"verdict: {verdict}")


@pytest.mark.timing
def test_a_version_that_takes_fifty_milliseconds_longer_is_found_over_real_sockets(run_ab_test):
    lines, _ = run_ab_test(ToySplit(slow_s=0.05), *FEW, sockets=True)
    assert lines[-2].startswith("verdict: roll back (version 2 is slower than allowed")


def test_a_reply_that_does_not_say_its_version_is_refused(run_ab_test, tmp_path):
    with pytest.raises(SplitError, match="X-Model-Version is None, not 1 or 2"):
        run_ab_test(ToySplit(header="X-Else"))
    assert not (tmp_path / "ab.json").exists()


def test_replies_429_are_waited_for_and_do_not_count(run_ab_test):
    split = ToySplit(throttles=6)
    lines, result = run_ab_test(split, *FEW, "--users", "40", "--looks", "1")
    assert lines[1].startswith("look 1 of 1: 40 users")
    assert len(split.asked) == 126
    assert all(not user.failures for user in decode_users(result["looks"]))


def test_a_gateway_that_is_lost_ends_it_and_keeps_what_came_in(run_ab_test, monkeypatch):
    send = ab_test.Crowd.send

    def send_once(crowd, numbers, *rest):
        if numbers.start:
            raise SplitError("it is gone")
        return send(crowd, numbers, *rest)

    monkeypatch.setattr(ab_test.Crowd, "send", send_once)
    lines, result = run_ab_test(ToySplit(), *FEW, code=1)
    assert lines[-2].startswith("verdict: not enough evidence (it is gone; ")
    assert len(result["looks"]) == 1


def test_a_gateway_that_is_down_is_one_line():
    url = f"http://127.0.0.1:{find_free_ports(['nobody'])['nobody']}"
    done = run_python("benchmarks/ab_test.py", "--url", url, "--share", "50", "--api-key", "k")
    assert done.returncode == 1
    assert done.stderr == f"ab_test: {url} does not answer (Connection refused): run make gateway\n"


def test_ctrl_c_keeps_what_came_in(tmp_path):
    let_go = threading.Event()

    class Held(ToySplit):
        """Answers what three looks of 81 users ask, and then nothing until it is let go."""

        def reply(self, *arguments):
            if len(self.asked) > 3 * 81 * 3 + 20:
                let_go.wait()
            return super().reply(*arguments)

    with Held() as split:
        process = subprocess.Popen(
            [sys.executable, "ab_test.py", "--url", split.url, "--share", "50", "--api-key", "k", "--looks", "40",
             "--timeout", str(DEADLINE_S), "--output", tmp_path / "ab.json"],
            cwd=REPOSITORY_DIR / "benchmarks", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        for line in process.stdout:
            if line.startswith("look 3"):
                break
        process.send_signal(signal.SIGINT)
        let_go.set()
        output, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, errors
    result = json.loads((tmp_path / "ab.json").read_text())
    assert result["interrupted"] == "interrupted"
    assert len(result["looks"]) >= 3
    assert "verdict: not enough evidence (interrupted; " in output
