"""Percentiles, intervals and verdicts against NumPy, SciPy and distributions whose truth is known.

A 95 % interval must cover the truth in about 95 of 100 repeated measurements. With 2,000 repetitions
the observed coverage itself has a standard error of 0.5 %, so 93.5 % is three of them below.
"""

import json

import numpy as np
import pytest
from intervals import binomial_quantile, compare_rates, mean_interval, percentile_interval, ratio_interval
from results import Cell, decode_times, encode_times
from scipy import stats

REPETITIONS = 2000
LEAST_COVERAGE = 0.935
MOST_COVERAGE = 0.965
DISTRIBUTIONS = {
    "lognormal": stats.lognorm(s=0.8, scale=1e-3),
    "exponential": stats.expon(scale=1e-3),
}


def draw(name: str, random: np.random.Generator, shape) -> np.ndarray:
    """Latencies in seconds; "two humps" are 1 to 2 ms and, one in twenty, 50 to 51 ms."""
    if name != "two humps":
        return DISTRIBUTIONS[name].rvs(shape, random_state=random)
    return random.uniform(1e-3, 2e-3, shape) + 0.049 * (random.random(shape) < 0.05)


def true_percentile(name: str, percent: float) -> float:
    if name != "two humps":
        return float(DISTRIBUTIONS[name].ppf(percent / 100))
    share = percent / 100
    return 1e-3 + 1e-3 * share / 0.95 if share <= 0.95 else 0.05 + 1e-3 * (share - 0.95) / 0.05


def make_cell(rounds_s: list[np.ndarray]) -> Cell:
    return Cell(
        rounds=list(range(1, len(rounds_s) + 1)),
        rounds_s=rounds_s, rates=[float(len(part)) for part in rounds_s], offered_rate=0.0, connections=1,
        rows_per_request=1, failed=0, wrong=0, client_share=0.5, server_cpu_s=[0.0], rss_bytes=0,
        late_p99_s=float("nan"), foreign_share=0.0, request_bytes=0, reply_bytes=0, connect_s=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["lognormal", "exponential", "two humps"])
@pytest.mark.parametrize("percent", [50, 90, 99])
def test_a_percentiles_interval_covers_the_truth(name, percent):
    truth = true_percentile(name, percent)
    samples_s = np.sort(draw(name, np.random.default_rng(1), (REPETITIONS, 1000)), axis=1)
    intervals = [percentile_interval(sample_s, percent) for sample_s in samples_s]
    coverage = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert LEAST_COVERAGE <= coverage <= 0.99  # order statistics come in steps: a little more than 95 %


@pytest.mark.parametrize("count", [20, 100, 1000, 100_000])
@pytest.mark.parametrize("percent", [50, 90, 99, 99.9])
def test_a_percentiles_interval_has_the_exact_coverage_of_the_binomial_distribution(count, percent):
    """The values 1 to n tell which order statistics the ends are; from these the coverage follows exactly."""
    interval = percentile_interval(np.arange(1.0, count + 1), percent)
    below = stats.binom(count, percent / 100)
    coverage = (below.cdf(interval.high - 1) if np.isfinite(interval.high) else 1.0) - below.cdf(interval.low - 1)
    assert coverage >= 0.95
    if count * min(percent, 100 - percent) / 100 >= 10:
        assert coverage <= 0.98
        assert interval.low <= interval.estimate <= interval.high


def test_a_percentiles_interval_is_open_where_the_sample_cannot_bound_it():
    interval = percentile_interval(np.arange(1.0, 101), 99.9)
    assert interval.high == float("inf")
    assert percentile_interval(np.arange(1.0, 11), 1).low == 0


@pytest.mark.parametrize("rounds", [2, 3, 5, 12])
def test_the_mean_interval_covers_the_truth(rounds):
    values = np.exp(np.random.default_rng(rounds).normal(np.log(100), 0.3, (REPETITIONS, rounds)))
    intervals = [mean_interval(list(row)) for row in values]
    coverage = np.mean([interval.low <= 100 <= interval.high for interval in intervals])
    assert LEAST_COVERAGE <= coverage <= MOST_COVERAGE


