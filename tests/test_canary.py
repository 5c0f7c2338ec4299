"""The canary: error rates by simulation, its walk through a toy split, and planted versions behind the gateway."""

import itertools
import json
import sys

import canary
import numpy as np
import pytest
from ab_decision import PROMOTE, ROLL_BACK, make_plan
from ab_test import baseline_accuracy
from reference import load_expected
from simulated_users import of_version, run_to_the_end, share_of, simulate, table
from toy_split import ToySplit

RUNS = 2000
ACCURACY = baseline_accuracy()


@pytest.fixture(scope="module")
def plan():
    return make_plan(
        ACCURACY, 0.05, 0.2, power=0.95, shares=canary.SHARES, looks_per_step=canary.LOOKS_PER_STEP, needs_gain=False
    )


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_version_that_is_as_good_is_taken_back_in_at_most_one_of_twenty_walks(version, plan):
    """Sixteen looks, and all users slow down and speed up from step to step."""
    same = of_version(version)
    failing = (0.02, 0.02)
    verdicts, _ = run_to_the_end(plan, simulate(plan, (same, same), RUNS, seed=1, failing=failing, drift=0.3))
    assert share_of(verdicts, ROLL_BACK) <= 0.05
    assert share_of(verdicts, PROMOTE) >= 0.93  # power 0.95, less what is taken back by chance


PLANTS = {
    "wrong answers": {"tables": ("1", "inverted")},
    "slow": {"tables": ("1", "2"), "slower": 3.0},
    "crashing": {"tables": ("1", "2"), "failing": (0.0, 1.0)},
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_bad_version_never_gets_half_of_the_users(plant, plan):
    about = dict(PLANTS[plant])
    tables = {version: of_version(version) for version in "12"}
    tables["inverted"] = table(1 - load_expected("1")[:, 1])
    about["tables"] = tuple(tables[name] for name in about["tables"])
    verdicts, looks = run_to_the_end(plan, simulate(plan, runs=500, seed=2, **about))
    assert share_of(verdicts, ROLL_BACK) >= 0.98
    assert np.quantile(looks, 0.99) <= 2 * canary.LOOKS_PER_STEP


# The walk, through a toy split that the gateway's commands set.


@pytest.fixture
def run_canary(monkeypatch, capsys, tmp_path):
    """Run the command in this process; return (exit code, printed lines, result, commands to the gateway)."""
    monkeypatch.setattr(canary, "interrupt_on_sigterm", lambda: None)
    output = tmp_path / "canary.json"

    def run(split: ToySplit, *options: str, stuck: bool = False, replicas=()) -> tuple[int, list[str], dict, list[str]]:
        commands = []
        replicas = itertools.chain(replicas, itertools.repeat(2))

        def call_gateway(*arguments: str) -> str:
            commands.append(" ".join(arguments))
            shares = {"promote": 100, "rollback": 0}
            if not stuck:
                split.share = shares[arguments[0]] if arguments[0] in shares else int(arguments[2].removeprefix("v2="))
            return ""

        monkeypatch.setattr(canary, "call_gateway", call_gateway)
        monkeypatch.setattr(canary, "count_replicas", lambda server: next(replicas))
        where = ["--url", split.url, "--api-key", "k", "--output", str(output), "--margin", "8"]
        monkeypatch.setattr(sys, "argv", ["canary.py", *where, "--latency-margin", "300", *options])
        code = canary.main()
        return code, capsys.readouterr().out.splitlines(), json.loads(output.read_text()), commands

    return run


def test_a_good_version_reaches_every_user(run_canary, tmp_path):
    with ToySplit(share=0) as split:
        code, lines, result, commands = run_canary(split)
    assert code == 0
    assert commands == [
        *(f"set my_model v2={share} --server onnx" for share in (5, 25, 50, 100)),
        "promote my_model --server onnx",
    ]
    assert lines[-1].startswith("verdict: promote (version 2's probabilities are better (Brier score), and no harm; ")
    assert lines[-1].endswith("; all users get version 2")
    assert len(result["looks"]) == 16
    assert (tmp_path / "canary.png").read_bytes().startswith(b"\x89PNG")


TOY_PLANTS = {
    "wrong answers": ({"versions": "1x"}, "version 2 is less accurate"),
    "slow": ({"slow_s": 0.1}, "version 2 is slower than allowed"),
    "errors": ({"failing": 100}, "version 2 fails more users"),
    "shapeless answers": ({"shapeless": True}, "version 2 fails more users"),
}


@pytest.mark.parametrize("plant", TOY_PLANTS)
def test_a_bad_version_is_taken_back(plant, run_canary):
    manner, reason = TOY_PLANTS[plant]
    with ToySplit(share=0, **manner) as split:
        code, lines, result, commands = run_canary(split)
    assert code == 1
    assert lines[-1].startswith(f"verdict: roll back ({reason}; ")
    assert lines[-1].endswith("; all users get version 1")
    assert (result["verdict"], result["reason"]) == ("roll back", reason)
    assert commands[-1] == "rollback my_model --server onnx"
    assert not {"promote my_model --server onnx", "set my_model v2=50 --server onnx"} & set(commands)


def test_a_split_that_does_not_do_what_it_is_set_to_is_taken_back(run_canary):
    with ToySplit(share=0) as split:
        code, lines, _, commands = run_canary(split, stuck=True)
    assert code == 1
    assert lines[-1].startswith("verdict: roll back (sample ratio mismatch")
    assert commands[-1] == "rollback my_model --server onnx"


def test_a_version_that_loses_a_replica_is_taken_back_though_no_user_noticed(run_canary):
    with ToySplit(share=0) as split:
        code, lines, result, commands = run_canary(split, replicas=[2, 2, 1])
    assert code == 1
    assert lines[-1].startswith("verdict: roll back (version 2 lost a replica; ")
    assert len(result["looks"]) == 2
    assert commands[-1] == "rollback my_model --server onnx"


def test_a_step_that_takes_too_long_is_taken_back(run_canary):
    with ToySplit(share=0) as split:
        code, lines, result, commands = run_canary(split, "--step-seconds", "0.2")
    assert code == 1
    assert lines[-1].startswith("verdict: roll back (the step took more than 0.2 s; ")
    assert commands == ["set my_model v2=5 --server onnx", "rollback my_model --server onnx"]


def test_ctrl_c_takes_version_2_back_and_keeps_what_came_in(run_canary, monkeypatch):
    send = canary.Crowd.send

    def send_twice(crowd, numbers, *rest):
        if numbers.start > 300:
            raise KeyboardInterrupt
        return send(crowd, numbers, *rest)

    monkeypatch.setattr(canary.Crowd, "send", send_twice)
    with ToySplit(share=0) as split:
        code, lines, result, commands = run_canary(split)
    assert code == 130
    assert commands[-1] == "rollback my_model --server onnx"
    assert result["interrupted"] and result["looks"]
    assert lines[-1].startswith("verdict: roll back (interrupted; ")
