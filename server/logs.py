"""What the log looks like: a line of text, or a JSON object, with the request that it is about."""

import logging
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from server.tracing import CURRENT

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, what `extra={"facts": …}` adds, the ids."""

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _unicode(record.getMessage()),
            **self._worker,
            **getattr(record, "facts", {}),
        }
        trace = CURRENT.get()
        if trace is not None:
            entry |= {"request_id": trace.request_id, "trace_id": trace.trace_id}
        if record.exc_info:
            entry["exception"] = _unicode(self.formatException(record.exc_info))
        return orjson.dumps(entry, default=str).decode()


class TextFormatter(logging.Formatter):
    """A line for people, which ends with the request's id where there is one."""

    def __init__(self, worker: int | None = None) -> None:
        super().__init__(_TEXT)
        self._worker = "" if worker is None else f" worker={worker}"

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        facts = "".join(f" {name}={value}" for name, value in getattr(record, "facts", {}).items())
        trace = CURRENT.get()
        about = f" request_id={trace.request_id}" if trace is not None else ""
        return super().format(record) + facts + about + self._worker


def _unicode(text: str) -> str:
    """Return a text as JSON takes it: a path's bytes that are no UTF-8 escaped."""
    return text.encode(errors="backslashreplace").decode()


def set_up(log_format: LogFormat, worker: int | None = None) -> None:
    """Send every log of this process to standard error in one format, with its number if any."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(worker) if log_format == "json" else TextFormatter(worker))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
