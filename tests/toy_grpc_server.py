"""A gRPC server for the tests: answers by the reference's own numbers, or as badly as it is told to.

    python toy_grpc_server.py PORT [right|wrong|erring]

/toy/Predict takes {"rows": [...], "version": "1"} as JSON and gives {"answers": [...]}; /toy/Echo gives what it
gets. `wrong` is off by 0.01 after its first 300 answers, `erring` then answers INVALID_ARGUMENT to every fourth.
"""

import asyncio
import json
import sys
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from endpoints.reference import load_expected, load_test_rows  # noqa: E402

PORT, MANNER = int(sys.argv[1]), (sys.argv[2:] or ["right"])[0]
ROWS, _ = load_test_rows()
ANSWERS = {version: dict(zip(map(tuple, ROWS), load_expected(version).tolist(), strict=True)) for version in "12"}
EVERY = 4
BAD_AFTER = 300


class Toy(grpc.GenericRpcHandler):
    answered = 0

    def service(self, call):
        methods = {"/toy/Predict": self.predict, "/toy/Echo": self.echo}
        return grpc.unary_unary_rpc_method_handler(methods[call.method]) if call.method in methods else None

    async def predict(self, message: bytes, context) -> bytes:
        question = json.loads(message)
        answers = [ANSWERS[question["version"]][tuple(row)] for row in question["rows"]]
        self.answered += 1
        if self.answered > BAD_AFTER and MANNER == "wrong":
            answers = [[p0 + 0.01, p1 - 0.01] for p0, p1 in answers]
        if self.answered > BAD_AFTER and MANNER == "erring" and self.answered % EVERY == 0:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "one of four, 100 % sure: é")
        return json.dumps({"answers": answers}).encode()

    async def echo(self, message: bytes, _context) -> bytes:
        return message


async def serve() -> None:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(handlers=[Toy()], options=unlimited)
    server.add_insecure_port(f"127.0.0.1:{PORT}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve())
