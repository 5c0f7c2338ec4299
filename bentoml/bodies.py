"""Check the type, size and compression of requests' bodies, which `bentoml serve` does not."""

import zlib

from starlette.responses import JSONResponse

MAX_BODY_BYTES = 1_000_000  # as sent, and decompressed
CODINGS = ("gzip", "x-gzip", "deflate")  # RFC 9110, 8.4.1


class Refusal(Exception):
    """A refused body: the reply's status and message."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers


def decompress(body: bytes, encodings: str) -> bytes:
    """Return the decompressed body; `encodings` is its Content-Encoding, codings in the order of their application.

    Raises Refusal.
    """
    for word in reversed(encodings.lower().split(",")):
        if (word := word.strip()) in ("", "identity"):
            continue
        if word not in CODINGS:
            known = {"Accept-Encoding": ", ".join(CODINGS)}
            raise Refusal(415, f"the Content-Encoding {word!r} is not known; gzip and deflate are", known)
        has_zlib_header = body[:1] and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0  # RFC 1950, 2.2
        is_raw = word == "deflate" and not has_zlib_header  # some clients send none
        rest, body, members = body, b"", 0
        while rest or not members:  # gzip may have several members: RFC 1952, 2.2
            decoder = zlib.decompressobj(wbits=-15 if is_raw else 47)  # 47: gzip or zlib, detected from the first bytes
            try:
                body += decoder.decompress(rest, MAX_BODY_BYTES + 1 - len(body))
            except zlib.error:
                raise Refusal(400, f"the body is not {word}, as its Content-Encoding says") from None
            if len(body) > MAX_BODY_BYTES:
                raise Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes when decompressed")
            rest, members = decoder.unused_data, members + 1
            if not decoder.eof or (rest and word == "deflate"):
                raise Refusal(400, f"the body's {word} is cut off, or something follows it")
    return body


class JsonOnly:
    """ASGI middleware: decompress a body, and refuse one that is too large or whose Content-Type is not JSON.

    BentoML reads other types as JSON or as a form, and answers a malformed form with 500. It has no limit for the
    size, and takes a compressed body for malformed JSON.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            body = await self.read(scope["headers"], receive)
        except Refusal as refusal:
            reply = JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)
            await reply(scope, receive, send)
            return
        if await self.answer(scope, body, send):
            return
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> dict:
            return first.pop() if first else await receive()

        await self.app(scope, receive_again, send)

    async def read(self, headers: list[tuple[bytes, bytes]], receive) -> bytes:
        """Return the whole body. Raises Refusal."""
        for name, value in headers:  # each one, because BentoML reads the first
            if name == b"content-type" and value.split(b";")[0].strip().lower() != b"application/json":
                raise Refusal(415, "the request's Content-Type is not application/json")
        body, more_body = b"", True
        while more_body:
            message = await receive()
            if message["type"] != "http.request":  # the client has left; BentoML would wait 60 s for a reply
                raise Refusal(400, "the body ended early")
            body += message.get("body", b"")
            more_body = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                raise Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send fewer rows at a time")
        encodings = b",".join(value for name, value in headers if name == b"content-encoding")
        return decompress(body, encodings.decode("latin-1")) if encodings else body

    async def answer(self, _scope, _body: bytes, _send) -> bool:
        """Answer the request and return True, or leave it to BentoML."""
        return False
