"""The floor: the FastAPI handler that one would write by hand.

`PYTHON floor.py MODEL THREADS PORT`. One process, one event loop, one sample a call, no batches.
"""

import io
import sys

import numpy as np
import onnxruntime as ort
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response


def main(model: str, threads: str, port: str) -> None:
    """Serve until killed."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(threads)
    session = ort.InferenceSession(model, options)
    name = session.get_inputs()[0].name
    app = FastAPI()

    @app.post("/infer")
    async def infer(request: Request) -> Response:
        body = await request.body()
        if request.headers["content-type"] == "application/x-npy":
            x = np.load(io.BytesIO(body), allow_pickle=False)
        else:
            x = np.asarray(orjson.loads(body)["inputs"], np.float32)
        (y,) = session.run(None, {name: x})
        answer = orjson.dumps({"outputs": y}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(answer, media_type="application/json")

    # uvicorn takes uvloop and httptools where they are found, as ours does.
    uvicorn.run(app, port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
