"""What commands of `maestro` print: points as a table, notes, and how far a calibration is."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from maestro_core.artifact import Artifact

if TYPE_CHECKING:
    from maestro_core.profile import Profile


class _Errors(Console):
    """Standard error. Where nobody reads it any more, what was begun goes on: rich would exit."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


# Paths, labels and addresses are printed as they are: "[fd00::5]" would pass for a style.
console = Console(highlight=False, markup=False, emoji=False)
errors = _Errors(stderr=True, highlight=False, markup=False, emoji=False)


def tell(line: str) -> None:
    """Print a line whole, however narrow the terminal is."""
    console.print(line, soft_wrap=True)


def warn(note: str | None) -> None:
    """Print a note whole, if there is one, where it doesn't mix with a result."""
    if note:
        errors.print(note, soft_wrap=True)


def print_points(loaded: Artifact, rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the points (`server.answers.frontier_rows`) as a table, or as one JSON object."""
    manifest = loaded.manifest
    if as_json:
        print(json.dumps({"name": manifest.name, "version": manifest.version, "points": rows}))
        return
    title = f"{manifest.name} {manifest.version}: {manifest.metric.name}, %"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
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
        warn(f"not profiled on this host yet: maestro profile {loaded.path}")


def print_text_points(report: dict[str, Any]) -> None:
    """Print the points of a recipe for text, of the file that it wrote."""
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


def how_sure(measured: "Profile") -> str:
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


@contextmanager
def progress(what: str, form: Literal["text", "json"] = "text") -> Iterator[Callable[[Any], None]]:
    """Show a calibration on stderr, from its first sign of life: a bar, or now and then a line.

    form: that of the log, which takes the lines where it is JSON.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    bar = Progress(*columns, TimeElapsedColumn(), console=errors, transient=True)
    task = bar.add_task(what, total=None, left="")
    state: dict[Literal["line"], tuple[int, int]] = {}
    most_s = 1e-3  # that the trials were seen to need

    def update(seen: Any) -> None:  # noqa: ANN401  effort.Progress, without importing it
        with suppress(OSError):  # a full disk, or a terminal that is gone, ends no calibration
            show(seen)

    def show(seen: Any) -> None:  # noqa: ANN401
        nonlocal most_s
        left, share = f"{seen.done} of {seen.total}", seen.done / seen.total
        if seen.left_s is not None:
            left += f" precise, {seen.left_s:.0f} s at most"
            most_s = max(most_s, seen.left_s)
            share = max(share, 1 - seen.left_s / most_s)  # a noisy host ends by time
        line = (seen.total, -1 if seen.left_s is None else int(seen.left_s) // 3)
        if form == "text" and errors.is_terminal:
            bar.start()
            bar.update(task, completed=share, total=1.0, left=left)
            if seen.done == seen.total or (seen.left_s is not None and seen.left_s <= 0):
                bar.stop()
        elif state.get("line") != line:
            state["line"] = line
            if form == "json":
                logging.getLogger("maestro").info("%s: %s", what, left)
            else:
                errors.print(f"{what}: {left}", soft_wrap=True)

    try:
        yield update
    finally:
        if bar.live.is_started:  # else a console that is no terminal gets an empty line
            with suppress(OSError):
                bar.stop()
