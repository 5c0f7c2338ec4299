"""Capacity is arithmetic on measured figures: more load never takes less, and every figure has a reason."""

import importlib
import json
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figures.measured import Measured
from figures.result_file import SAMPLE_PATH, read_result, write_result
from helpers import call_main
from planning.capacity import (
    HPA_TOLERANCE,
    CapacityError,
    ContainerCost,
    count_replicas,
    find_container,
    grace_period_s,
    hpa_target_percent,
    make_plan,
    memory_limit_bytes,
    read_containers,
    startup_budget_s,
    sustained_rate,
)
from planning.facts import STALE_DAYS, is_stale, load_facts
from planning.scale import Demands, Surroundings, list_new_limits, make_scale
from planted_results import Planted, make_result

SWEEP = {500.0: 0.004, 1000.0: 0.02, 1500.0: 0.045, 2000.0: None}
CONTAINERS = {"a": ContainerCost((4.0, 6.1, 5.0), stop_s=1.2, memory_bytes=300_000_000, image_bytes=1)}
RATES = st.floats(1, 1e7)


@pytest.fixture(scope="module")
def planted():
    return Measured(make_result({"a-tuned": Planted(sweep=SWEEP, cpu_s=0.0005, memory_mb=200)}))


@pytest.fixture(scope="module")
def sample():
    return Measured(read_result(SAMPLE_PATH))


@pytest.fixture(scope="module")
def capacity():
    return importlib.import_module("capacity")


@pytest.mark.parametrize(
    ("rate", "sustained", "headroom", "replicas"),
    [(5000, 4900, 0.7, 3), (3430, 4900, 0.7, 2), (3431, 4900, 0.7, 3), (1, 1000, 0.7, 2), (10_000, 1000, 1.0, 11)],
)
def test_replicas_are_what_the_rate_takes_and_one_more(rate, sustained, headroom, replicas):
    assert count_replicas(rate, sustained, headroom) == replicas


@given(RATES, RATES, st.floats(1, 1e5), st.floats(0.05, 1))
def test_a_higher_rate_never_takes_fewer_replicas_and_a_faster_server_never_more(rate, other, sustained, headroom):
    low, high = sorted((rate, other))
    assert count_replicas(low, sustained, headroom) <= count_replicas(high, sustained, headroom)
    assert count_replicas(rate, 2 * sustained, headroom) <= count_replicas(rate, sustained, headroom)
    assert (count_replicas(rate, sustained, headroom) - 1) * sustained * headroom >= rate * (1 - 1e-6)


@pytest.mark.parametrize(
    ("objective_ms", "rate"), [(4, 500), (19.9, 500), (20, 1000), (44, 1000), (45, 1500), (1000, 1500)]
)
def test_the_rate_kept_up_with_is_the_last_within_the_objective(planted, objective_ms, rate):
    assert sustained_rate(planted, "a-tuned", objective_ms / 1e3) == rate


def test_a_server_without_such_a_rate_is_refused_with_the_reason():
    servers = {
        "slow": Planted(sweep=SWEEP),
        "unswept": Planted(),
        "weak": Planted(sweep={500.0: None}),
        "rare": Planted(sweep={50.0: 0.004}, requests=60),
    }
    measured = Measured(make_result(servers))
    for name, objective_s, words in (
        ("slow", 0.003, "p99 is 4.0 ms at 500/s"),
        ("unswept", 0.05, "no offered rates were swept"),
        ("weak", 0.05, "does not keep up with 500/s"),
        ("rare", 0.04, "too few requests for a p99"),
    ):
        with pytest.raises(CapacityError, match=words):
            sustained_rate(measured, name, objective_s)
    assert sustained_rate(measured, "rare", 0.05) == 50  # as the report judges it


