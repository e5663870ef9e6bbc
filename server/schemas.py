"""The shapes of what goes over HTTP. Parameters are checked here; answers are described here.

Tensor data never passes through these: a model per number would cost more than the network does.
"""

from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError

from server.errors import InvalidError
from server.requests import Request

Pair = tuple[str, str]

MAX_LATENCY_MS = 3_600_000.0
# Shorter targets are missed as surely, and clocks don't tell them apart.
_LEAST_MS = 1e-3


class InferParameters(BaseModel):
    """What a client may ask of an inference, besides its input."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_latency_ms: Annotated[float, Field(gt=0, le=MAX_LATENCY_MS)] | None = Field(
        None, description="The target, also as header x-max-latency-ms; the smallest binds"
    )
    min_accuracy: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="A floor: never answered below it"
    )
    on_miss: Literal["degrade", "reject"] = Field(
        "degrade", description="Where no point makes the target: the fastest answers, or an error"
    )
    point: Annotated[int, Field(ge=0)] | None = Field(
        None, description="This point, whatever its latency"
    )
    priority: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(
        0, description="1 is the highest; 0 counts as 2. Given up last when there is too much to do"
    )
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="The k most likely labels with their shares"
    )

    def request(self, request_id: str, arrived_s: float, rows: int) -> Request:
        """Return what the scheduler is asked for `rows` samples that arrived at `arrived_s`.

        Raises:
            InvalidError: a value is out of its range.
        """
        target_ms = self.max_latency_ms
        try:
            return Request(
                request_id,
                arrived_s,
                None if target_ms is None else arrived_s + max(target_ms, _LEAST_MS) / 1e3,
                self.min_accuracy,
                self.on_miss,
                self.priority,
                self.point,
                rows,
            )
        except ValueError as error:
            raise InvalidError(str(error)) from error


_PARAMETERS = TypeAdapter(InferParameters)
_TARGET = "max_latency_ms"


def parse_parameters(
    query: Collection[Pair],
    body: Mapping[str, Any],
    targets_ms: Iterable[str | float | None] = (),
    form: Collection[Pair] = (),
) -> InferParameters:
    """Return the parameters of one request. The body wins over the query, except for the target:
    of all that are given, those of headers and of the protocol included, the smallest binds.

    form: the fields beside a file, which win over the query, and the file's own over them. null in
    the body is as if the parameter were not there.

    Raises:
        InvalidError: a parameter is unknown, out of its range, or given twice with other values.
    """
    own = [_validate_query(tuple(query))] if query else []
    if form:
        own.append(_validate_texts(form))
    if body:
        own.append(_validate(_without_null(body, InferParameters)))
    return _together(own, [_target(ms) for ms in targets_ms if ms is not None])


def _without_null(body: Mapping[str, Any], fields: type[BaseModel]) -> dict[str, Any]:
    """Return what a body gives, without those of the fields that are null."""
    known = fields.model_fields
    return {k: v for k, v in body.items() if v is not None or k not in known}


def _together(own: list[InferParameters], targets: list[InferParameters]) -> InferParameters:
    """Return parameters of which later ones win, and the smallest of all targets."""
    given = own + targets
    if len(given) <= 1:
        return given[0] if given else _NOTHING
    fields: dict[str, Any] = {}
    for parameters in own:
        fields |= parameters.model_dump(exclude_unset=True)
    found = [p.max_latency_ms for p in given if p.max_latency_ms is not None]
    fields["max_latency_ms"] = min(found, default=None)
    return InferParameters.model_construct(None, **fields)


@lru_cache(maxsize=128)
def _validate_query(query: tuple[Pair, ...]) -> InferParameters:
    """Return what a query asks; a client asks the same over and over."""
    return _validate_texts(query)


def _validate_texts(pairs: Collection[Pair]) -> InferParameters:
    own = _validate(single(pair for pair in pairs if pair[0] != _TARGET))
    return _together([own], [_target(text) for name, text in pairs if name == _TARGET])


def single(pairs: Iterable[Pair]) -> dict[str, str]:
    """Return the value of each name.

    Raises:
        InvalidError: a name has two that differ.
    """
    given: dict[str, str] = {}
    for name, value in pairs:
        if given.setdefault(name, value) != value:
            raise InvalidError(f"{name}: given as {given[name][:40]!r} and as {value[:40]!r}")
    return given


def _target(ms: str | float) -> InferParameters:
    return _validate({_TARGET: ms})


def _validate(values: Mapping[str, Any]) -> InferParameters:
    for name, value in values.items():
        if isinstance(value, bool):  # else they would pass for 0 and 1
            raise InvalidError(f"{name}: must not be true or false")
    try:
        return _PARAMETERS.validate_python(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "extra_forbidden":
            known = ", ".join(InferParameters.model_fields)
            raise InvalidError(f"unknown parameter '{first['loc'][0]}'; known: {known}") from error
        raise _invalid(error) from error


def _invalid(error: ValidationError) -> InvalidError:
    """Return what a client is told of the first field that is wrong."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    return InvalidError(f"{name}: {first['msg']}, not {str(first['input'])[:40]!r}")


