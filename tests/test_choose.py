"""The choice follows from the figures: each rule flips at its threshold and only there, and no ✔ is without a test."""

import ast
import importlib
import re
from dataclasses import replace
from datetime import date, timedelta
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import REPOSITORY_DIR
from drawing.choices import describe_choice
from drawing.guide import FOLDER, GUIDE_PATH, load_scenarios, render_guide
from figures.measured import Measured
from figures.result_file import SAMPLE_PATH, read_result, write_result
from helpers import call_main
from planning.capacity import ContainerCost, read_containers
from planning.choosing import Needs, choose, find_flips, rows_factor
from planning.facts import STALE_DAYS, load_facts
from planted_results import Planted, make_result

# Each is ten times the next in rate; the sweeps are so fine that no two overlap.
TRUTH = {
    "onnx-tuned": Planted("local", {8000.0: 0.002, 9000.0: 0.01, 9100.0: None}, memory_mb=80, server_us_per_row=2),
    "bentoml-tuned": Planted("native", {800.0: 0.004, 900.0: 0.02, 910.0: None}, memory_mb=300, server_us_per_row=20),
    "torchserve-tuned": Planted("native", {1800.0: 0.01, 2000.0: 0.04, 2010.0: None}, memory_mb=900),
    "null": Planted("floor", {}),
}
CONTAINERS = {
    "onnx": ContainerCost((1.0,), 0.3, 40_000_000, 1),
    "bentoml": ContainerCost((6.0,), 1.0, 200_000_000, 1),
    "torchserve": ContainerCost((14.0,), 8.0, 500_000_000, 1),
}


@pytest.fixture(scope="module")
def truth():
    return Measured(make_result(TRUTH))


@pytest.fixture(scope="module")
def sample():
    return read_sample()[0]


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("choose")


@cache
def read_sample() -> tuple[Measured, dict[str, ContainerCost]]:
    return Measured(read_result(SAMPLE_PATH)), read_containers()


@cache
def sample_choice(needs: Needs):
    return choose(*read_sample(), needs)


def test_the_fewest_cores_are_recommended_for_each_kind_by_itself(truth):
    choice = choose(truth, CONTAINERS, Needs(rate=10_000))
    assert [one.plan.server for one in choice.candidates] == ["onnx-tuned", "torchserve-tuned", "bentoml-tuned"]
    assert choice.recommended == {"native": ("torchserve-tuned",), "local": ("onnx-tuned",)}


@pytest.mark.parametrize(
    ("need", "threshold", "name"),
    [
        ("p99_ms", 20.0, "bentoml-tuned"),
        ("p99_ms", 40.0, "torchserve-tuned"),
        ("memory_mb", 80.0, "onnx-tuned"),
        ("memory_mb", 300.0, "bentoml-tuned"),
        ("cold_start_s", 6.0, "bentoml-tuned"),
        ("cold_start_s", 14.0, "torchserve-tuned"),
    ],
)
def test_a_limit_takes_a_server_out_below_its_figure_and_only_there(truth, need, threshold, name):
    def rates(value: float) -> dict[str, float]:
        choice = choose(truth, CONTAINERS, Needs(**{need: value}))
        return {one.plan.server: one.plan.sustained_rate for one in choice.candidates}

    at, below = rates(threshold), rates(threshold * 0.999)
    assert name in at
    assert below.get(name, 0) < at[name]
    assert {server: rate for server, rate in at.items() if server != name} == {
        server: rate for server, rate in below.items() if server != name
    }


def test_facts_take_servers_out(truth):
    def left(**needs) -> set[str]:
        return {one.plan.server for one in choose(truth, CONTAINERS, Needs(**needs)).candidates}

    assert left() == {"onnx-tuned", "bentoml-tuned", "torchserve-tuned"}
    assert left(maintained=True) == {"onnx-tuned", "bentoml-tuned"}
    assert left(reload=True) == {"onnx-tuned", "torchserve-tuned"}
    assert left(python=True) == {"bentoml-tuned", "torchserve-tuned"}
    assert left(grpc=True) == {"onnx-tuned", "torchserve-tuned"}
    assert left(framework="tensorflow") == {"bentoml-tuned"}
    assert left(framework="scikit-learn") == {"onnx-tuned", "bentoml-tuned"}


def test_servers_that_the_offered_rates_do_not_tell_apart_are_both_named():
    close = {
        "bentoml-tuned": Planted("native", {1000.0: 0.01, 1500.0: None}, memory_mb=300),
        "torchserve-tuned": Planted("native", {1200.0: 0.01, 1600.0: None}, memory_mb=900),
    }
    choice = choose(Measured(make_result(close)), CONTAINERS, Needs(rate=20_000))
    assert choice.candidates[0].plan.server == "torchserve-tuned"
    assert choice.recommended == {"native": ("bentoml-tuned", "torchserve-tuned")}  # the least memory first
    words = "\n".join(describe_choice(Measured(make_result(close)), choice))
    assert "; torchserve-tuned may need as few, because their limits lie" in words


