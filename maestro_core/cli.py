"""The program `maestro`. A command gathers what it needs when it runs; nothing is decided here."""

import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from maestro_core import artifact, terminal
from maestro_core.allocator import keep_freed_memory
from server.policy_names import OURS, RESERVE, RivalName

if TYPE_CHECKING:
    import socket

    from server.settings import Settings

app = typer.Typer(
    help="Serve one network at the best accuracy that each request's deadline allows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(metadata.version("maestro-serve"))
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Take what goes before a command."""


BENCHES = {
    "engine": "memory, speed against each point alone, switching",
    "layers": "each layer as two factors, dense, or in the gauge form, by rank",
    "slots": "one batch on all cores against several at once on fewer",
    "calibration": "serving while calibrating, and calibrating while serving",
    "prediction": "whether measured latencies are what the profile says",
    "policies": "our policy and its rivals, simulated under load",
    "fleet": "how many replicas a load needs, simulated behind a balancer",
    "frontier": "our points against dense, narrower, cut by SVD, low-rank and 8-bit networks",
    "training": "a step of low-rank ordered training against a dense one",
    "load": "our policy and its rivals on live servers, over HTTP, beside the simulator",
    "overhead": "what a server adds to a network: ours, a handler by hand, and other servers",
    "workers": "several processes on one port against one: memory and answers a second",
    "search": "points found by this host's milliseconds, by MACs, and by other rules",
}

_STDERR = 2  # the last of the files that a process begins with

# Modules that not every installation has -> the extra that brings them.
_EXTRAS = {
    "torch": "train",
    "safetensors": "train",
    "sentencepiece": "train",
    "matplotlib": "train",
}

ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A NAME.maestro directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
Data = Annotated[
    Path | None, typer.Option(help="The data set: an .npz file or a folder, as the recipe wants.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


class CommandError(Exception):
    """Something that the user can put right; the message says how."""


def main() -> None:
    """Run the program: what is the user's to put right is one line, and exit status 1."""
    # Else onnxruntime reports its use to Microsoft: it reads this once, when it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from server.errors import ServiceError

    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (CommandError, ServiceError, ValueError, OSError) as error:
        terminal.errors.print(f"maestro: {error}", style="red", soft_wrap=True)
        sys.exit(1)


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="One of --list.")] = None,
    data: Data = None,
    out: Annotated[Path, typer.Option(help="For checkpoints and the artifact.")] = Path("out"),
    target_macs: Annotated[
        float | None, typer.Option(help="Train to this share of the dense MACs, 0..1.")
    ] = None,
    target_params: Annotated[
        float | None, typer.Option(help="Or to this share of the dense parameters.")
    ] = None,
    device: Device = "cpu",
    list_: Annotated[bool, typer.Option("--list", help="Name the recipes.")] = False,
) -> None:
    """Train, search and export: data in, an artifact out. The same call resumes.

    A recipe for text ends with a JSON file of its points: no artifact holds them yet.
    """
    running = _train_side("maestro_core.recipes.running")
    if list_:
        for name, summary in running.summaries().items():
            terminal.tell(f"{name}: {summary}")
        return
    if recipe is None or data is None:
        raise CommandError("train: give a RECIPE and --data PATH; --list names the recipes")
    keep_freed_memory()
    path = running.run(recipe, data, out, _target(target_macs, target_params), device)
    if path is None:
        return  # another process of torchrun has it
    if path.suffix == ".json":
        terminal.print_text_points(json.loads(path.read_text()))
        terminal.tell(f"wrote {path}")
        return
    show(path)
    terminal.tell(f"serve it: maestro serve {path}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that `train` wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.maestro", help="The artifact to write.")],
    data: Data = None,
    device: Device = "cpu",
) -> None:
    """Search and export alone, from a checkpoint; the data chooses and scores the points."""
    if data is None:
        raise CommandError("export: give --data PATH, the data that the checkpoint was trained on")
    show(_train_side("maestro_core.recipes.running").export(checkpoint, data, out, device))


