"""The same model behind mosec, whose front is in Rust.

`PYTHON mosec_server.py MODEL THREADS PORT`.
"""

import io
import os
import sys
from typing import Any

import numpy as np
import onnxruntime as ort
import orjson
from mosec import Server, Worker
from numpy.typing import NDArray

MAX_BATCH, WAIT_MS = 16, 2


class Model(Worker):
    """Runs batches in a process of its own, which imports this file again."""

    def __init__(self) -> None:
        super().__init__()
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ["OVERHEAD_THREADS"])
        self._session = ort.InferenceSession(os.environ["OVERHEAD_MODEL"], options)
        self._name = self._session.get_inputs()[0].name

    def deserialize(self, data: bytes) -> NDArray[np.float32]:
        if data.startswith(b"\x93NUMPY"):
            return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
        return np.asarray(orjson.loads(data)["inputs"], np.float32)

    def forward(self, data: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        (y,) = self._session.run(None, {self._name: np.concatenate(data)})
        return list(y[:, None])

    def serialize(self, data: Any) -> bytes:  # noqa: ANN401  mosec's own signature
        return orjson.dumps({"outputs": data}, option=orjson.OPT_SERIALIZE_NUMPY)


if __name__ == "__main__":
    model, threads, port = sys.argv[1:]
    os.environ |= {"OVERHEAD_MODEL": model, "OVERHEAD_THREADS": threads}
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", port, "--log-level", "error"]
    server = Server()
    server.append_worker(Model, max_batch_size=MAX_BATCH, max_wait_time=WAIT_MS)
    server.run()
