"""What a checkout has done is seen in what lies there: nothing is done in an empty one, and each thing counts once."""

import json
import shutil

import pytest

import figures.result_file
from conftest import REPOSITORY_DIR
from figures.result_file import write_result
from helpers import call_main, load_script, run, run_python
from machine.environment import describe_machine
from planted_results import Planted, make_result

SCRIPT = REPOSITORY_DIR / "check.py"


@pytest.fixture(scope="module")
def check():
    return load_script(SCRIPT)


@pytest.fixture
def checkout(tmp_path):
    """An empty checkout: git's, with the results that come with the repository."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "endpoints").mkdir()
    for name in ("sample.json", "containers.json"):
        shutil.copy2(REPOSITORY_DIR / "benchmarks" / "results" / name, tmp_path / "benchmarks" / "results")
    run("git", "init", "-q", tmp_path, check=True)
    return tmp_path


def done_in(check, folder) -> set[str]:
    seen = check.Checkout(folder)
    return {f"{step.objective}: {step.what}" for step in check.list_steps() if step.see(seen)}


def put(folder, name: str, content: dict | str = "") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_in_a_fresh_clone_nothing_is_done(check, checkout):
    """The results that come with the repository are somebody else's."""
    assert done_in(check, checkout) == set()


def test_every_objective_of_the_exercise_is_there(check):
    objectives = list(dict.fromkeys(step.objective for step in check.list_steps()))
    assert objectives == [
        "Deploy PyTorch models with TorchServe", "Serve TensorFlow models with TF Serving",
        "Use BentoML for multi-framework serving", "Optimize models with ONNX Runtime",
        "Implement model versioning and A/B testing", "Benchmark serving performance",
        "Choose appropriate serving framework for use cases", "Add a server",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "step"),
    [
        (["torchserve/model.pth"], "Deploy PyTorch models with TorchServe: trained"),
        (["torchserve/model_store/model_v1.mar"], "Deploy PyTorch models with TorchServe: archived"),
        ([f"tfserving/models/my_model/{n}/saved_model.pb" for n in "12"],
         "Serve TensorFlow models with TF Serving: exported, two versions"),
        (["bentoml/store/models/my_model/latest"], "Use BentoML for multi-framework serving: trained and saved"),
        ([f"onnx/models/my_model/{n}/model.onnx" for n in "12"],
         "Optimize models with ONNX Runtime: converted, two versions"),
        (["onnx/model_quantized.onnx"], "Optimize models with ONNX Runtime: optimized"),
    ],
)  # fmt: skip
def test_an_artefact_shows_what_made_it_and_half_of_it_does_not(check, checkout, files, step):
    for name in files[:-1]:
        put(checkout, name)
    assert step not in done_in(check, checkout)
    put(checkout, files[-1])
    assert done_in(check, checkout) == {step}


def test_a_result_shows_what_was_measured_and_predicted(check, checkout):
    servers = {
        "null": Planted("floor"), "onnx-tuned": Planted("local", {500.0: 0.001}),
        "torchserve-grpc-tuned": Planted("native", protocol="gRPC"),
    }  # fmt: skip
    result = make_result(servers)
    put(checkout, "benchmarks/results/20260101T000000Z.json", result)
    assert done_in(check, checkout) == {
        "Optimize models with ONNX Runtime: predicted, REST",
        "Deploy PyTorch models with TorchServe: predicted, gRPC",
        "Benchmark serving performance: several servers measured",
        "Choose appropriate serving framework for use cases: rates offered on this machine",
    }
    result["endpoints"]["onnx-tuned"]["max_abs_difference"]["2"] = 0.01
    result["complete"] = False
    put(checkout, "benchmarks/results/20260101T000000Z.json", result)
    assert done_in(check, checkout) == {
        "Deploy PyTorch models with TorchServe: predicted, gRPC",
        "Choose appropriate serving framework for use cases: rates offered on this machine",
    }


