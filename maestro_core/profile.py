"""The latencies of every point on one host: what a profile says and how it is written.

It measures nothing (`benchmarks.profiler` does) and knows no file system (`profile_store` does).
"""

import json
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Literal, TypeVar, cast

from maestro_core.host import Host

FORMAT = 1

T = TypeVar("T")

Kind = Literal["quick", "full"]
Stop = Literal["precision", "time"]


class ProfileError(ValueError):
    """A profile that can't be used; the message names the field, its value and what is allowed."""


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What latencies depend on. A profile is used only where all of it is equal."""

    artifact: str  # digest
    host: Host
    provider: str
    intra_op_threads: int
    compute_threads: int
    workers: int  # processes that serve at once, each on its own cores
    runtime: tuple[tuple[str, str], ...]  # (package, version), by name

    def digest(self) -> str:
        """Return 16 hexadecimal digits that differ when anything in the key does."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Latency:
    """One point at one batch size: quantiles over n runs and the 95 % interval of the median."""

    point: int
    batch: int
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    n: int
    p50_low_ms: float
    p50_high_ms: float

    def __post_init__(self) -> None:
        where = f"point {self.point}, batch {self.batch}"
        quantiles = (self.p50_ms, self.p90_ms, self.p95_ms, self.p99_ms)
        if not all(math.isfinite(q) and q > 0 for q in quantiles):
            raise ProfileError(f"{where}: quantiles must be finite and above 0, not {quantiles}")
        if list(quantiles) != sorted(quantiles):
            raise ProfileError(f"{where}: p50, p90, p95, p99 must not fall: {quantiles}")
        if not 0 < self.p50_low_ms <= self.p50_high_ms < math.inf:
            raise ProfileError(
                f"{where}: interval {self.p50_low_ms}..{self.p50_high_ms} is not one of times"
            )
        if self.point < 0 or self.batch < 1 or self.n < 1:
            raise ProfileError(f"{where}: point >= 0, batch >= 1 and n >= 1 (n is {self.n})")


