"""The bad requests that every server must refuse: 4xx, a message that names the problem, and it goes on serving."""

from endpoints.base import Endpoint, Request

GOOD_ROW = [13.82, 24.49, 0.1162, 0.1357, 0.2275]
JUNK_BYTES = 10_000_000


def bad_requests(endpoint: Endpoint, version: str = "1") -> dict[str, Request]:
    """Return the bad requests by name, in the endpoint's own format."""

    def rows(value) -> Request:
        return endpoint.request(value, version)

    def raw(body: bytes, content_type: str = "application/json") -> Request:
        return Request(endpoint.path(version), body, content_type=content_type)

    return {
        "four features": rows([GOOD_ROW[:4]]),
        "six features": rows([[*GOOD_ROW, 1.0]]),
        "ragged rows": rows([GOOD_ROW, GOOD_ROW[:4]]),
        "empty batch": rows([]),
        "empty row": rows([[]]),
        "a string among numbers": rows([["abc", *GOOD_ROW[1:]]]),
        "a numeric string": rows([["13.82", *GOOD_ROW[1:]]]),
        "null among numbers": rows([[None, *GOOD_ROW[1:]]]),
        "null instead of rows": rows(None),
        "a string instead of rows": rows("abc"),
        "a number instead of rows": rows(1.0),
        "NaN": rows([[float("nan"), *GOOD_ROW[1:]]]),
        "Infinity": rows([[float("inf"), *GOOD_ROW[1:]]]),
        "minus Infinity": rows([[float("-inf"), *GOOD_ROW[1:]]]),
        "larger than float32": rows([[1e39, *GOOD_ROW[1:]]]),
        "nested too deep": rows([[[value] for value in GOOD_ROW]]),
        "the wrong key": raw(endpoint.body([GOOD_ROW], version).replace(endpoint.rows_key.encode(), b"wrong")),
        "an array instead of an object": raw(b"[[13.82, 24.49, 0.1162, 0.1357, 0.2275]]"),
        "malformed JSON": raw(endpoint.body([GOOD_ROW], version)[:-3]),
        "an empty body": raw(b""),
        "not UTF-8": raw(b'{"' + endpoint.rows_key.encode() + b'": "\xff\xfe"}'),
        "the wrong content type": raw(b"<rows><row/></rows>", "application/xml"),
        "10 MB of junk": raw(b"x" * JUNK_BYTES),
        "10 MB of brackets": raw(b"[" * JUNK_BYTES),
        "an unknown version": endpoint.request([GOOD_ROW], "99"),
    }