_NOTHING = InferParameters()


class Label(BaseModel):
    """One of the most likely classes."""

    label: str
    index: int
    score: float


class InferAnswer(BaseModel):
    """The output, and how it came about. Times in milliseconds, accuracy 0..1."""

    model: str
    labels: list[str] | None = Field(description="Per sample, where the model has labels")
    top: list[list[Label]] | None = Field(description="Per sample; with `top_k`")
    point: int
    ranks: dict[str, int]
    accuracy: float
    predicted_ms: float = Field(description="Tail latency that was counted on, queueing excluded")
    queue_ms: float
    compute_ms: float
    total_ms: float = Field(description="From the request's arrival to the answer's hand-over")
    max_latency_ms: float | None
    target_met: bool | None
    batch_size: int
    outputs: list[Any]


class Problem(BaseModel):
    """RFC 9457, with `error` as the Open Inference Protocol has it."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    error: str


_TRUTHS: Mapping[str, Any] = {"true": True, "false": False}


class ProfileRequest(BaseModel):
    """What to calibrate."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["quick", "full"] = Field("full", description="12 seconds, or two minutes at most")
    search: StrictBool = Field(False, description="First look for points that suit this host")


def parse_profile_request(query: Iterable[Pair], body: Mapping[str, Any]) -> ProfileRequest:
    """Return what to calibrate. The body wins over the query; null in it is as if not there.

    Raises:
        InvalidError: a field is unknown, out of its range, or twice in the query with other values.
    """
    asked = {name: _TRUTHS.get(text, text) for name, text in single(query).items()}
    try:
        ProfileRequest.model_validate(asked)  # the body may hide what is wrong with it
        return ProfileRequest.model_validate({**asked, **_without_null(body, ProfileRequest)})
    except ValidationError as error:
        raise _invalid(error) from error


class Job(BaseModel):
    """A calibration."""

    id: str
    state: Literal["running", "done", "cancelled", "failed"]
    done: int
    total: int
    seconds_left: float | None = Field(description="At most; null while points are looked for")
    error: str | None = None
    note: str | None = Field(None, description="What a job that is done could not do")


class FrontierPoint(BaseModel):
    """One point on this host; latencies of a whole batch, in milliseconds."""

    point: int
    ranks: dict[str, int]
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    macs: int
    params: int
    p50_ms: float | None
    p50_low_ms: float | None = Field(description="Lower end of the median's 95 % interval")
    p50_high_ms: float | None = Field(description="Upper end of it")
    p95_ms: float | None
    p99_ms: float | None
    on_frontier: bool | None = Field(description="No other point is as accurate and faster here")


class Frontier(BaseModel):
    """The points, cheapest first."""

    model: str
    batch: int
    points: list[FrontierPoint]


class ProfileAnswer(BaseModel):
    """The profile in use."""

    source: Literal["measured", "stored"]
    profile: dict[str, Any]
    slowdown: float = Field(description="Measured over profiled latency, now")


class Verdict(BaseModel):
    """One point, as it looks for one request now."""

    point: int
    accuracy: float
    tail_ms: float
    total_ms: float = Field(description="Waiting, tail and overhead")
    feasible: bool
    why: str


class ExplainedRefusal(BaseModel):
    """Why the request would not be taken, and what would help."""

    reason: Literal["infeasible", "floor", "full", "overloaded", "draining"]
    detail: str
    min_feasible_ms: float | None
    retry_after_s: float | None


class Explained(BaseModel):
    """What would be chosen now, and why."""

    point: int | None = Field(
        description="null: refused; or a policy that is not ours gives it up, or runs it later"
    )
    why: str
    refusal: ExplainedRefusal | None
    budget_ms: float | None
    wait_ms: float
    interrupts: bool = Field(description="The batch that runs would be interrupted for it")
    slowdown: float
    waiting: int
    points: list[Verdict]
