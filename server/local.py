"""What the server does, without a server: one calibration, one inference, for the command line."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.effort import Effort, Progress
from maestro_core.artifact import Artifact, Tensor
from maestro_core.profile import Profile
from maestro_core.profile_store import Found, ProfileStore, StoreError
from server import inputs
from server.answers import Inference, infer_answer
from server.dispatcher import refused
from server.engine import Engine
from server.errors import InvalidError, UnsupportedMediaError
from server.measuring import Hooks, HostModel, latencies_of
from server.requests import Refusal
from server.scheduler import Scheduler
from server.schemas import InferParameters
from server.settings import LARGEST_BATCH

Floats = NDArray[np.float32]


class Profiled(NamedTuple):
    """What a server would serve here, its profile, and why that is not stored if it isn't."""

    artifact: Artifact
    profile: Profile
    note: str | None


def profile(
    model: HostModel,
    effort: Effort,
    progress: Callable[[Progress], object],
    engine: Engine | None = None,
) -> Profiled:
    """Measure the points on this host, and store the profile where that can be.

    Raises:
        ArtifactError: there is nothing to search with, or the disk does not take the points.
        EngineError: the provider is not installed, or ONNX Runtime refuses the artifact.
    """
    engine, measured = model.measured(effort, engine, Hooks(progress=progress))
    note = None
    try:
        ProfileStore(model.settings.state_dir).save(measured)
    except StoreError as error:
        note = str(error)
    return Profiled(engine.artifact, measured, note)


def stored_profile(model: HostModel, engine: Engine) -> Found:
    """Return the profile of this host that a server would start with, or why there is none."""
    store = ProfileStore(model.settings.state_dir)
    return store.find(model.key(engine), len(engine.artifact.points))


def read_input(path: Path, tensor: Tensor) -> Floats:
    """Return a picture, `.npy` or JSON file as the input, (n, …).

    Raises:
        ServiceError: it is not what the model takes.
        OSError: it cannot be read.
    """
    body = path.read_bytes()
    kind = path.suffix.lower()
    if kind in (".png", ".jpg", ".jpeg"):
        return inputs.from_image(body, tensor)
    if kind == ".npy":
        return inputs.from_npy(body, tensor)
    if kind == ".json":
        x, given = inputs.from_json(body, tensor)
        if given:  # it would be passed over
            raise InvalidError(f"{path}: has {', '.join(given)}; a file holds `inputs` alone")
        return x
    raise UnsupportedMediaError(f"{path}: give a .png, .jpg, .npy or .json file")


def infer(
    engine: Engine, profile: Profile, x: Floats, parameters: InferParameters
) -> dict[str, Any]:
    """Return the answer that an idle server would give.

    Raises:
        ServiceError: the target cannot be met and the parameters say to reject.
        ValueError: a parameter is out of its range.
    """
    arrived_s = time.monotonic()
    request = parameters.request("0", arrived_s, len(x))
    scheduler = Scheduler(latencies_of(engine.artifact, profile, LARGEST_BATCH))
    verdict = scheduler.submit(request, arrived_s)
    if isinstance(verdict, Refusal):
        raise refused(verdict)
    batch = scheduler.plan(arrived_s).batch
    if batch is None:
        raise ValueError(
            f"max_latency_ms: {parameters.max_latency_ms} passed before anything could run"
        )
    engine.run(x, batch.point)  # a server is warm
    began_s = time.monotonic()
    output = engine.run(x, batch.point)
    compute_s = time.monotonic() - began_s
    inference = Inference(output, batch.point, batch.predicted_ms, 0.0, 1e3 * compute_s, len(x))
    return infer_answer(engine.artifact, parameters, inference, compute_s)
