"""The program `maestro`. A command gathers what it needs when it runs; nothing is decided here."""

import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from maestro_core import artifact
from maestro_core.allocator import keep_freed_memory
from maestro_core.artifact import Artifact

if TYPE_CHECKING:
    from maestro_core.profile import Profile
    from server.settings import Settings

app = typer.Typer(
    help="Serve one network at the best accuracy that each request's deadline allows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

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
        errors.print(f"maestro: {error}", style="red", markup=False)
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
            console.print(f"{name}: {summary}")
        return
    if recipe is None or data is None:
        raise CommandError("train: give a RECIPE and --data PATH; --list names the recipes")
    keep_freed_memory()
    path = running.run(recipe, data, out, _target(target_macs, target_params), device)
    if path is None:
        return  # another process of torchrun has it
    if path.suffix == ".json":
        _print_text_points(json.loads(path.read_text()))
        console.print(f"wrote {path}")
        return
    show(path)
    console.print(f"serve it: maestro serve {path}")


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
    _warn(found.reason)
    rows = frontier_rows(loaded, found.profile)
    _print_points(loaded, rows, as_json)
    if plot:
        _train_side("maestro_core.plot").draw(loaded, rows, plot)
        errors.print(f"wrote {plot}")


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
    with _progress("calibrating") as progress:
        model = HostModel(artifact.load(path), read_settings())
        served, measured, note = local.profile(model, effort, progress)
    _print_points(served, frontier_rows(served, measured), as_json)
    errors.print(_how_sure(measured))
    if note:
        raise CommandError(note)


@app.command()
def serve(
    path: Annotated[Path | None, typer.Argument(metavar="[ARTIFACT]")] = None,
    host: Annotated[str | None, typer.Option(help="Else MAESTRO_HOST, or 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Else MAESTRO_PORT, or 8000.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes, each on its own cores; else MAESTRO_WORKERS, or 1."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="What chooses point and batch, else MAESTRO_POLICY: maestro; reserve, which "
            "leaves time for what may come on an idle host too; or to compare them with largest, "
            "middle, smallest, infaas, maxacc, maxbatch, slackfit, clipper, bentoml, clockwork, "
            "nexus, nexus-smallest."
        ),
    ] = None,
) -> None:
    """Start the server; without ARTIFACT, for the model that ships with the project."""
    from server import logs
    from server.errors import ServiceError
    from server.settings import read_settings

    given: dict[str, Any] = {
        "artifact": path,
        "host": host,
        "port": port,
        "workers": workers,
        "policy": policy,
    }
    settings = read_settings(**{name: v for name, v in given.items() if v is not None})
    logs.set_up(settings.log_format)
    run = _serve_alone if settings.workers == 1 else _serve_with_workers
    if settings.log_format == "text":
        run(settings, _tell)
        return
    log = logging.getLogger("maestro")
    try:
        run(settings, log.info)
    except (CommandError, ServiceError, ValueError, OSError) as error:
        log.error(error)
        raise typer.Exit(1) from error


def _tell(line: str) -> None:
    console.print(line, soft_wrap=True)


def _serve_alone(settings: "Settings", tell: Callable[[str], None]) -> None:
    from server import running, tracing
    from server.service import Service

    tracing.export_spans("maestro")
    with _progress("calibrating", settings.log_format) as progress:
        service = Service(settings, progress)
        name = service.artifact.manifest.name
        tell(f"{name} on http://{settings.host}:{settings.port}; API at /docs")
        started = running.run(service)
    if not started:
        raise CommandError(f"the server did not start on {settings.host}:{settings.port}")


def _serve_with_workers(settings: "Settings", tell: Callable[[str], None]) -> None:
    from server.processes import cores, listening
    from server.processes.supervisor import WorkersError, supervise

    name = artifact.load(settings.artifact).manifest.name  # what is wrong with it is said once
    groups = cores.groups(settings.workers)
    try:
        listeners = listening.listen(settings.host, settings.port)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise CommandError(f"the server did not start on {where}: {error.strerror}") from error
    port = listeners[0].getsockname()[1]
    tell(f"{name} on http://{settings.host}:{port}, {len(groups)} workers; API at /docs")
    try:
        with _progress("calibrating", settings.log_format) as progress:
            supervise(settings, groups, listeners, progress)
    except WorkersError as error:
        raise CommandError(str(error)) from error


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
    _warn(reason)
    if measured is None:
        with _progress("calibrating") as progress:
            _, measured, note = local.profile(model, QUICK, progress, engine)
        _warn(note)
    answer = local.infer(engine, measured, x, parameters)
    answer["outputs"] = answer["outputs"].tolist()
    if as_json:
        print(json.dumps(answer))
        return
    for name, value in answer.items():
        if value is not None and name != "outputs":
            console.print(f"{name}: {value}")


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
            console.print(f"{known}: {what}")
        if name is not None:
            raise CommandError(f"bench: there is no '{name}'")
        return
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


def _print_points(loaded: Artifact, rows: list[dict[str, Any]], as_json: bool) -> None:
    manifest = loaded.manifest
    if as_json:
        print(json.dumps({"name": manifest.name, "version": manifest.version, "points": rows}))
        return
    table = Table(title=f"{manifest.name} {manifest.version}: {manifest.metric.name}, %")
    table.box = box.SIMPLE_HEAD
    for head in ("", "score", "95 %", "MACs", "dense", "params", "p50 ms", "p95 ms", "front"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["point"]),
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['accuracy_low']:.2f}-{100 * row['accuracy_high']:.2f}",
            _short(row["macs"]),
            f"{row['macs'] / manifest.dense_macs:.0%}",
            _short(row["params"]),
            *("-" if row[q] is None else f"{row[q]:.3f}" for q in ("p50_ms", "p95_ms")),
            {True: "yes", False: "no", None: "-"}[row["on_frontier"]],
        )
    console.print(table)
    if rows[0]["p50_ms"] is None:
        errors.print(f"not profiled on this host yet: maestro profile {loaded.path}")


