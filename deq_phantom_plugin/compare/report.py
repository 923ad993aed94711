"""Shows and saves the results of a comparison: a table, JSON, CSV and a plot.

A file that cannot be written as a whole is left as it was.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .._plumbing.extras import require
from .._plumbing.output import text_table, write_whole
from ..diagnostics.measure.results import COMPARABLE
from .training import EXACT, MethodResult

TARGET_ACCURACY = 0.9
_MEAN_STEPS = 10  # over which the plot averages losses


def table(results: Sequence[MethodResult], target: float | None = TARGET_ACCURACY) -> str:
    """Return the results as a text table with footnotes.

    Args:
        results: the results of `compare`.
        target: an accuracy. A line under the table names the methods that are not above it; None
            leaves the line out.
    """
    header = ["method", "ms/step", "backward", "test acc.", "cosine", "peak MiB"]
    rows = [
        [
            result.spec,
            f"{1e3 * result.step_seconds:.1f}",
            f"{result.backward_share:.0%}",
            f"{result.accuracy:.1%}",
            f"{result.cosine:.4f}" if _solved(result) else "-",
            f"{result.peak_bytes / 2**20:.1f}",
        ]
        for result in results
    ]
    lines = [text_table(header, rows)]
    lines.append(
        "Times are medians. Cosine: of the gradient to the exact one, which is "
        f"{EXACT} in float64, for the parameters of the equilibrium layer, on a held-out batch of "
        "each trained model."
    )
    if short := [r for r in results if not _solved(r)]:
        found = ", ".join(f"{r.spec}: {r.exact_residual:.0e}" for r in short)
        lines.append(
            "There is no cosine where the equilibrium or its exact gradient was solved only to a "
            f"relative residual above {COMPARABLE:.0e}: {found}."
        )
    if target is not None:
        low = [f"{r.spec} ({r.accuracy:.1%})" for r in results if r.accuracy <= target]
        verdict = (
            f"not above {target:.0%} test accuracy: {', '.join(low)}"
            if low
            else (f"every method ended above {target:.0%} test accuracy")
        )
        lines.append(verdict)
    return "\n".join(lines)


def _solved(result: MethodResult) -> bool:
    """Whether there was an exact gradient to compare with."""
    return result.exact_residual <= COMPARABLE


def write(results: Sequence[MethodResult], folder: str | Path, title: str) -> Path:
    """Write results.json, steps.csv and loss.png into a folder; each is replaced as a whole.

    Args:
        results: the results of `compare`.
        folder: the folder, which is made if it is missing.
        title: the title of the plot.

    Returns:
        The path of the plot.

    Raises:
        ImportError: without matplotlib.
    """
    matplotlib = require("matplotlib", "viz")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "viz")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(result) for result in results], indent=1)
    write_whole(target / "results.json", text.encode())
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(["method", "step", "seconds", "loss"])
    for result in results:
        for step, (second, loss) in enumerate(zip(result.seconds, result.losses, strict=True), 1):
            writer.writerow([result.spec, step, f"{second:.6f}", f"{loss:.6g}"])
    write_whole(target / "steps.csv", rows.getvalue().encode())

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for result in results:
        (line,) = axes.plot(result.seconds, _smooth(result.losses), label=result.spec)
        axes.plot(result.seconds, result.losses, color=line.get_color(), alpha=0.2, linewidth=0.8)
    axes.set(xlabel="seconds of training", yscale="log", title=title)
    axes.set_ylabel(f"training loss; thick: running mean, about {_MEAN_STEPS} steps")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    pyplot.close(figure)
    plot = target / "loss.png"
    write_whole(plot, image.getvalue())
    return plot


def _smooth(losses: Sequence[float]) -> list[float]:
    """Return the running mean of the losses. Losses of single batches vary too much to compare."""
    smoothed, average, weight = [], 0.0, 1 - 1 / _MEAN_STEPS
    for step, loss in enumerate(losses, start=1):
        average = weight * average + (1 - weight) * loss
        smoothed.append(average / (1 - weight**step))
    return smoothed
