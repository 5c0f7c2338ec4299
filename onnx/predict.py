"""POST /predict: rows in, one prediction for each out. The short way to a model of rows, beside the protocol."""

import msgspec
from batching import Job
from http_messages import JSON, Refusal, Request
from models import Model
from open_inference import not_finite
from tensors import Float32, decode_json, encode


class PredictCodec:
    """Reads and writes the requests to one model of rows: {"data": [[k numbers], ...]} to {"predictions": [...]}."""

    def __init__(self, model: Model):
        self.model = model
        # Typed decoding refuses what NumPy would quietly accept (true, "1.5"), and says where it stood.
        row = tuple[(Float32,) * model.features]
        body = msgspec.defstruct("PredictRequest", [("data", list[row])], forbid_unknown_fields=True)
        self.decode = msgspec.json.Decoder(body).decode

    def read(self, request: Request) -> Job:
        """Return the rows to be computed; Refusal where the body is not rows of this model."""
        try:
            rows = self.decode(request.body).data
        except msgspec.ValidationError:
            self.explain(request.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            decode_json(self.decode, request.body)  # says why not
        if not rows:
            raise Refusal(400, "rows are empty: send at least one")
        return Job(rows, len(rows), len(rows) * self.model.features, True)

    def explain(self, body: bytes) -> None:
        """Raise the Refusal of JSON that is not rows, with the name of the feature that is wrong."""
        try:
            decode_json(self.decode, body)
        except Refusal as refusal:
            message = self.model.name_place(str(refusal))
            if message == str(refusal):  # no row is wrong, all of it is
                message += f'; send {{"data": [[{self.model.features} numbers], ...]}}'
            raise Refusal(400, message) from None

    def write(self, _: None, answer: list[list[float]]) -> tuple[bytes, bytes, bytes]:
        """Return body, content type and further lines of the reply's head."""
        body = encode({"predictions": answer})
        if b"null" in body:  # so msgspec writes what JSON cannot say
            raise Refusal(400, not_finite(answer).partition(";")[0])
        return body, JSON, b""
