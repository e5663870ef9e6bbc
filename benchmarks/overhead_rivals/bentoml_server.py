"""The same model behind BentoML. `PYTHON bentoml_server.py MODEL THREADS PORT`. JSON only."""

import os
import sys
from pathlib import Path

import bentoml
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

MAX_BATCH = 16


@bentoml.service
class Model:
    """Imported again, by this file's name, in the processes that BentoML starts."""

    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ["OVERHEAD_THREADS"])
        self._session = ort.InferenceSession(os.environ["OVERHEAD_MODEL"], options)
        self._name = self._session.get_inputs()[0].name

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)
    def infer(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        x = np.asarray(inputs, np.float32)
        return np.asarray(self._session.run(None, {self._name: x})[0])


if __name__ == "__main__":
    model, threads, port = sys.argv[1:]
    os.environ |= {
        "OVERHEAD_MODEL": str(Path(model).resolve()),
        "OVERHEAD_THREADS": threads,
        "BENTOML_DO_NOT_TRACK": "True",
    }
    os.chdir(Path(__file__).parent)
    target = f"{Path(__file__).stem}:Model"
    given = ["-m", "bentoml", "serve", target, "--host", "127.0.0.1", "--port", port]
    os.execv(sys.executable, [sys.executable, *given])  # noqa: S606  our own program
