"""What an operator can set: `MAESTRO_…` environment variables."""

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from platformdirs import user_cache_path
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.policy_names import OURS, PolicyName

SHIPPED = "cifar10-small.maestro"
LARGEST_BATCH = 1024
_SECRET = ("MAESTRO_ADMIN_TOKEN",)
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def shipped_artifact() -> Path:
    """Return the directory of the model that ships with the project."""
    return Path(str(resources.files("server"))) / "artifacts" / SHIPPED


class Settings(BaseSettings):
    """Each field is read from `MAESTRO_` + its name in capitals; one that is empty is not set."""

    model_config = SettingsConfigDict(env_prefix="MAESTRO_", env_ignore_empty=True, frozen=True)

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    artifact: Path = Field(default_factory=shipped_artifact)
    state_dir: Path = Field(default_factory=lambda: user_cache_path("maestro"))
    # Processes that serve, each on its own cores.
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    # Threads that compute one batch; 0 means as many as are measured to be best here.
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    # cuda needs onnxruntime-gpu in the place of onnxruntime.
    provider: Literal["cpu", "cuda"] = "cpu"
    # Weights in memory; 0 keeps every point there, else those last used that fit.
    memory_budget_mib: Annotated[int, Field(ge=0)] = 0
    # Weights of all points in memory of the server's own; auto: in one worker, where that takes
    # little more. With a memory budget they never are.
    huge_pages: Literal["auto", "always", "never"] = "auto"
    # What chooses point and batch: ours, with or without time left for what may come on an idle
    # host, or another to compare them with.
    policy: PolicyName = OURS
    # While no request comes, one of the server's own goes through it so often; 0: none does.
    keep_warm_ms: Annotated[float, Field(ge=0, le=60_000)] = 100.0
    max_batch: Annotated[int, Field(ge=1, le=LARGEST_BATCH)] = 16
    max_queue: Annotated[int, Field(ge=1)] = 1024
    max_body_bytes: Annotated[int, Field(ge=1)] = 16 * 2**20
    # Of the requests that are not answered yet, together.
    max_bodies_bytes: Annotated[int, Field(ge=1)] = 256 * 2**20
    # With the files of a server itself, below the 1,024 that many hosts let a process open.
    max_connections: Annotated[int, Field(ge=1)] = 800
    receive_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    calibration_budget_s: Annotated[float, Field(gt=0, le=120)] = 10.0
    # After SIGTERM: not ready, but serving, for so long.
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
    log_format: Literal["text", "json"] = "text"
    # A line for every request: what was asked for and how it went, nothing of the input.
    access_log: bool = False
    admin_token: SecretStr | None = None

    @field_validator("admin_token", mode="before")
    @classmethod
    def _no_empty_token(cls, value: object) -> object:
        """Return the token as a header can hold it: files that it is read from end in a newline."""
        token = value.strip() if isinstance(value, str) else value
        if isinstance(token, str) and _CONTROL.search(token):
            raise ValueError("no header can hold its line breaks or other control characters")
        return token or None


def read_settings(**given: Any) -> Settings:  # noqa: ANN401  fields of Settings
    """Return the settings from the environment, but for those given here.

    Raises:
        ValueError: one is out of its range; the message names its variable.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = f"MAESTRO_{'_'.join(str(part) for part in first['loc']).upper()}"
        why = first["msg"].removeprefix("Value error, ")
        if name in _SECRET:
            raise ValueError(f"{name}: {why}") from None
        raise ValueError(f"{name}: {why}, not {str(first['input'])!r}") from error
