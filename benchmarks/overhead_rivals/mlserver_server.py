"""The same model behind MLServer. `PYTHON mlserver_server.py MODEL THREADS PORT`.

JSON only: its REST front does not read binary tensors.
"""

import asyncio
import sys

import numpy as np
import onnxruntime as ort
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

MAX_BATCH, WAIT_S = 16, 0.002


class Model(MLModel):
    """Runs batches in MLServer's own process."""

    async def load(self) -> bool:
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(sys.argv[2])
        self._session = ort.InferenceSession(sys.argv[1], options)
        self._name = self._session.get_inputs()[0].name
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = np.asarray(NumpyCodec.decode_input(payload.inputs[0]), np.float32)
        (y,) = self._session.run(None, {self._name: x})
        output = NumpyCodec.encode_output("outputs", y)
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main(port: int) -> None:
    """Serve until killed."""
    server = MLServer(
        Settings(
            host="127.0.0.1",
            http_port=port,
            grpc_port=port + 1,
            metrics_endpoint=None,
            parallel_workers=0,
            debug=False,
        )
    )
    model = ModelSettings(
        name="model", implementation=Model, max_batch_size=MAX_BATCH, max_batch_time=WAIT_S
    )
    await server.start([model])


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[3])))
