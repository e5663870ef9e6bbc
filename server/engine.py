"""Runs a batch at a point. Knows ONNX Runtime; nothing of latencies, queues or HTTP."""

import ctypes
import hashlib
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from maestro_core.artifact import Artifact, Tensor
from maestro_core.host import Host
from maestro_core.profile import ProfileKey
from server.baking import LAYOUT, Baked, BakeError, bake
from server.huge_pages import HugePages, When, are_worth_it, huge_pages_exist
from server.interrupt import Interrupt
from server.residency import Residency

Array = npt.NDArray[np.float32]
Provider = Literal["cpu", "cuda"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class EngineError(ValueError):
    """A batch, a point or a setting that the engine can't run; the message says what it takes."""


class Engine:
    """Every point of one artifact, ready to run; safe to call from several threads at once.

    `note` says what the engine could not do and does without: bake its points, or copy them to huge
    pages.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        intra_op_threads: int = 1,
        provider: Provider = "cpu",
        state_dir: Path | None = None,
        memory_budget_bytes: int | None = None,
        huge_pages: When = "auto",
    ) -> None:
        """Load every point, or with a memory budget none until it is used.

        With a state directory the points are baked under it (`server.baking`), once per host and
        runtime: all of them then share memory. Without one, each holds its own copy. What is baked
        is copied to huge pages, where there are any and (auto) it takes little more memory; else,
        and with a memory budget, it is mapped.

        Raises:
            EngineError: the provider is not installed, or ONNX Runtime refuses a graph.
        """
        self.artifact = artifact
        self.provider = _available(provider)
        self.intra_op_threads = intra_op_threads
        self.runtime: tuple[tuple[str, str], ...] = (
            ("onnxruntime", ort.__version__),
            ("layout", str(LAYOUT)),
        )
        if memory_budget_bytes is not None:  # loading a point again is in what is measured
            self.runtime += (("memory_budget_bytes", str(memory_budget_bytes)),)
        self.note: str | None = None
        self._input, self._output = artifact.manifest.input, artifact.manifest.output
        self._state_dir = state_dir if provider == "cpu" else None
        self._baked = self._bake()
        self._huge = self._copied(huge_pages) if memory_budget_bytes is None else None
        if self._huge:
            self.runtime += (("weights", "huge pages"),)
        self._sessions = Residency(self._session, self._size_bytes, memory_budget_bytes)
        if memory_budget_bytes is None:
            for point in range(len(artifact.points)):
                self._sessions.get(point)
        trim_heap()

    @property
    def resident(self) -> tuple[int, ...]:
        """Return the points in memory, least recently used first."""
        return self._sessions.resident

    @property
    def has_huge_pages(self) -> bool:
        """Return whether weights are in huge pages of this process, not mapped from a file."""
        return self._huge is not None

    def warm_up(self) -> None:
        """Run one sample through each point in memory: a first run takes several times as long."""
        one = np.zeros([1, *self._input.shape[1:]], np.float32)
        for point in self.resident:
            self.run(one, point)

    def run(self, batch: Array, point: int, interrupt: Interrupt | None = None) -> Array:
        """Return the output, (n, *output shape), for a batch of shape (n, *input shape).

        The runtime reads the batch and writes the output in place; neither is copied. OrtValues and
        I/O bindings made for each run only add to it: 0.09 and 0.02 ms (AMD EPYC).

        Raises:
            EngineError: no such point, or a batch of another shape or type than the model takes.
            InterruptedRunError: it was interrupted.
        """
        self._check(batch, point)
        session = self._sessions.get(point)
        names, feed = [self._output.name], {self._input.name: batch}
        if interrupt is None:
            (output,) = session.run(names, feed)
        else:
            (output,) = interrupt.run(session, names, feed)
        return np.asarray(output, dtype=np.float32)

    def profile_key(self, compute_threads: int, workers: int = 1) -> ProfileKey:
        """Return what this engine's latencies hold for.

        That is with so many batches in it at once, beside workers that do the same.
        """
        return ProfileKey(
            artifact=self.artifact.digest,
            host=Host.here(),
            provider=self.provider,
            intra_op_threads=self.intra_op_threads,
            compute_threads=compute_threads,
            workers=workers,
            runtime=self.runtime,
        )

    def _check(self, batch: Array, point: int) -> None:
        if not 0 <= point < len(self.artifact.points):
            last = len(self.artifact.points) - 1
            raise EngineError(f"point {point} does not exist; points are 0..{last}")
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

    def _bake(self) -> Baked | None:
        if self._state_dir is None:
            return None
        host = Host.here()
        made_by = (host.cpu, *host.instruction_sets, ort.__version__, str(LAYOUT))
        key = "/".join((self.artifact.digest, *made_by))
        graphs = [self.artifact.graph_path(point) for point in range(len(self.artifact.points))]
        # Hosts that differ may share a state directory; none takes another's from under it.
        directory = self._state_dir / "baked" / hashlib.sha256(key.encode()).hexdigest()[:16]
        try:
            return bake(graphs, directory, key, lambda: session_options(self.intra_op_threads))
        except BakeError as error:
            self.note = f"{error}; every point keeps its own copy of its weights"
        except Exception as error:  # ONNX Runtime's own classes share no base but this
            raise EngineError(f"{self.artifact.path}: ONNX Runtime refuses it: {error}") from error
        return None

    def _copied(self, when: When) -> HugePages | None:
        if when == "never" or self._baked is None or not huge_pages_exist():
            return None
        if when == "auto" and not are_worth_it(self._baked):
            return None
        try:
            return HugePages(self._baked.weights_path, self._baked.plain_bytes)
        except OSError as error:  # too little memory, or pruned meanwhile
            self.note = f"weights are mapped, not in huge pages: {error.strerror or error}"
            return None

    def _session(self, point: int) -> ort.InferenceSession:
        options = session_options(self.intra_op_threads)
        options.add_session_config_entry("session.use_env_allocators", "1")
        path = self.artifact.graph_path(point)
        if self.provider == "cpu":
            _share_arena()
        if self._baked and not self._baked.graph_path(point).exists():
            self._baked = self._bake()  # another process pruned it
        if self._baked:
            path = self._baked.graph_path(point)
            # It is optimised; another pass would copy constants that are shared.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            if self._huge:
                self._huge.give(self._baked.plain(point), options)
        try:
            session = ort.InferenceSession(path, options, [_PROVIDERS[self.provider]])
        except Exception as error:  # ONNX Runtime's own classes share no base but this
            raise EngineError(f"{path}: ONNX Runtime refuses it: {error}") from error
        if _PROVIDERS[self.provider] not in session.get_providers():
            raise EngineError(
                f"provider '{self.provider}' does not start here: is there a device, its driver "
                "and its libraries? Or use provider cpu"
            )
        self._check_graph(session, self.artifact.graph_path(point))
        return session

    def _check_graph(self, session: ort.InferenceSession, path: Path) -> None:
        for what, tensor, found in (
            ("input", self._input, session.get_inputs()),
            ("output", self._output, session.get_outputs()),
        ):
            if len(found) != 1 or not _is_as_said(found[0], tensor):
                has = ", ".join(f"'{x.name}' {x.shape}" for x in found)
                said = f"'{tensor.name}' {list(tensor.shape)}"
                raise EngineError(f"{path}: its {what} is {has}; the manifest says {said}")

    def _size_bytes(self, points: Iterable[int]) -> int:
        if self._baked:
            return self._baked.mapped_bytes(points)
        return sum(4 * self.artifact.points[point].params for point in points)


def _is_as_said(found: ort.NodeArg, tensor: Tensor) -> bool:
    """Return whether a graph's tensor is the manifest's; sizes that a graph leaves open are."""
    sizes = list(zip(found.shape[1:], tensor.shape[1:], strict=False))
    return (found.name, len(found.shape)) == (tensor.name, len(tensor.shape)) and all(
        size == wanted or not isinstance(size, int) for size, wanted in sizes
    )


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


def trim_heap() -> None:
    """Return to the system what loading left free in the heap: glibc keeps it, tens of MiB."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _share_arena() -> None:
    """Give all sessions of the process one arena for activations: one at a time fills it."""
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, -1, -1, -1))


def _available(provider: Provider) -> Provider:
    if provider not in _PROVIDERS:
        raise EngineError(f"provider '{provider}' is unknown; providers are cpu, cuda")
    if _PROVIDERS[provider] not in ort.get_available_providers():
        raise EngineError(
            f"provider '{provider}' is not in this ONNX Runtime ({ort.__version__}): "
            "install onnxruntime-gpu in the place of onnxruntime, or use provider cpu"
        )
    return provider
