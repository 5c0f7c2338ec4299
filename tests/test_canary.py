"""The canary: error rates by simulation, its walk through a toy split, and planted versions behind the gateway."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import canary
from endpoints.base import load_endpoints
from endpoints.reference import load_expected
from helpers import DEADLINE_S, REPOSITORY_DIR, call_main, skip_without_haproxy, start, wait_until
from machine.free_ports import find_free_ports
from rollout import gateway_cli
from rollout.decision import PROMOTE, ROLL_BACK, make_plan
from rollout.experiment import baseline_accuracy, decode_users
from rollout.gateway_cli import call_gateway, lent_key, read_share
from rollout.split_users import Crowd, Split
from simulated_users import of_version, run_to_the_end, share_of, simulate, table
from toy_split import ToySplit

sys.path.insert(0, str(REPOSITORY_DIR / "gateway"))

from gateway import read_status  # noqa: E402
from state import State  # noqa: E402

RUNS = 1000  # the standard error of a share of 0.05 is 0.007
NEVER_S = "1e9"
ACCURACY = baseline_accuracy()


@pytest.fixture(scope="module")
def plan():
    return make_plan(
        ACCURACY, 0.05, 0.5, power=0.95, shares=canary.SHARES, looks_per_step=canary.LOOKS_PER_STEP, needs_gain=False
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
def no_plot(monkeypatch):
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr("rollout.plot.draw", lambda *_: None)


@pytest.fixture
def run_canary(monkeypatch, tmp_path):
    """Run the command in this process; return (exit code, printed lines, result, commands to the gateway)."""
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
        split.stand_in(monkeypatch)
        where = ["--url", split.url, "--api-key", "k", "--output", output, "--step-seconds", NEVER_S]
        done = call_main(canary, *where, "--margin", "8", "--latency-margin", "300", *options)
        return done.returncode, done.stdout.splitlines(), json.loads(output.read_text()), commands

    return run


def test_a_good_version_reaches_every_user(run_canary, tmp_path):
    code, lines, result, commands = run_canary(ToySplit(share=0))
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
def test_a_bad_version_is_taken_back(plant, run_canary, no_plot):
    manner, reason = TOY_PLANTS[plant]
    code, lines, result, commands = run_canary(ToySplit(share=0, **manner))
    assert code == 1
    assert lines[-1].startswith(f"verdict: roll back ({reason}; ")
    assert lines[-1].endswith("; all users get version 1")
    assert (result["verdict"], result["reason"]) == ("roll back", reason)
    assert commands[-1] == "rollback my_model --server onnx"
    assert not {"promote my_model --server onnx", "set my_model v2=50 --server onnx"} & set(commands)


def test_a_split_that_does_not_do_what_it_is_set_to_is_taken_back(run_canary, no_plot):
    code, lines, _, commands = run_canary(ToySplit(share=0), stuck=True)
    assert code == 1
    assert lines[-1].startswith("verdict: roll back (sample ratio mismatch")
    assert commands[-1] == "rollback my_model --server onnx"


def test_a_version_that_loses_a_replica_is_taken_back_though_no_user_noticed(run_canary, no_plot):
    code, lines, result, commands = run_canary(ToySplit(share=0), replicas=[2, 2, 1])
    assert code == 1
    assert lines[-1].startswith("verdict: roll back (version 2 lost a replica; ")
    assert len(result["looks"]) == 2
    assert commands[-1] == "rollback my_model --server onnx"


def test_a_step_that_takes_too_long_is_taken_back(run_canary, no_plot, monkeypatch):
    send = canary.Crowd.send
    monkeypatch.setattr(canary.Crowd, "send", lambda *arguments: send(*arguments)[:-1])  # no time for the last user
    code, lines, result, commands = run_canary(ToySplit(share=0), "--step-seconds", "40")
    assert code == 1
    assert lines[-1].startswith("verdict: roll back (the step took more than 40 s; ")
    assert len(result["looks"]) == 1
    assert commands == ["set my_model v2=5 --server onnx", "rollback my_model --server onnx"]


def test_users_who_come_after_the_deadline_are_not_sent(monkeypatch):
    split = ToySplit()
    split.stand_in(monkeypatch)
    with Crowd(
        load_endpoints()["onnx"](), Split(split.url), rows_per_user=3, seed=1, connections=1, timeout_s=1
    ) as crowd:
        users = crowd.send(range(10), 0, deadline_s=0.02)  # each takes 3 to 6 ms of the toy's clock
        assert 3 < len(users) < 8
        assert [user.number for user in users] == list(range(len(users)))
        assert len(split.asked) == 3 * len(users)
        assert crowd.send(range(10), 0, deadline_s=0.01) == []


def test_ctrl_c_takes_version_2_back_and_keeps_what_came_in(run_canary, no_plot, monkeypatch):
    send = canary.Crowd.send

    def send_twice(crowd, numbers, *rest):
        if numbers.start > 300:
            raise KeyboardInterrupt
        return send(crowd, numbers, *rest)

    monkeypatch.setattr(canary.Crowd, "send", send_twice)
    code, lines, result, commands = run_canary(ToySplit(share=0))
    assert code == 130
    assert commands[-1] == "rollback my_model --server onnx"
    assert result["interrupted"] and result["looks"]
    assert lines[-1].startswith("verdict: roll back (interrupted; ")


# The same behind the real gateway: the good version 1 and one planted version 2.


@contextlib.contextmanager
def planted(manner: str):
    """A version 2 that must not be shipped; gives its port."""
    port = find_free_ports(["rest"])["rest"]
    process = subprocess.Popen([sys.executable, "planted_server.py", str(port), manner], cwd=REPOSITORY_DIR / "tests")
    try:
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def gateway(port_1: int, port_2: int, folder: Path, monkeypatch):
    """The gateway in front of two ONNX servers; inside the block its address and state are in the environment."""
    skip_without_haproxy()
    ports = find_free_ports(["gateway", "metrics"])
    for name, value in {
        "GATEWAY_STATE": folder / "state",
        "GATEWAY_BIND": f"127.0.0.1:{ports['gateway']}",
        "GATEWAY_METRICS_BIND": f"127.0.0.1:{ports['metrics']}",
        "GATEWAY_ONNX_V1": f"127.0.0.1:{port_1}",
        "GATEWAY_ONNX_V2": f"127.0.0.1:{port_2}",
    }.items():
        monkeypatch.setenv(name, str(value))
    log_path = folder / "gateway.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "gateway.py", "serve"], cwd=REPOSITORY_DIR / "gateway", stdout=log,
            stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        wait_until(lambda: b"serving on" in log_path.read_bytes(), log_path.read_text, while_alive=process)
        wait_until(lambda: both_are_up(State(folder / "state")), "both versions up", while_alive=process)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(DEADLINE_S)


def both_are_up(state: State) -> bool:
    return all(
        replica["state"] == "UP" and replica["check"] == "L7OK"
        for version in read_status(state)["servers"]["onnx"].values()
        for replica in version["replicas"].values()
    )


@pytest.fixture
def ship(no_plot, tmp_path):
    """Run the canary on the running gateway; return (exit code, printed lines, result)."""
    output = tmp_path / "canary.json"

    def run(*options: str) -> tuple[int, list[str], dict]:
        patience = ["--timeout", DEADLINE_S, "--step-seconds", NEVER_S]
        done = call_main(canary, "--output", output, "--margin", "20", *patience, *options)
        return done.returncode, done.stdout.splitlines(), json.loads(output.read_text())

    return run


@pytest.fixture(scope="module")
def version_1():
    with start("onnx", only_version="1") as server:
        yield server.endpoint.port


@pytest.mark.slow
def test_behind_the_gateway_a_good_version_reaches_every_user(ship, version_1, tmp_path, monkeypatch):
    with (
        start("onnx", only_version="2") as version_2,
        gateway(version_1, version_2.endpoint.port, tmp_path, monkeypatch),
    ):
        code, lines, result = ship("--latency-margin", NEVER_S)
        assert (code, result["verdict"]) == (0, "promote"), "\n".join(lines)
        assert read_share("onnx") == 1.0
        users = decode_users(result["looks"])
        assert all(len(user.rows) == 3 and len(set(user.versions)) == 1 for user in users)
        assert {user.version for user in users if user.step == 3} == {"2"}
        assert call_gateway("keys", "list") == ""


REASONS = {
    "wrong": {"version 2 is less accurate", "version 2's probabilities are worse (Brier score)"},
    "crashing": {"version 2 lost a replica"},
    "slow": {"version 2 is slower than allowed"},
}


@pytest.mark.parametrize("manner", ["wrong", "crashing", pytest.param("slow", marks=pytest.mark.timing)])
def test_behind_the_gateway_a_planted_version_is_taken_back(manner, ship, version_1, tmp_path, monkeypatch):
    with planted(manner) as version_2, gateway(version_1, version_2, tmp_path, monkeypatch):
        code, lines, result = ship("--margin", "8", "--latency-margin", "100" if manner == "slow" else NEVER_S)
        assert (code, result["verdict"]) == (1, "roll back"), "\n".join(lines)
        assert result["reason"] in REASONS[manner]
        assert read_share("onnx") == 0.0
        assert len(result["looks"]) <= 2 * canary.LOOKS_PER_STEP
        assert not [reason for user in decode_users(result["looks"]) for reason in user.failures]


@pytest.mark.parametrize("moment", ["before its process is there", "when its process is there", "while it works"])
def test_ctrl_c_waits_for_the_end_of_a_gateway_command(moment, tmp_path, monkeypatch):
    """At any moment of the command's start too, when nothing knows yet which process is to be stopped."""
    (tmp_path / "gateway.py").write_text(
        "import pathlib, time\n"
        "pathlib.Path('working').touch()\n"
        "while not pathlib.Path('interrupted').exists(): time.sleep(0.01)\n"
        "pathlib.Path('done').touch()"
    )
    monkeypatch.setattr(gateway_cli, "GATEWAY_DIR", tmp_path)
    monkeypatch.chdir(tmp_path)
    main_thread = threading.main_thread().ident

    def interrupt(now: str) -> None:
        if now == moment:
            signal.pthread_kill(main_thread, signal.SIGINT)
            Path("interrupted").touch()

    class Process(subprocess.Popen):
        def __init__(self, *arguments, **options):
            interrupt("before its process is there")
            super().__init__(*arguments, **options)
            interrupt("when its process is there")

    def wait_for_work() -> None:
        wait_until(Path("working").exists)
        interrupt("while it works")

    monkeypatch.setattr(subprocess, "Popen", Process)
    watcher = threading.Thread(target=wait_for_work)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        call_gateway("set")
    watcher.join()
    assert Path("done").exists()


