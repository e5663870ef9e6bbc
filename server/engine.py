"""Runs a batch at a point. Knows ONNX Runtime; nothing of latencies, queues or HTTP."""

from typing import Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from maestro_core.artifact import Artifact
from maestro_core.host import Host
from maestro_core.profile import ProfileKey

Array = npt.NDArray[np.float32]
Provider = Literal["cpu", "cuda"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class EngineError(ValueError):
    """A batch, a point or a setting that the engine can't run; the message says what it takes."""


class Engine:
    """Every point of one artifact, ready to run; safe to call from several threads at once."""

    def __init__(
        self, artifact: Artifact, *, intra_op_threads: int = 1, provider: Provider = "cpu"
    ) -> None:
        """Load every point.

        Raises:
            EngineError: the provider is not installed, or ONNX Runtime refuses a graph.
        """
        self.artifact = artifact
        self.provider = _available(provider)
        self.intra_op_threads = intra_op_threads
        self.runtime = (("onnxruntime", ort.__version__),)
        self._input, self._output = artifact.manifest.input, artifact.manifest.output
        self._sessions = [self._session(point) for point in range(len(artifact.points))]

    def run(self, batch: Array, point: int) -> Array:
        """Return the output, (n, *output shape), for a batch of shape (n, *input shape).

        Raises:
            EngineError: no such point, or a batch of another shape or type than the model takes.
        """
        self._check(batch, point)
        (output,) = self._sessions[point].run([self._output.name], {self._input.name: batch})
        return np.asarray(output, dtype=np.float32)

    def profile_key(self, compute_threads: int) -> ProfileKey:
        """Return what this engine's latencies hold for, with so many batches in it at once."""
        return ProfileKey(
            artifact=self.artifact.digest,
            host=Host.here(),
            provider=self.provider,
            intra_op_threads=self.intra_op_threads,
            compute_threads=compute_threads,
            runtime=self.runtime,
        )

    def _check(self, batch: Array, point: int) -> None:
        if not 0 <= point < len(self._sessions):
            raise EngineError(
                f"point {point} does not exist; points are 0..{len(self._sessions) - 1}"
            )
        name, wanted = self._input.name, self._input.shape
        if batch.dtype != np.float32:
            raise EngineError(f"input '{name}' is {batch.dtype}; the model takes float32")
        fits = len(batch.shape) == len(wanted) and all(
            size == want or (want == -1 and size > 0)
            for size, want in zip(batch.shape, wanted, strict=True)
        )
        if not fits:
            raise EngineError(
                f"input '{name}' has shape {list(batch.shape)}; the model takes {list(wanted)}"
            )

    def _session(self, point: int) -> ort.InferenceSession:
        path = self.artifact.graph_path(point)
        try:
            return ort.InferenceSession(
                path, session_options(self.intra_op_threads), [_PROVIDERS[self.provider]]
            )
        except Exception as error:  # ONNX Runtime's own classes share no base but this
            raise EngineError(f"{path}: ONNX Runtime refuses it: {error}") from error


def session_options(intra_op_threads: int) -> ort.SessionOptions:
    """Return options under which sessions of one process don't fight for cores.

    Operators run one after the other, and a pool's idle threads sleep: those of one session would
    otherwise spin on the cores that the next one computes on (onnxruntime #11668, #16304).
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def _available(provider: Provider) -> Provider:
    if provider not in _PROVIDERS:
        raise EngineError(f"provider '{provider}' is unknown; providers are cpu, cuda")
    if _PROVIDERS[provider] not in ort.get_available_providers():
        raise EngineError(
            f"provider '{provider}' is not in this ONNX Runtime ({ort.__version__}): "
            "install onnxruntime-gpu in the place of onnxruntime, or use provider cpu"
        )
    return provider
