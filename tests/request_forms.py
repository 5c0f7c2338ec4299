"""The ways to write one HTTP request that RFC 9110 and 9112 allow."""


def chunk(body: bytes, extension: bytes = b"") -> bytes:
    parts = [body[:7], body[7:8], body[8:]]
    return b"".join(b"%X%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)


# {path}, {type} and {length} are those of the plain request.
USUAL = "Host: localhost\nContent-Type: {type}\nContent-Length: {length}\n"
LEGAL = {
    "HTTP/1.0": ("POST {path} HTTP/1.0\nContent-Type: {type}\nContent-Length: {length}\n", bytes),
    "a whole address": ("POST http://localhost{path} HTTP/1.1\n" + USUAL, bytes),
    "capitals and blanks": (
        "POST {path} HTTP/1.1\nHOST:localhost\nCONTENT-TYPE:\t {type} \t\ncontent-length:  {length} \n", bytes
    ),
    "an empty line first": ("\nPOST {path} HTTP/1.1\n" + USUAL, bytes),
    "chunks": (
        "POST {path} HTTP/1.1\nHost: localhost\nContent-Type: {type}\nTransfer-Encoding: chunked\n",
        lambda body: chunk(body) + b"0\r\n\r\n",
    ),
    "chunks with extensions and trailers": (
        "POST {path} HTTP/1.1\nHost: localhost\nContent-Type: {type}\nTransfer-Encoding: Chunked\nTrailer: X-T\n",
        lambda body: chunk(body, b';a=b;c="d"') + b"0\r\nX-T: 1\r\n\r\n",
    ),
    "100 Continue": ("POST {path} HTTP/1.1\nExpect: 100-Continue\n" + USUAL, bytes),
    "options of the connection": (
        "POST {path} HTTP/1.1\nConnection: TE, close\nTE: trailers\nAccept-Encoding: br;q=0, gzip\n" + USUAL, bytes
    ),
    "an address in IPv6": ("POST {path} HTTP/1.1\n" + USUAL.replace("localhost", "[::1]:80") + "Cookie: a=b\n", bytes),
}  # fmt: skip


def write_request(way: str, path: str, content_type: str, body: bytes, lines: str = "") -> bytes:
    """Return a POST of `body`, written in one of the ways; `lines` are further ones of its head."""
    head, write = LEGAL[way]
    head = head.format(path=path, type=content_type, length=len(body)) + lines
    return head.replace("\n", "\r\n").encode() + b"\r\n" + write(body)