def _how_sure(measured: "Profile") -> str:
    """Return what ended a calibration, how well medians are known, and how busy others were."""
    ended = "all medians are precise" if measured.stopped_on == "precision" else "the time was up"
    widest = max((x.p50_high_ms - x.p50_low_ms) / 2 / x.p50_ms for x in measured.latencies)
    return (
        f"measured until {ended}: within {widest:.1%} or less (95 %); "
        f"others used {measured.cores_used_by_others:.0%} of the host"
    )


def _short(number: int) -> str:
    """Return three significant digits and a unit: all columns fit a terminal of 80."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{max(0, 2 - len(str(int(scaled))) + 1)}f} {unit}"
    return str(number)


def _print_text_points(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['name']}: perplexity on {report['test']['split']}")
    table.box = box.SIMPLE_HEAD
    for head in ("perplexity", "95 %", "MACs per token", "dense", "embedding", "other params"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in report["points"]:
        table.add_row(
            f"{row['perplexity']:.2f}",
            f"{row['low']:.2f}-{row['high']:.2f}",
            f"{row['macs_per_token']:,}",
            f"{row['macs'] / report['dense']['macs']:.0%}",
            f"{row['embedding_params']:,}",
            f"{row['linear_params']:,}",
        )
    console.print(table)


def _warn(note: str | None) -> None:
    if note:
        errors.print(note)


@contextmanager
def _progress(what: str, form: Literal["text", "json"] = "text") -> Iterator[Callable[[Any], None]]:
    """Show a calibration on stderr, from its first sign of life: a bar, or now and then a line.

    form: that of the log, which takes the lines where it is JSON.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    bar = Progress(*columns, TimeElapsedColumn(), console=errors, transient=True)
    task = bar.add_task(what, total=None, left="")
    state: dict[Literal["line"], int] = {"line": -1}

    def update(seen: Any) -> None:  # noqa: ANN401  effort.Progress, without importing it
        left = f"{seen.done} of {seen.total}, {seen.left_s:.0f} s at most"
        if form == "text" and errors.is_terminal:
            bar.start()
            bar.update(task, completed=seen.done, total=seen.total, left=left)
            if seen.done == seen.total or seen.left_s <= 0:
                bar.stop()
        elif state["line"] != int(seen.left_s) // 3:
            state["line"] = int(seen.left_s) // 3
            if form == "json":
                logging.getLogger("maestro").info("%s: %s", what, left)
            else:
                errors.print(f"{what}: {left}", soft_wrap=True)

    try:
        yield update
    finally:
        if bar.live.is_started:  # else a console that is no terminal gets an empty line
            bar.stop()
