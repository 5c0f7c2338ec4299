"""A server that was added gets the points that it deserves: each manner of the toy loses what it does badly."""

import importlib
import json
import re

import psutil
import pytest

import servers.grading
from conftest import REPOSITORY_DIR
from helpers import call_main, load_script
from servers.grading import (
    MOST_POINTS,
    Grade,
    format_receipt,
    grade,
    is_receipt_whole,
    list_bad_requests,
    write_receipt,
)
from toy_endpoint import Toy

PARTS = ("starts", "right answers", "bad input", "load", "ends")


@pytest.fixture
def judge(monkeypatch):
    """Grade the toy in one of its manners, with a short load."""
    monkeypatch.setattr(servers.grading, "LOAD_S", 0.3)

    def judge(manner: str) -> Grade:
        monkeypatch.setenv("TOY_MANNER", manner)
        return grade(Toy)

    return judge


def points(result: Grade) -> dict[str, int]:
    return {part.name: part.points for part in result.parts}


def test_a_right_server_passes_loses_only_what_it_does_not_do_and_has_a_receipt(judge, tmp_path):
    """The toy answers rightly and knows no refusal: it drops the connection."""
    result = judge("right")
    check_receipt(result, tmp_path)
    assert result.passed
    assert points(result) == {"starts": 10, "right answers": 40, "bad input": 0, "load": 20, "ends": 10}
    assert (result.points, result.most) == (80, 100)
    assert any("gave no answer" in text for text in result.parts[2].found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("manner", "lost"),
    [("unequal", "right answers"), ("wrong", "load"), ("erring", "load"), ("dropping", "load"), ("crashing", "starts")],
)
def test_a_bad_server_does_not_pass(judge, manner, lost):
    result = judge(manner)
    assert not result.passed
    assert points(result)[lost] < next(part.most for part in result.parts if part.name == lost)
    if manner == "crashing":
        assert result.points == 0
        assert "the model is missing; make one" in result.parts[0].found[0]


@pytest.mark.slow
def test_a_server_that_ignores_sigterm_is_ended_all_the_same(judge):
    result = judge("deaf")
    assert result.passed
    assert points(result)["ends"] == 10
    assert not [process for process in psutil.Process().children(recursive=True) if "toy_server" in str(process)]


@pytest.mark.slow
def test_the_onnx_server_gets_every_point(monkeypatch):
    """It refuses all that is bad."""
    monkeypatch.setattr(servers.grading, "LOAD_S", 0.3)
    from endpoints.base import load_endpoints

    result = grade(load_endpoints()["onnx"])
    assert points(result) == {"starts": 10, "right answers": 40, "bad input": 20, "load": 20, "ends": 10}, result
    assert result.file == "endpoint_onnx.py"


def check_receipt(result: Grade, tmp_path) -> None:
    """It is one page, and one that was edited is known."""
    page = write_receipt(result, tmp_path / "results")
    text = page.read_text()
    assert text == format_receipt(result)
    assert text.startswith("# toy: 80 of 100 points, passed")
    assert [name for name in PARTS if f"| {name} |" not in text] == []
    assert result.file_sha256 in text
    assert len(text.splitlines()) <= 50
    assert is_receipt_whole(text)
    assert not is_receipt_whole(text.replace("80 of 100", "100 of 100"))
    assert not is_receipt_whole("anything")
    kept = json.loads(page.with_suffix(".json").read_text())
    assert (kept["points"], kept["passed"], kept["endpoint"]) == (80, True, "toy")


def test_the_bad_requests_are_a_dozen_in_the_endpoints_own_format():
    requests = dict(list_bad_requests(Toy()))
    assert len(requests) >= 12
    assert {request.path for name, request in requests.items() if name != "an unknown version"} == {"/toy/1"}
    assert requests["an unknown version"].path == "/toy/99"


def test_the_teachers_page_shows_the_points_that_are_given():
    rows = re.findall(r"^\| ([a-z ]+) \| (\d+) \|", (REPOSITORY_DIR / "TEACHING.md").read_text(), re.M)
    assert {name: int(points) for name, points in rows} == MOST_POINTS
    assert sum(MOST_POINTS.values()) == 100


def test_the_command_names_the_endpoints_that_there_are():
    check = load_script(REPOSITORY_DIR / "check.py")
    done = call_main(check, "--grade", "mine")
    assert done.returncode == 1
    assert "mine: no such endpoint; there are null, " in done.stderr
    assert importlib.import_module("servers.grading") is servers.grading