def test_the_mean_interval_is_scipys():
    values = np.random.default_rng(4).lognormal(5, 0.3, 7)
    logs = stats.ttest_1samp(np.log(values), 0).confidence_interval(0.95)
    own = mean_interval(list(values))
    np.testing.assert_allclose(
        (own.estimate, own.low, own.high), (stats.gmean(values), np.exp(logs.low), np.exp(logs.high))
    )


@pytest.mark.parametrize("percent", [1, 50, 90, 99, 99.9])
def test_a_binomial_quantile_is_scipys(percent):
    for count in (1, 2, 3, 10, 99, 1000, 12_345, 270_336):
        for share in (0.025, 0.3, 0.975):
            assert binomial_quantile(share, count, percent / 100) == stats.binom.ppf(share, count, percent / 100)


def test_one_round_says_nothing_about_the_spread():
    interval = mean_interval([5.0])
    assert (interval.estimate, interval.low, interval.high) == (pytest.approx(5), 0, float("inf"))


@pytest.mark.parametrize("rounds", [3, 8])
def test_the_ratio_of_two_runs_covers_the_truth_and_finds_no_change_where_there_is_none(rounds):
    random = np.random.default_rng(rounds)
    before = random.lognormal(np.log(100), 0.1, (REPETITIONS, rounds))
    after = random.lognormal(np.log(150), 0.2, (REPETITIONS, rounds))
    intervals = [ratio_interval(list(new), list(old)) for new, old in zip(after, before, strict=True)]
    coverage = np.mean([interval.low <= 1.5 <= interval.high for interval in intervals])
    assert LEAST_COVERAGE <= coverage <= 0.99  # Welch's t errs on the careful side for few rounds
    same = [ratio_interval(list(a), list(b)) for a, b in zip(before[::2], before[1::2], strict=True)]
    assert np.mean([not interval.low <= 1 <= interval.high for interval in same]) <= 0.07


