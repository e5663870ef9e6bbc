"""What can go wrong with a request, and the status that says so.

One handler (app.py) turns these into `application/problem+json` (RFC 9457). `error` repeats the
detail as a plain string, where clients of the Open Inference Protocol look for it.
"""

import math
from typing import Any, ClassVar

PROBLEM_TYPE = "application/problem+json"


class ServiceError(Exception):
    """An error that a client is told about; `members` are added to the answer."""

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, detail: str, **members: Any) -> None:  # noqa: ANN401  any JSON
        super().__init__(detail)
        self.detail = detail
        self.members = members

    def problem(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return {
            "type": f"urn:maestro:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "error": self.detail,
            **self.members,
        }

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to the status."""
        return {}


class BadRequestError(ServiceError):
    """The bytes cannot be read as what they claim to be."""

    status, code, title = 400, "bad-request", "The request cannot be read"


class UnauthorizedError(ServiceError):
    """An admin call without the admin token."""

    status, code, title = 401, "unauthorized", "This call needs the admin token"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class ForbiddenError(ServiceError):
    """An admin call from elsewhere, while no admin token is set."""

    status, code, title = 403, "forbidden", "This call is for this machine only"


class NotFoundError(ServiceError):
    """No such thing here."""

    status, code, title = 404, "not-found", "There is no such thing here"


class ConflictError(ServiceError):
    """What is asked for is under way already."""

    status, code, title = 409, "conflict", "This is under way already"


class TooLargeError(ServiceError):
    """A body over the limit."""

    status, code, title = 413, "too-large", "The body is too large"


class UnsupportedMediaError(ServiceError):
    """A body of a type that is not served."""

    status, code, title = 415, "unsupported-media-type", "This type of body is not served"


class UnsupportedEncodingError(ServiceError):
    """A body that is compressed, or coded in another way."""

    status, code, title = 415, "unsupported-encoding", "This coding of bodies is not served"

    def __init__(self, header: str, encoding: str) -> None:
        super().__init__(f"{header} '{encoding[:40]}' is not served; send the body as it is")

    def headers(self) -> dict[str, str]:
        return {"Accept-Encoding": "identity"}  # RFC 9110, section 15.5.16


class InvalidError(ServiceError):
    """Readable, but not what the model or the parameters take."""

    status, code, title = 422, "invalid", "The request is not valid"


class InfeasibleError(ServiceError):
    """No point makes the target, or none has the accuracy asked for."""

    status, code, title = 422, "infeasible", "The target cannot be met"


class InternalError(ServiceError):
    """An error that nobody foresaw."""

    status, code, title = 500, "internal", "The server failed"


class UnavailableError(ServiceError):
    """Not now: overload, draining, or not ready. Says when to try again."""

    status, code, title = 503, "unavailable", "Not now"

    def __init__(self, detail: str, retry_after_s: float = 1.0, **members: Any) -> None:  # noqa: ANN401
        super().__init__(detail, retry_after_ms=round(1e3 * retry_after_s), **members)
        self.retry_after_s = retry_after_s

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class OutOfTimeError(ServiceError):
    """An accepted request whose deadline passed before it could be run."""

    status, code, title = 504, "out-of-time", "The deadline passed"