@dataclass(frozen=True, slots=True)
class Profile:
    """The latencies of points 0..P-1 (cheapest first) at each batch size, on one host."""

    key: ProfileKey
    measured_at: str  # ISO 8601, UTC
    kind: Kind
    stopped_on: Stop
    overhead_ms: float  # what a request usually costs outside the engine
    latencies: tuple[Latency, ...]  # by point, then by batch; complete
    dominated: tuple[int, ...] = ()  # a dearer point is no slower here at any batch size
    # Share of the host that others used meanwhile: at 0.5 of two cores tails were twice as long.
    cores_used_by_others: float = 0.0

    def __post_init__(self) -> None:
        cells = [(latency.point, latency.batch) for latency in self.latencies]
        grid = [(point, batch) for point in self.points for batch in self.batch_sizes]
        if not cells or cells != grid or self.points != tuple(range(len(self.points))):
            raise ProfileError(
                "latencies: every point from 0 must have every batch size, once and in order"
            )
        if not (math.isfinite(self.overhead_ms) and self.overhead_ms >= 0):
            raise ProfileError(f"overhead_ms: {self.overhead_ms} is not a time >= 0")
        if not 0 <= self.cores_used_by_others <= 1:
            raise ProfileError(
                f"cores_used_by_others: {self.cores_used_by_others} is not a share 0..1"
            )
        if self.points[-1] in self.dominated or not set(self.dominated) <= set(self.points):
            raise ProfileError(f"dominated: {self.dominated} is not some of {self.points[:-1]}")
        if list(self.dominated) != sorted(self.dominated):
            raise ProfileError(f"dominated: {self.dominated} is not in order")

    @property
    def points(self) -> tuple[int, ...]:
        return tuple(sorted({latency.point for latency in self.latencies}))

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return tuple(sorted({latency.batch for latency in self.latencies}))

    @property
    def chain(self) -> tuple[int, ...]:
        """Return the points worth using on this host; latencies never fall along them."""
        return tuple(point for point in self.points if point not in self.dominated)

    def row(self, point: int) -> tuple[Latency, ...]:
        """Return one point's latencies, by rising batch size.

        Raises:
            ProfileError: the point was not profiled.
        """
        found = tuple(latency for latency in self.latencies if latency.point == point)
        if not found:
            raise ProfileError(f"point {point} is not profiled; points are 0..{self.points[-1]}")
        return found

    def quantile_ms(self, point: int, batch: int, quantile: Literal[50, 90, 95, 99]) -> float:
        """Return a latency quantile, linear in batch between the two profiled sizes around it.

        Raises:
            ProfileError: the point was not profiled, or the batch lies outside the profiled sizes.
        """
        return self._at(point, batch, f"p{quantile}_ms")

    def median_interval_ms(self, point: int, batch: int) -> tuple[float, float]:
        """Return the 95 % interval of a median; of its ends, linear in batch, between sizes.

        Raises:
            ProfileError: as `quantile_ms`.
        """
        return self._at(point, batch, "p50_low_ms"), self._at(point, batch, "p50_high_ms")

    def _at(self, point: int, batch: int, field: str) -> float:
        row, sizes = self.row(point), self.batch_sizes
        if not sizes[0] <= batch <= sizes[-1]:
            raise ProfileError(f"batch {batch} is not profiled; sizes are {sizes[0]}..{sizes[-1]}")
        right = bisect_left(sizes, batch)
        above = float(getattr(row[right], field))
        if sizes[right] == batch:
            return above
        below = float(getattr(row[right - 1], field))
        share = (batch - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        return below + share * (above - below)

    def table(self, quantile: Literal[50, 90, 95, 99]) -> tuple[tuple[float, ...], ...]:
        """Return ms, (points, batch sizes), that never fall along the points: for choosing.

        A dominated point counts as fast as the next one worth using: it is then never chosen
        before that one, and does not slow it.
        """
        rows = [[float(getattr(x, f"p{quantile}_ms")) for x in self.row(p)] for p in self.points]
        for point in reversed(self.dominated):
            rows[point] = [min(pair) for pair in zip(rows[point], rows[point + 1], strict=True)]
        return tuple(tuple(row) for row in rows)

    def to_json(self) -> str:
        """Return the text of profile.json."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Profile":
        """Return the profile that a text holds.

        Raises:
            ProfileError: the text is not a profile of format 1; the message names the field.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ProfileError(f"not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ProfileError(f"format: {found!r} is not {FORMAT}")
        try:
            return _profile(data)
        except KeyError as error:
            raise ProfileError(f"field {error} is missing") from None
        except ProfileError:
            raise
        except (TypeError, AttributeError, ValueError) as error:
            raise ProfileError(f"a field has the wrong type: {error}") from None


def _profile(data: Mapping[str, Any]) -> Profile:
    key = data["key"]
    return Profile(
        key=ProfileKey(
            artifact=_typed(key, "artifact", str),
            host=Host.from_dict(key["host"]),
            provider=_typed(key, "provider", str),
            intra_op_threads=_typed(key, "intra_op_threads", int),
            compute_threads=_typed(key, "compute_threads", int),
            workers=_typed(key, "workers", int),
            runtime=tuple((str(name), str(version)) for name, version in key["runtime"]),
        ),
        measured_at=_typed(data, "measured_at", str),
        kind=cast(Kind, _one_of(data, "kind", ("quick", "full"))),
        stopped_on=cast(Stop, _one_of(data, "stopped_on", ("precision", "time"))),
        overhead_ms=_number(data, "overhead_ms"),
        latencies=tuple(_latency(entry) for entry in data["latencies"]),
        dominated=tuple(int(point) for point in data["dominated"]),
        cores_used_by_others=_number({"cores_used_by_others": 0.0, **data}, "cores_used_by_others"),
    )


def _latency(entry: Mapping[str, Any]) -> Latency:
    return Latency(
        point=_typed(entry, "point", int),
        batch=_typed(entry, "batch", int),
        p50_ms=_number(entry, "p50_ms"),
        p90_ms=_number(entry, "p90_ms"),
        p95_ms=_number(entry, "p95_ms"),
        p99_ms=_number(entry, "p99_ms"),
        n=_typed(entry, "n", int),
        p50_low_ms=_number(entry, "p50_low_ms"),
        p50_high_ms=_number(entry, "p50_high_ms"),
    )


def _typed(data: Mapping[str, Any], field: str, kind: type[T]) -> T:
    value = data[field]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProfileError(f"{field}: {value!r} is not of type {kind.__name__}")
    return value


def _number(data: Mapping[str, Any], field: str) -> float:
    value = data[field]
    return float(value) if isinstance(value, int) else _typed(data, field, float)


def _one_of(data: Mapping[str, Any], field: str, allowed: tuple[str, ...]) -> str:
    value = _typed(data, field, str)
    if value not in allowed:
        raise ProfileError(f"{field}: {value!r} is not one of {', '.join(allowed)}")
    return value
