"""Answer every gRPC call with a constant: the floor under the gRPC rows.

    python -m endpoints.null_grpc_server [--port 8011]

Run it in benchmarks/. It is the floor of one stack, that of
tfserving/local/server.py: grpc.aio on uvloop, without a model. It is not the
least that any gRPC server costs, as null_server.py is for HTTP: a bare one
needs HTTP/2 with its flow control and header compression, which is no longer a
small program. The reply is TensorFlow Serving's to one row. Writes nothing.
Ctrl-C stops it.
"""

import argparse
import os
import signal
import socket
import sys

import grpc
import uvloop

# A PredictResponse: my_model, version 1, serving_default, probabilities [[0.76078099, 0.23921901]].
REPLY = (
    b"\n'\n\rprobabilities\x12\x16\x08\x01\x12\x08\x12\x02\x08\x01\x12\x02\x08\x02*\x08\x8b\xc2B?\xd4\xf5t>"
    b"\x12\x1f\n\x08my_model\x12\x02\x08\x01\x1a\x0fserving_default"
)
GRPC_OPTIONS = [  # those of tfserving/local/grpc_api.py: tests/test_grpc_rows.py compares them
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


async def answer(_message: bytes, _context: grpc.aio.ServicerContext) -> bytes:
    return REPLY


class ConstantHandler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Answers every method; without serialisers messages stay bytes."""

    handler = grpc.unary_unary_rpc_method_handler(answer)

    def service(self, _call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return self.handler


async def serve(port: int) -> None:
    server = grpc.aio.server(handlers=[ConstantHandler()], options=GRPC_OPTIONS)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print(f"serving gRPC on 127.0.0.1:{port}, Ctrl-C to stop", flush=True)
    await server.wait_for_termination()


def stop(*_: object) -> None:
    """End with exit code 0: a requested stop is no failure."""
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8011, help="port to listen on, at 127.0.0.1 (default: 8011)")
    port = parser.parse_args().port
    if not 0 <= port <= 65535:
        parser.error(f"--port {port}: expected 0 (any free port) to 65535")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with socket.socket() as probe:  # gRPC's own message on a taken port is a page long
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            print(f"null_grpc_server: 127.0.0.1:{port} is in use; stop the program that listens there", file=sys.stderr)
            return 1
    uvloop.run(serve(port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