def test_a_local_row_never_wins_over_a_native_one_and_never_without_its_label(truth):
    choice = choose(truth, CONTAINERS, Needs(rate=100_000))
    assert choice.recommended["native"] == ("torchserve-tuned",)
    lines = describe_choice(truth, choice)
    assert not [
        line for line in lines if "onnx-tuned" in line and not re.search(r"\(local\)|this repository's own", line)
    ]


def test_each_refusal_tells_the_limit_and_the_distance(truth):
    needs = Needs(p99_ms=3, memory_mb=200, cold_start_s=5, maintained=True, framework="tensorflow", reload=True)
    refused = choose(truth, CONTAINERS, needs).refused
    assert refused["torchserve-tuned"] == [
        "takes pytorch here, not tensorflow", "900 MB > 200", "14.0 s to the first answer > 5", "unmaintained",
        "p99 is 10.0 ms at 1,800/s, the lowest rate with a p99",
    ]  # fmt: skip
    assert "no test shows a new version while it serves" in refused["bentoml-tuned"]


def test_more_rows_a_request_take_as_many_more_cores_as_they_take_longer(truth):
    assert rows_factor(truth, "onnx-tuned", 1) == 1
    assert rows_factor(truth, "onnx-tuned", 1024) == pytest.approx(2.048, rel=0.05)  # 1,024 × 2 µs against 1 ms
    assert rows_factor(truth, "onnx-tuned", 2048) == pytest.approx(2 * 2.048 - 1, rel=0.1)
    assert "torchserve-tuned" in choose(truth, CONTAINERS, Needs(rows=2)).refused  # measured with one row only


def test_the_flips_are_found_where_they_are(truth):
    flips = find_flips(truth, CONTAINERS, Needs(), "memory_mb", 50, 2000)
    assert [flip.value for flip in flips[1:]] == pytest.approx([80, 300, 900], rel=0.01)
    assert flips[0].recommended == {}
    flips = find_flips(truth, CONTAINERS, Needs(), "cold_start_s", 0.2, 60)
    assert [flip.value for flip in flips[1:]] == pytest.approx([1, 6, 14], rel=0.01)


RATES = st.floats(1, 1e6)
LIMITS = st.none() | st.floats(0.5, 1e4)
NEEDS = st.builds(
    Needs, rate=RATES, p99_ms=st.none() | st.floats(1, 1000), memory_mb=LIMITS, cold_start_s=LIMITS,
    python=st.booleans(), reload=st.booleans(), grpc=st.booleans(), maintained=st.booleans(),
)  # fmt: skip
LOOSENED = ["p99_ms", "memory_mb", "cold_start_s", "python", "reload", "grpc", "maintained"]
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@PROPERTY
@given(NEEDS, st.floats(1, 100))
def test_a_higher_rate_never_takes_fewer_cores(needs, factor):
    before = {one.plan.server: one.plan.cores for one in sample_choice(needs).candidates}
    after = {
        one.plan.server: one.plan.cores for one in sample_choice(replace(needs, rate=needs.rate * factor)).candidates
    }
    assert before.keys() == after.keys()
    assert all(after[name] >= cores for name, cores in before.items())


@PROPERTY
@given(NEEDS, st.sampled_from(LOOSENED), st.floats(1, 9))
def test_loosening_a_limit_never_takes_a_candidate_out(needs, name, factor):
    value = getattr(needs, name)
    looser = replace(needs, **{name: False if isinstance(value, bool) else None if value is None else value * factor})
    if name == "p99_ms" and value is None:
        return
    before = {one.plan.server for one in sample_choice(needs).candidates}
    assert before <= {one.plan.server for one in sample_choice(looser).candidates}


# The guide.


def test_the_guide_is_the_one_that_the_results_make(sample):
    assert GUIDE_PATH.read_text() == render_guide(sample, read_containers(), date.today()), "run make guide"


