"""What HTTP clients send, asked of all four servers: each form of a request has the answer of the plain form."""

import gzip
import http.client
import json
import re
import socket
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.ask import send
from endpoints.base import Request
from endpoints.reference import TOLERANCE, load_expected, load_test_rows
from helpers import DEADLINE_S
from json_forms import spell
from request_forms import LEGAL, write_request

FRAMEWORKS = ["torchserve", "tfserving", "bentoml", "onnx"]
ROWS = load_test_rows()[0][:2]
UPGRADE = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAB"}
WEBSOCKET = {
    "Connection": "upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "eA==",
}

Reply = tuple[int, dict[str, str], bytes]  # status, headers by name in small letters, body


@pytest.fixture(params=FRAMEWORKS)
def endpoint(request):
    return request.getfixturevalue(f"{request.param}_server").endpoint


def exchange(port: int, head: str, body: bytes, cut: int | None = None) -> Reply:
    """Send these bytes, in two pieces if `cut` says where, and read one reply."""
    request = head.replace("\n", "\r\n").encode() + b"\r\n" + body
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request[:cut])
        if cut is not None:
            connection.sendall(request[cut:])
        reply = connection.makefile("rb")
        status = int(reply.readline().split()[1])
        headers = {}
        while line := reply.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers, reply.read(int(headers["content-length"]))


def ask(endpoint, body: bytes | None = None, cut: int | None = None, **headers: str) -> Reply:
    """Ask for two rows with further headers, whose names have _ for -."""
    request = endpoint.request(ROWS, "1")
    body = request.body if body is None else body
    named = {"Content-Type": request.content_type, "Content-Length": str(len(body)), **request.headers}
    for name, value in headers.items():
        named[name.replace("_", "-")] = value
    lines = "".join(f"{name}: {value}\n" for name, value in named.items())
    return exchange(endpoint.port, f"POST {request.path} HTTP/1.1\nHost: localhost\n{lines}", body, cut)


def decode(endpoint, reply: Reply) -> list[list[float]]:
    status, _, body = reply
    assert status == 200, body
    return endpoint.decode(body).tolist()


@pytest.mark.parametrize("headers", [UPGRADE, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("cut", [None, -20], ids=["whole", "in two"])
def test_an_upgrade_that_is_not_supported_is_ignored(endpoint, headers, cut):
    plain = decode(endpoint, ask(endpoint))
    assert decode(endpoint, ask(endpoint, cut=cut, **headers)) == plain


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate"])
def test_a_compressed_body_is_decoded(endpoint, coding):
    body = endpoint.request(ROWS, "1").body
    compressed = zlib.compress(body) if coding == "deflate" else gzip.compress(body)
    reply = ask(endpoint, compressed, Content_Encoding=coding)
    if endpoint.name == "tfserving" and coding == "deflate":  # as TensorFlow Serving, it knows gzip alone
        assert reply[0] == 400
        assert "JSON Parse error" in json.loads(reply[2])["error"]
    else:
        assert decode(endpoint, reply) == decode(endpoint, ask(endpoint))


def test_gzip_may_have_several_members(endpoint):
    body = endpoint.request(ROWS, "1").body
    members = gzip.compress(body[:20]) + gzip.compress(b"") + gzip.compress(body[20:])
    reply = ask(endpoint, members, Content_Encoding="gzip")
    if endpoint.name == "tfserving":  # TensorFlow Serving's reader of gzip takes one
        assert reply[0] == 400
    else:
        assert decode(endpoint, reply) == decode(endpoint, ask(endpoint))


def test_what_is_not_compressed_as_it_says_is_the_clients_fault(endpoint):
    body = endpoint.request(ROWS, "1").body
    for wrong in (body, gzip.compress(body)[:-4], gzip.compress(b"x"), gzip.compress(body) + b"junk", b""):
        status, headers, reply = ask(endpoint, wrong, Content_Encoding="gzip")
        assert status == 400, reply
        assert "json" in headers["content-type"]
        json.loads(reply)


def test_a_small_body_that_becomes_a_large_one_is_refused(endpoint):
    bomb = gzip.compress(b" " * 100_000_000)
    status, _, reply = ask(endpoint, bomb, Content_Encoding="gzip")
    assert status in (400, 413), reply
    json.loads(reply)
    assert ask(endpoint)[0] == 200


def test_a_coding_that_is_not_known_is_415_and_those_that_are_are_named(endpoint):
    status, headers, reply = ask(endpoint, Content_Encoding="br")
    if endpoint.name == "tfserving":  # as TensorFlow Serving, it reads no other Content-Encoding
        assert status == 200
        return
    assert status == 415
    assert "gzip" in headers["accept-encoding"]
    assert b"gzip" in reply


@pytest.mark.parametrize(
    "content_type", ["Application/JSON", "application/json ; charset=utf-8", 'application/json;charset="UTF-8"']
)
def test_a_media_type_is_read_as_the_standard_has_it(endpoint, content_type):
    assert decode(endpoint, ask(endpoint, Content_Type=content_type)) == decode(endpoint, ask(endpoint))


@pytest.mark.parametrize("way", LEGAL)
def test_a_request_may_be_written_in_every_way_that_the_standard_allows(endpoint, way):
    request = endpoint.request(ROWS, "1")
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=DEADLINE_S) as connection:
        connection.sendall(write_request(way, request.path, request.content_type, request.body))
        reply = http.client.HTTPResponse(connection, method="POST")
        reply.begin()  # past 100 Continue
        body = reply.read()
    if (endpoint.name, way) == ("torchserve", "a whole address"):  # TorchServe's own front end takes none
        assert reply.status == 404
        return
    assert reply.status == 200, body
    assert np.abs(endpoint.decode(body) - load_expected("1")[:2]).max() <= TOLERANCE


def test_a_reply_leaves_in_one_piece(endpoint):
    """Then a server that is killed has answered or not, and a gateway can ask another."""
    request = endpoint.request(ROWS, "1")
    lines = f"Host: a\r\nContent-Type: {request.content_type}\r\nContent-Length: {len(request.body)}\r\n\r\n"
    sent = f"POST {request.path} HTTP/1.1\r\n{lines}".encode() + request.body
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=DEADLINE_S) as connection:
        for _ in range(30):
            connection.sendall(sent)
            head, _, body = connection.recv(65_536).partition(b"\r\n\r\n")
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            assert length and len(body) == int(length[1]), (head, body)


def test_the_same_rows_in_every_legal_json_form_have_the_same_answers(endpoint):
    rows, expected = load_test_rows()[0], load_expected("1")

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=3), st.booleans(), st.integers(0, 2**32))
    def check(places, is_compressed, seed):
        request = endpoint.request([rows[place] for place in places], "1")
        body = spell(json.loads(request.body), seed).encode()
        headers = {**request.headers, **({"Content-Encoding": "gzip"} if is_compressed else {})}
        sent = Request(request.path, gzip.compress(body) if is_compressed else body, headers=headers)
        status, reply = send(endpoint.port, sent)
        assert status == 200, (body, reply)
        assert np.abs(endpoint.decode(reply) - expected[places]).max() <= TOLERANCE, body

    check()
