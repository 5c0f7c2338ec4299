"""Schemathesis reads what a server's OpenAPI page promises and makes requests that keep to it, and some that do not."""

import pytest

from helpers import DEADLINE_S

PHASES = ("examples", "coverage", "fuzzing")
# What a JSON schema cannot express: that the numbers fill the shape; that a row has a finite answer.
ONNX_EXCEPTIONS = ["positive_data_acceptance"]
# BentoML 1.4.39 describes an error's "detail" as a string and sends a list, and calls every body optional.
BENTOML_EXCEPTIONS = ["response_schema_conformance", "positive_data_acceptance"]


@pytest.mark.parametrize(
    ("name", "path", "exceptions"),
    [("onnx", "/openapi.json", ONNX_EXCEPTIONS), ("bentoml", "/docs.json", BENTOML_EXCEPTIONS)],
)
def test_no_request_that_schemathesis_makes_breaks_a_promise_of_the_openapi_page(request, name, path, exceptions):
    """Runs the engine of `schemathesis run` in this process: the command takes longer to start than to test."""
    import schemathesis
    from schemathesis.engine import Status, StopReason, events, from_schema

    server = request.getfixturevalue(f"{name}_server")
    settings = {
        "seed": 1,
        "cache": {"enabled": False},
        "request-timeout": DEADLINE_S,
        "generation": {"max-examples": 10, "database": "none"},
        "phases": {phase: {"enabled": phase in PHASES} for phase in (*PHASES, "stateful")},
        "checks": {check: {"enabled": False} for check in exceptions},
    }
    schema = schemathesis.openapi.from_url(
        f"http://127.0.0.1:{server.endpoint.port}{path}", config=schemathesis.Config.from_dict(settings)
    )
    # Of the ONNX server's four models one, of its paths each kind: the others are answered by the same code.
    schema = schema.exclude(path_regex="my_model_sklearn|/predict/2|versions/2")
    happened = list(from_schema(schema).execute())
    assert not [event for event in happened if isinstance(event, events.NonFatalError | events.FatalError)]
    assert happened[-1].stop_reason == StopReason.COMPLETED
    scenarios = [event for event in happened if isinstance(event, events.ScenarioFinished)]
    checks = [check for event in scenarios for made in event.recorder.checks.values() for check in made]
    assert not [check.failure_info for check in checks if check.failure_info]
    assert {event.status for event in scenarios} <= {Status.SUCCESS, Status.SKIP}  # skipped: no example to try
    assert len({event.label for event in scenarios if event.status == Status.SUCCESS}) >= 7  # operations
