"""The same model behind LitServe. `PYTHON litserve_server.py MODEL THREADS PORT`. JSON only."""

import sys
from typing import Any

import litserve
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

MAX_BATCH, WAIT_S = 16, 0.002


class Model(litserve.LitAPI):
    """Runs batches in a process of its own."""

    def setup(self, device: str) -> None:  # noqa: ARG002  LitServe's own signature
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(sys.argv[2])
        self._session = ort.InferenceSession(sys.argv[1], options)
        self._name = self._session.get_inputs()[0].name

    def decode_request(self, request: dict[str, Any]) -> NDArray[np.float32]:
        return np.asarray(request["inputs"], np.float32)

    def batch(self, inputs: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.concatenate(inputs)

    def predict(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(self._session.run(None, {self._name: x})[0])

    def unbatch(self, output: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return list(output[:, None])

    def encode_response(self, output: NDArray[np.float32]) -> dict[str, Any]:
        return {"outputs": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        Model(max_batch_size=MAX_BATCH, batch_timeout=WAIT_S), accelerator="cpu"
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[3]), log_level="error", generate_client_file=False
    )