def test_a_lent_key_is_taken_back_where_ctrl_c_comes_while_it_is_made(monkeypatch):
    owners = []

    def call(_, what, *arguments):
        if what == "list":
            return "\n".join(f"{owner}: 1000 requests/s" for owner in owners)
        if what == "revoke":
            owners.remove(arguments[0])
            return ""
        owners.append(arguments[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(gateway_cli, "call_gateway", call)
    with pytest.raises(KeyboardInterrupt), lent_key():
        pass
    assert not owners


@pytest.mark.slow
def test_behind_the_gateway_ctrl_c_leaves_every_user_with_version_1(version_1, tmp_path, monkeypatch):
    with planted("right") as version_2, gateway(version_1, version_2, tmp_path, monkeypatch):
        process = subprocess.Popen(
            [sys.executable, "canary.py", "--output", tmp_path / "canary.json", "--latency-margin", NEVER_S,
             "--step-seconds", NEVER_S, "--timeout", str(DEADLINE_S)],
            cwd=REPOSITORY_DIR / "benchmarks", stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        output = []
        for line in process.stdout:
            output.append(line)
            if line.startswith("step 2"):
                break
        os.killpg(process.pid, signal.SIGINT)
        output += process.communicate(timeout=DEADLINE_S)[0].splitlines()
        assert process.returncode == 130, output
        assert output[-1].startswith("verdict: roll back (interrupted; ")
        assert read_share("onnx") == 0.0
        assert len(json.loads((tmp_path / "canary.json").read_text())["looks"]) >= canary.LOOKS_PER_STEP