def test_an_experiment_counts_when_it_was_finished(check, checkout):
    looks = [{"users": [1, 2, 3]}]
    put(checkout, "benchmarks/results/ab-1.json", {"looks": looks, "interrupted": "interrupted"})
    put(checkout, "benchmarks/results/canary-1.json", {"looks": looks, "verdict": "not enough evidence"})
    assert done_in(check, checkout) == set()
    put(checkout, "benchmarks/results/ab-2.json", {"looks": looks, "interrupted": ""})
    put(checkout, "benchmarks/results/canary-2.json", {"looks": looks, "verdict": "roll back", "interrupted": ""})
    assert done_in(check, checkout) == {
        "Implement model versioning and A/B testing: A/B test decided",
        "Implement model versioning and A/B testing: canary shipped or taken back",
    }


def test_a_server_counts_when_it_is_ones_own_and_has_passed(check, checkout):
    receipt = {"endpoint": "mine", "file": "endpoint_mine.py", "points": 80, "most": 100, "passed": True}
    put(checkout, "benchmarks/results/grade-mine.json", receipt)
    assert done_in(check, checkout) == set()  # the file is not there
    put(checkout, "benchmarks/endpoints/endpoint_mine.py", "")
    assert done_in(check, checkout) == {"Add a server: graded and passed"}
    run("git", "-C", checkout, "add", "benchmarks/endpoints/endpoint_mine.py", check=True)
    assert done_in(check, checkout) == set()  # it came with the repository


def test_junk_among_the_results_is_no_result_and_no_error(check, checkout):
    put(checkout, "benchmarks/results/broken.json", "{")
    put(checkout, "benchmarks/results/list.json", "[1]")
    put(checkout, "benchmarks/results/odd.json", {"settings": 3, "looks": [], "endpoints": []})
    assert done_in(check, checkout) == set()


def test_the_command_needs_no_package_and_names_the_next_step(checkout):
    shutil.copy2(SCRIPT, checkout)
    done = run_python("-S", "-I", checkout / "check.py")  # without site-packages
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 of 18 done; next: cd torchserve && python train_model.py"


@pytest.fixture
def tasks(check, tmp_path, monkeypatch):
    """This machine's newest result is a planted one: 1,000 requests/s kept up with, 1,500 not."""
    result = make_result({"onnx-tuned": Planted("local", {1000.0: 0.01, 1500.0: None}, noise=0, flat_out=2000)})
    result["environment"] |= describe_machine()
    monkeypatch.setattr(figures.result_file, "RESULTS_DIR", tmp_path)
    write_result(result, tmp_path / "mine.json")
    return {task.name: task for task in check.list_tasks()}


def test_the_tasks_are_asked_of_this_machines_result(check, tasks):
    assert tasks.keys() == {"little", "replicas", "knee"}
    done = call_main(check, "--answer")
    assert [name for name in tasks if f"{name}: " not in done.stdout] == []


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("little=32", 0),  # 64 ÷ 2,000/s
        ("little=28", 1),
        ("replicas=16", 0),  # ⌈10,000 ÷ 700⌉ + 1
        ("replicas=15", 1),
        ("knee=1,500", 0),
        ("knee=1400", 1),
        ("knee=2500", 1),
    ],
)
def test_an_answer_is_right_or_not(check, tasks, answer, code):
    done = call_main(check, "--answer", answer)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("not right" in done.stdout) == bool(code)


def test_a_wrong_question_is_one_line(check, tasks):
    assert "no such task; there are little, " in call_main(check, "--answer", "what=3").stderr
    assert "'x' is no number" in call_main(check, "--answer", "knee=x").stderr


def test_without_a_result_of_this_machine_it_says_how_to_get_one(check, tmp_path, monkeypatch):
    monkeypatch.setattr(figures.result_file, "RESULTS_DIR", tmp_path)
    done = call_main(check, "--answer")
    assert done.returncode == 1
    assert "run python benchmark_all.py" in done.stderr