def test_the_autoscalers_target_is_the_usage_at_the_planned_rate(planted):
    assert hpa_target_percent(planted, "a-tuned", 1000.0) == 50  # 1,000/s of 0.5 ms each
    assert hpa_target_percent(planted, "a-tuned", 750.0) == 37


def test_the_autoscalers_target_can_be_passed_by_a_server_that_uses_all_it_has():
    measured = Measured(make_result({"a": Planted(sweep={900.0: 0.01, 1000.0: 0.02}, cpu_s=0.00098)}))
    target = hpa_target_percent(measured, "a", 1000.0)
    most = max(cell.cores_used for cell in measured.cells("a"))
    assert 100 * most / target > 1 + HPA_TOLERANCE
    assert 100 * most / (target + 1) <= 1 + HPA_TOLERANCE  # and is no lower than that asks for


def test_budgets_come_from_the_containers():
    cost = CONTAINERS["a"]
    assert startup_budget_s(cost) == 19  # 3 × 6.1
    assert grace_period_s(cost) == 18  # 10 + 2 × 1.2 + 5
    assert grace_period_s(cost, pre_stop_s=20) == 28
    assert find_container(CONTAINERS, "a-grpc-tuned") is cost
    assert find_container(CONTAINERS, "b") is None


def test_a_memory_limit_holds_what_was_seen_and_every_volume_in_memory():
    mib = 1 << 20
    assert memory_limit_bytes([100 * mib, 60 * mib]) == 192 * mib  # 1.5 × 100, in steps of 64
    assert memory_limit_bytes([100 * mib], 64 * mib) == 256 * mib


def test_a_plan_holds_each_of_these(planted):
    plan = make_plan(planted, "a-tuned", 4000, 0.05, CONTAINERS)
    assert (plan.sustained_rate, plan.replicas, plan.cores, plan.cpu_request) == (1500, 5, 5, 1)
    assert (plan.min_replicas, plan.max_replicas) == (2, 10)
    assert plan.memory_limit_bytes == memory_limit_bytes([300_000_000])
    assert (plan.startup_budget_s, plan.grace_period_s) == (19, 18)
    without = make_plan(planted, "a-tuned", 4000, 0.05, {})
    assert (without.startup_budget_s, without.grace_period_s) == (None, None)


def test_the_samples_plans_are_above_what_was_measured(sample):
    containers = read_containers()
    for name in ("onnx-tuned", "tfserving-tuned", "bentoml-tuned", "torchserve-tuned"):
        plan = make_plan(sample, name, 5000, 0.05, containers)
        cost = find_container(containers, name)
        assert (plan.replicas - 1) * plan.sustained_rate > 5000
        assert plan.startup_budget_s >= 3 * max(cost.starts_s)
        assert plan.grace_period_s >= 10 + 2 * cost.stop_s + 5
        assert plan.memory_limit_bytes > max(cell.rss_bytes for cell in sample.cells(name))
        assert 0 < plan.hpa_target_percent < 100 / (1 + HPA_TOLERANCE)
        assert 2 <= plan.min_replicas <= plan.replicas <= plan.max_replicas