def test_no_figure_of_the_guide_is_typed_by_hand():
    template = (FOLDER / "choosing.md.j2").read_text()
    typed = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|<!--.*?-->|`[^`]*`|p99|p50", "", template, flags=re.S)
    assert re.findall(r"\d+", re.sub(r"```.*?```", "", typed, flags=re.S)) == []


def test_the_guide_has_seven_questions_and_eight_scenarios_whose_answers_are_folded(sample):
    text = GUIDE_PATH.read_text()
    questions = ["First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh"]
    places = [text.index(f"**{word}: ") for word in questions]
    assert places == sorted(places)
    assert len(load_scenarios()) == 8
    assert len(re.findall(r"<details><summary>Take …</summary>", text)) == 8
    for number, (title, told, _, needs) in enumerate(load_scenarios(), 1):
        part = text[text.index(f"**{number}. {title}.**") :].partition("</details>")[0]
        before, folded = part.split("<summary>")
        assert told in before
        for names in sample_choice(needs).recommended.values():
            assert names[0] not in before, "the answer is not folded"
            assert names[0] in folded


def test_the_short_answer_is_what_the_command_takes(script, sample, monkeypatch):
    monkeypatch.setattr(script, "read_result", lambda _: None)  # twelve times the same figures
    monkeypatch.setattr(script, "Measured", lambda _: sample)
    rows = re.findall(r"^\| 3,000 \| (.*) \|$", GUIDE_PATH.read_text(), flags=re.M)
    for place, framework in ((0, "scikit-learn"), (0, "pytorch"), (1, "tensorflow")):
        for p99_ms, cell in zip((5, 10, 20, 50), rows[place].split(" | "), strict=True):
            done = call_main(script, "--rate", "3000", "--p99-ms", p99_ms, "--framework", framework, "--maintained")
            taken = re.findall(r"take, of .*: (\S+, \d+ cores?)", done.stdout)
            assert taken == cell.replace("*", "").split("; ")


def list_tests(path) -> dict[str, list[str]]:
    """The decorators of each test of a file."""
    return {
        node.name: [ast.unparse(decorator) for decorator in node.decorator_list]
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_tick_names_a_test_that_is_there_and_not_skipped():
    facts = load_facts()
    named = [
        one[framework] for one in facts["capability"].values() for framework in facts["framework"] if framework in one
    ]
    assert len(named) > 30
    text = GUIDE_PATH.read_text()
    assert text.count("[✔](") == len(named)
    for name in named:
        path, _, test = name.partition("::")
        decorators = list_tests(REPOSITORY_DIR / "tests" / path).get(test)
        assert decorators is not None, f"{name} is not there"
        assert not [one for one in decorators if "skip" in one or "xfail" in one], name
        assert f'[✔](tests/{path} "{test}")' in text


def test_a_fact_that_was_read_long_ago_is_shown_as_stale(truth):
    newest = max(fact["read"] for fact in load_facts()["framework"].values())
    fresh = render_guide(truth, CONTAINERS, newest)
    stale = render_guide(truth, CONTAINERS, newest + timedelta(STALE_DAYS + 1))
    assert "**Stale**" not in fresh
    assert "**Stale**" in stale


def test_a_claim_that_the_figures_contradict_is_called_so():
    containers = CONTAINERS
    for torchserve_s, verdict in ((0.002, "contradicts"), (0.0005, "agrees"), (0.001, "does not decide")):
        servers = {
            "torchserve-tuned": replace(TRUTH["torchserve-tuned"], p50_s=torchserve_s, noise=0.05),
            "bentoml-tuned": replace(TRUTH["bentoml-tuned"], noise=0.05),
        }
        text = render_guide(Measured(make_result(servers)), containers, date(2026, 12, 1))
        part = text[text.index("## What others found") :]
        assert f"**{verdict}**" in part.partition("**TensorFlow")[0], verdict


# The command.


def test_the_command_prints_candidates_refusals_and_what_to_take(script):
    done = call_main(script, "--rate", "5000", "--p99-ms", "20", "--memory-mb", "600", "--maintained")
    assert (done.returncode, "take, " in done.stdout) == (0, True)  # CHOOSING.md's command
    done = call_main(script, "--rate", "5000", "--maintained")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "5,000 requests/s, maintained"
    assert any(line.startswith("torchserve-tuned (native): out: unmaintained") for line in lines)
    choice = sample_choice(Needs(rate=5000, maintained=True))
    for names in choice.recommended.values():
        assert any(line.startswith("take, ") and names[0] in line for line in lines)


def test_where_nothing_fits_the_exit_code_says_so(script):
    done = call_main(script, "--p99-ms", "0.01")
    assert done.returncode == 1
    assert "no server that was measured meets all of this" in done.stdout


def test_another_result_file_gives_another_answer(script, tmp_path):
    path = tmp_path / "r.json"
    write_result(make_result(TRUTH), path)
    done = call_main(script, path, "--rate", "100000")
    assert "take, of the frameworks' own servers: torchserve-tuned, 73 cores" in done.stdout
    assert "from r.json" in done.stdout


def test_a_file_of_another_command_is_one_line(script, tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text('{"schema_version": 2, "settings": {}, "cells": []}')
    done = call_main(script, path)
    assert done.returncode == 1
    assert done.stderr == "choose: no endpoints and no windows in this file: benchmark_all.py did not write it\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "0"], "a number above 0"),
        (["--rows", "0"], "1 or more"),
        (["--framework", "jax"], "invalid choice"),
        (["nowhere.json"], "no such file"),
    ],
)
def test_a_mistake_is_one_line(script, arguments, words):
    done = call_main(script, *arguments)
    assert done.returncode != 0
    assert words in done.stderr.splitlines()[-1]
