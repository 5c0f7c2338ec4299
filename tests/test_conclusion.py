"""The report's last word follows from the data, and says so when they do not decide."""

import pytest

from drawing.conclusion import conclude
from figures.measured import Measured
from planted_results import Planted, make_result

FAST = Planted("native", {1000.0: 0.01, 2000.0: 0.02, 2100.0: None}, p50_s=0.002, memory_mb=900, start_s=10)
SLOW = Planted("native", {500.0: 0.01, 600.0: None}, p50_s=0.002, memory_mb=890, start_s=9)


def conclude_of(**servers: Planted) -> list[str]:
    return conclude(Measured(make_result(servers)))


def test_the_server_that_keeps_up_with_what_broke_the_others_is_taken():
    [sentence] = conclude_of(fast=FAST, slow=SLOW)
    assert sentence == (
        "Of the frameworks' own servers: so take fast, because it keeps up with 2,000 requests/s, more than broke any "
        "other."
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"p50_s": 0.001}, "unless the latency of one user counts more: at 1 connection slow is significantly faster"),
        ({"memory_mb": 100}, "unless memory is short: slow needs 100 MB and fast 900"),
        ({"start_s": 1}, "unless it must be back quickly: slow answers 1.0 s after its start and fast 10.0"),
    ],
)
def test_what_speaks_for_another_is_an_unless(change, words):
    [sentence] = conclude_of(fast=FAST, slow=Planted(**{**SLOW.__dict__, **change}))
    assert "so take fast" in sentence
    assert words in sentence


def test_rates_that_overlap_decide_nothing():
    near = Planted("native", {1800.0: 0.01, 2200.0: None}, p50_s=0.002, memory_mb=300, start_s=10)
    [sentence] = conclude_of(fast=FAST, near=near)
    assert "the data do not decide under load between fast and near" in sentence
    assert "So take near for its memory" in sentence


def test_without_a_sweep_the_data_do_not_decide():
    assert conclude_of(one=Planted("native")) == [
        "Of the frameworks' own servers: the data do not decide: no offered rate was kept up with, or none was swept."
    ]


def test_each_kind_has_its_own_word_and_floors_have_none():
    local = Planted("local", {9000.0: 0.01, 9900.0: None})
    sentences = conclude_of(fast=FAST, mine=local, null=Planted("floor", {99_000.0: 0.001}))
    assert [sentence.partition(":")[0] for sentence in sentences] == [
        "Of the frameworks' own servers", "Of this repository's own servers",
    ]  # fmt: skip
    assert "so take mine" in sentences[1]