def test_what_surrounds_the_replicas_grows_with_the_rate(planted):
    scales = [
        make_scale(planted, make_plan(planted, "a-tuned", rate, 0.05, CONTAINERS), CONTAINERS)
        for rate in (1e3, 1e4, 1e5, 1e6)
    ]
    for smaller, larger in zip(scales, scales[1:], strict=False):
        assert smaller.plan.replicas < larger.plan.replicas
        assert smaller.gateways <= larger.gateways
        assert smaller.cost_month < larger.cost_month
        assert {limit.name for limit in smaller.passed} <= {limit.name for limit in larger.passed}
    around = Surroundings()
    last = scales[-1]
    assert last.gateways == -(-1_000_000 // (around.gateway_cores * around.gateway_rate * 0.7)) + 1
    cores = last.plan.cores + last.gateways * around.gateway_cores
    hourly = cores * around.core_price + last.plan.replicas * last.plan.memory_limit_bytes / 1e9 * around.memory_price
    assert last.cost_month == pytest.approx(730 * hourly)
    assert (last.nodes - 1) * (around.node_cores - 1) < cores <= last.nodes * (around.node_cores - 1)


def test_a_limit_is_met_at_the_rate_at_which_it_is_reached(planted):
    plan = make_plan(planted, "a-tuned", 1e6, 0.05, CONTAINERS)
    scale = make_scale(planted, plan, CONTAINERS)
    met = {limit.name: limit.met_at_rate for limit in scale.passed}
    planned = 1500 * 0.7
    assert met["spare"] == pytest.approx(planned, rel=0.01)
    assert met["machine"] == pytest.approx(7 * planned, rel=0.01)  # the ninth core: seven that work, one to spare
    assert met["dns"] == pytest.approx(510 * planned, rel=0.01)
    assert met["logs"] == pytest.approx(1e12 / 200 / 86_400, rel=0.01)
    assert list(met.values()) == sorted(met.values())
    assert "cluster" not in met
    assert {limit.name for limit in list_new_limits(scale, 10 * planned)} == {
        n for n, r in met.items() if r > 10 * planned
    }


def test_every_fact_has_a_source_and_a_day_and_every_limit_a_demand(planted):
    demands = Demands(planted, make_plan(planted, "a-tuned", 1e3, 0.05, CONTAINERS), Surroundings(), 1.0).all(1e3)
    for kind in ("assumption", "limit"):
        for name, fact in load_facts()[kind].items():
            assert fact["source"], name
            assert is_stale(fact, fact["read"] + timedelta(STALE_DAYS + 1))
            assert not is_stale(fact, fact["read"] + timedelta(STALE_DAYS))
    assert {limit["of"] for limit in load_facts()["limit"].values()} <= demands.keys()


def test_the_command_prints_the_plans_and_a_program_gets_the_same(capacity, sample):
    plain, machine = call_main(capacity, "--rate", "5000"), call_main(capacity, "--rate", "5000", "--json")
    assert (plain.returncode, machine.returncode) == (0, 0)
    plans = json.loads(machine.stdout)["plans"]
    containers = read_containers()
    for name, plan in plans.items():
        assert plan == make_plan(sample, name, 5000, 0.05, containers).as_dict()
        row = next(line for line in plain.stdout.splitlines() if line.startswith(f"{name} ("))
        assert f" {plan['replicas']} " in row
        assert f" {plan['hpa_target_percent']} %" in row


def test_the_command_shows_three_scales_and_its_assumptions(capacity):
    done = call_main(capacity, "--scale", "--servers", "onnx-tuned", "--core-price", "1")
    assert done.returncode == 0
    assert [word for word in ("10,000", "100,000", "1,000,000") if word not in done.stdout] == []
    assert "one process: when it stops, everything stops" in done.stdout
    assert "no offer of anybody's" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--servers", "nobody"], "nobody: not in sample.json; it has null, "),
        (["--rate", "-1"], "a number above 0"),
        (["--rate", "nan"], "a number above 0"),
        (["--headroom", "2"], "a share of at most 1"),
        (["--node-cores", "1"], "needs two or more"),
        (["nowhere.json"], "no such file"),
        (["--containers", "nowhere.json"], "make docker-measure"),
        (["--p99-ms", "0.001"], "no server was measured to hold p99 within 0.001 ms"),
    ],
)
def test_a_mistake_is_one_line(capacity, arguments, words):
    done = call_main(capacity, *arguments)
    assert done.returncode != 0
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_file_of_another_kind_is_one_line(capacity, tmp_path):
    path = tmp_path / "r.json"
    write_result(make_result({"a": Planted(sweep=SWEEP)}), path)
    done = call_main(capacity, path, "--containers", path)
    assert done.returncode == 1
    assert "not what make docker-measure writes" in done.stderr