@app.command()
def show(
    path: ArtifactPath,
    plot: Annotated[Path | None, typer.Option(help="Draw the points into this PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the points, with this host's latency where it has been profiled."""
    from server import local
    from server.answers import frontier_rows
    from server.measuring import HostModel
    from server.settings import read_settings

    model = HostModel(artifact.load(path), read_settings())
    loaded = model.points().artifact
    found = local.stored_profile(model, model.engine(loaded))
    terminal.warn(found.reason)
    rows = frontier_rows(loaded, found.profile)
    terminal.print_points(loaded, rows, as_json)
    if plot:
        _train_side("maestro_core.plot").draw(loaded, rows, plot)
        terminal.warn(f"wrote {plot}")


@app.command()
def profile(
    path: ArtifactPath,
    quick: Annotated[bool, typer.Option("--quick", help="15 s at most, not 2 minutes.")] = False,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="First find points for this host: a large network needs a minute."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure every point on this host, store the profile, print the points."""
    from benchmarks.effort import FULL, QUICK
    from server import local
    from server.answers import frontier_rows
    from server.measuring import HostModel
    from server.settings import read_settings

    effort = replace(QUICK if quick else FULL, search=search)
    with terminal.progress("calibrating") as progress:
        model = HostModel(artifact.load(path), read_settings())
        served, measured, note = local.profile(model, effort, progress)
    terminal.print_points(served, frontier_rows(served, measured), as_json)
    terminal.warn(terminal.how_sure(measured))
    if note:
        raise CommandError(note)


@app.command()
def serve(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="ARTIFACT", help="Else MAESTRO_ARTIFACT, or the model that ships."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Else MAESTRO_HOST, or 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Else MAESTRO_PORT, or 8000.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes, each on its own cores; else MAESTRO_WORKERS, or 1."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"What chooses point and batch, else MAESTRO_POLICY: {OURS}; {RESERVE}, which "
            "leaves time for what may come on an idle host too; or to compare them with "
            f"{', '.join(get_args(RivalName))}."
        ),
    ] = None,
) -> None:
    """Start the server."""
    # Until the server takes it: else a container's first process ignores it, and serves on.
    signal.signal(signal.SIGTERM, _end)
    _take_standard_files()
    from server import logs
    from server.settings import read_settings

    given: dict[str, Any] = {
        "artifact": path,
        "host": host,
        "port": port,
        "workers": workers,
        "policy": policy,
    }
    # Settings that are wrong are told in the format, too.
    as_json = os.environ.get("MAESTRO_LOG_FORMAT") == "json"
    logs.set_up("json" if as_json else "text")
    with _errors_logged() if as_json else nullcontext():
        settings = read_settings(**{name: v for name, v in given.items() if v is not None})
    logs.set_up(settings.log_format)
    run = _serve_alone if settings.workers == 1 else _serve_with_workers
    if settings.log_format == "text":
        run(settings, terminal.tell)
        return
    with _errors_logged():
        run(settings, logging.getLogger("maestro").info)


@contextmanager
def _errors_logged() -> Iterator[None]:
    """Log what ends the program, inside, in the place of a line of text."""
    from server.errors import ServiceError

    try:
        yield
    except (CommandError, ServiceError, ValueError, OSError) as error:
        logging.getLogger("maestro").error(error)
        raise typer.Exit(1) from error


def _take_standard_files() -> None:
    """Leave none of 0, 1 and 2 closed: a socket in their place is lost to each worker."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(number, True)
    os.close(number)


def _end(_number: int, _frame: object) -> None:
    sys.exit(0)


def _serve_alone(settings: "Settings", tell: Callable[[str], None]) -> None:
    from server import running, tracing
    from server.service import Service

    listeners = _listeners(settings)
    tracing.export_spans("maestro")
    with terminal.progress("calibrating", settings.log_format) as progress:
        service = Service(settings, progress)
        tell(f"{service.artifact.manifest.name} on {_address(settings, listeners)}; API at /docs")
        started = running.run(service, listeners)
    if not started:
        raise CommandError("the server did not start; its log says why")


def _serve_with_workers(settings: "Settings", tell: Callable[[str], None]) -> None:
    from server.processes import cores
    from server.processes.supervisor import WorkersError, supervise

    name = artifact.load(settings.artifact).manifest.name  # what is wrong with it is said once
    groups = cores.groups(settings.workers)
    listeners = _listeners(settings)
    tell(f"{name} on {_address(settings, listeners)}, {len(groups)} workers; API at /docs")
    try:
        with terminal.progress("calibrating", settings.log_format) as progress:
            supervise(settings, groups, listeners, progress)
    except WorkersError as error:
        raise CommandError(str(error)) from error


def _listeners(settings: "Settings") -> list["socket.socket"]:
    from server import listening

    try:
        return listening.listen(settings.host, settings.port)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise CommandError(f"the server did not start on {where}: {error.strerror}") from error


def _address(settings: "Settings", listeners: list["socket.socket"]) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host  # RFC 3986, 3.2.2
    return f"http://{host}:{listeners[0].getsockname()[1]}"


@app.command()
def infer(
    path: ArtifactPath,
    file: Annotated[Path, typer.Argument(metavar="INPUT", help="PNG, JPEG, .npy or .json.")],
    max_latency_ms: Annotated[float | None, typer.Option(help="The target.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="The floor, 0..1.")] = None,
    on_miss: Annotated[str, typer.Option(help="degrade or reject.")] = "degrade",
    point: Annotated[int | None, typer.Option(help="This point, whatever its latency.")] = None,
    top_k: Annotated[int | None, typer.Option(help="The k most likely labels.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one input without a server; calibrates first if this host has no profile yet."""
    from benchmarks.effort import QUICK
    from server import local
    from server.measuring import HostModel
    from server.schemas import parse_parameters
    from server.settings import read_settings

    given = {
        "max_latency_ms": max_latency_ms,
        "min_accuracy": min_accuracy,
        "on_miss": on_miss,
        "point": point,
        "top_k": top_k,
    }
    known = {name: value for name, value in given.items() if value is not None}
    parameters = parse_parameters({}, known)
    model = HostModel(artifact.load(path), read_settings())
    loaded = model.points().artifact
    x = local.read_input(file, loaded.manifest.input)
    engine = model.engine(loaded)
    measured, reason = local.stored_profile(model, engine)
    terminal.warn(reason)
    if measured is None:
        with terminal.progress("calibrating") as progress:
            _, measured, note = local.profile(model, QUICK, progress, engine)
        terminal.warn(note)
    answer = local.infer(engine, measured, x, parameters)
    answer["outputs"] = answer["outputs"].tolist()
    if as_json:
        print(json.dumps(answer))
        return
    for name, value in answer.items():
        if value is not None and name != "outputs":
            terminal.tell(f"{name}: {value}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="One of --list.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the comparisons.")] = False,
) -> None:
    """Measure this project against what a user would pick instead; NAME --help for its options."""
    if list_ or name not in BENCHES:
        for known, what in BENCHES.items():
            terminal.tell(f"{known}: {what}")
        if name not in (None, "--help"):
            raise CommandError(f"bench: there is no '{name}'")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers that it started end with it
    _train_side(f"benchmarks.{name}").main(context.args)


def _target(macs: float | None, params: float | None) -> Any:  # noqa: ANN401  torch is behind it
    if macs is not None and params is not None:
        raise CommandError("train: give --target-macs or --target-params, not both")
    share = params if macs is None else macs
    if share is None:
        return None
    return _train_side("maestro_core.target").Target("params" if macs is None else "macs", share)


def _train_side(module: str) -> Any:  # noqa: ANN401  a module
    """Return a module that needs an extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra:
            raise CommandError(
                f"this needs {error.name}: pip install -e '.[{extra}]' in a clone of the project"
            ) from error
        raise