def draw_rates(random: np.random.Generator, rounds: int, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Rates of two servers, (REPETITIONS, rounds) each, the first `ratio` times the second's.

    Within a round they share its luck, 30 %; each has 3 % of its own.
    """
    luck = random.lognormal(0, 0.3, (REPETITIONS, rounds))
    own_a, own_b = random.lognormal(0, 0.03, (2, REPETITIONS, rounds))
    return 1000 * luck * own_a * ratio, 1000 * luck * own_b


def verdicts(rates_a: np.ndarray, rates_b: np.ndarray) -> list[str]:
    return [compare_rates("A", list(a), "B", list(b)) for a, b in zip(rates_a, rates_b, strict=True)]


@pytest.mark.parametrize("rounds", [2, 3, 5, 10])
def test_equal_servers_are_called_different_in_one_of_twenty_comparisons(rounds):
    found = verdicts(*draw_rates(np.random.default_rng(rounds), rounds, ratio=1.0))
    different = np.mean(["no significant difference" not in verdict for verdict in found])
    assert 0.035 <= different <= 0.065


def test_a_clear_difference_is_found_though_the_rounds_differ_much():
    found = verdicts(*draw_rates(np.random.default_rng(5), 5, ratio=1.15))
    assert np.mean([verdict.startswith("A faster than B by") for verdict in found]) > 0.98
    found = verdicts(*draw_rates(np.random.default_rng(5), 5, ratio=1 / 1.15))
    assert np.mean([verdict.startswith("B faster than A by") for verdict in found]) > 0.98


@pytest.mark.parametrize("ratio", [1.5, 1 / 1.5])
def test_the_range_in_a_verdict_covers_the_true_ratio(ratio):
    ranges = [
        verdict.removesuffix("×").split(" by ")[1].split("–")
        for verdict in verdicts(*draw_rates(np.random.default_rng(6), 5, ratio))
    ]
    covered = np.mean([float(low) - 0.005 <= 1.5 <= float(high) + 0.005 for low, high in ranges])  # two decimals
    assert LEAST_COVERAGE <= covered <= 0.985  # rounding to two decimals widens it


def test_one_round_gives_no_verdict():
    assert "one round cannot tell" in compare_rates("A", [1000.0], "B", [10.0])


def test_percentiles_of_a_cell_are_numpys_over_all_rounds():
    random = np.random.default_rng(7)
    rounds_s = [np.sort(random.lognormal(-7, 1, count)) for count in (3000, 5000, 4000)]
    cell = make_cell(rounds_s)
    for percent in (50, 90, 95, 99, 99.9):
        interval = cell.percentile_s(percent)
        assert interval.estimate == pytest.approx(np.percentile(np.concatenate(rounds_s), percent), rel=1e-12)
        assert interval.low <= interval.estimate <= interval.high


def test_a_cells_percentile_is_withheld_where_fewer_than_ten_lie_beyond():
    for percent, count in ((50, 20), (99, 1000), (99.9, 10_000)):
        assert make_cell([np.linspace(1, 2, count)]).percentile_s(percent) is not None
        assert make_cell([np.linspace(1, 2, count - 1)]).percentile_s(percent) is None


# With rounds that differ by 30 % five of them do not show how slow the slowest tenth of all rounds is: p99 gets 87 %.
@pytest.mark.parametrize(("spread", "least"), [(0.0, 0.935), (0.1, 0.92), (0.3, 0.87)])
@pytest.mark.parametrize("percent", [50, 99])
def test_a_cells_interval_covers_the_truth_whether_or_not_rounds_differ(spread, least, percent):
    """Latencies are lognormal; each round multiplies them by its own luck. Their mixture is lognormal again."""
    random = np.random.default_rng(8)
    truth = float(stats.lognorm(s=np.hypot(0.5, spread), scale=1e-3).ppf(percent / 100))
    covered = []
    for _ in range(REPETITIONS // 2):
        latencies_s = 1e-3 * random.lognormal(0, spread, (5, 1)) * random.lognormal(0, 0.5, (5, 400))
        interval = make_cell(list(np.sort(latencies_s, axis=1))).percentile_s(percent)
        covered.append(interval.low <= truth <= interval.high)
    assert np.mean(covered) >= least


def test_encoded_times_lose_half_a_microsecond_below_1_ms_and_half_a_percent_above():
    random = np.random.default_rng(9)
    times_s = np.sort(np.concatenate([[0.0, 1e-7, 1e-6], 10 ** random.uniform(-6.5, 2.5, 50_000)]))
    edges_s = [10.0**power * factor for power in range(-5, 3) for factor in (0.999999, 1.0, 1.000001)]
    times_s = np.sort(np.concatenate([times_s, edges_s]))
    pairs = encode_times(times_s)
    back_s = decode_times(pairs)
    loss_s = np.abs(back_s - times_s)
    short = times_s < 1e-3
    assert len(back_s) == len(times_s)
    assert loss_s[short].max() <= 0.51e-6
    assert (loss_s[~short] / times_s[~short]).max() <= 0.0055  # half of the third digit, and 0.5 us before that
    assert (np.diff(back_s) >= 0).all()
    assert json.loads(json.dumps(pairs)) == pairs
    assert all(len(str(value).rstrip("0")) <= 3 for value, _ in pairs)  # so a long tail stays a short list


def test_encoding_times_twice_changes_nothing_more():
    pairs = encode_times(np.random.default_rng(10).lognormal(-6, 2, 10_000))
    assert encode_times(decode_times(pairs)) == pairs
    assert encode_times(np.empty(0)) == []
    assert len(decode_times([])) == 0
