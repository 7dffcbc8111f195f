"""Accuracy against bytes, one line for each method, as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence

from edgecomp.errors import TargetError, UsageError

from .results import Source
from .table import FLOAT, Row

MARKERS = "osD^vP*X<>hp"
TICKS = (1, 1.5, 2, 3, 4, 5, 7)
FRAME_POINTS = 12
"""The plot shows this many points of accuracy below the float network; one collapsed network would flatten the rest."""


def check_matplotlib() -> None:
    """Make sure that a plot can be drawn; to be asked before long work.

    Raises:
        TargetError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise TargetError("plot: matplotlib is not installed: pip install 'edgecomp[compare]'") from error


def svg(rows: Sequence[Row], title: str) -> bytes:
    """Draw rows: bytes on a logarithmic axis, mean accuracy with its spread as a bar, the float network as a line.

    Simulated methods are drawn hollow with dashes. What lies far below the best is left out of the frame and counted in
    the legend. The same rows give the same bytes.

    Raises:
        TargetError: matplotlib is not installed.
        UsageError: no rows.
    """
    if not rows:
        raise UsageError("plot: no results to draw; run some first")
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    # Text stays text; without a salt the identifiers inside would differ from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "edgecomp"}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        floor = max(row.mean_accuracy() for row in rows) - FRAME_POINTS
        for place, name in enumerate(dict.fromkeys(row.method for row in rows)):
            own = [row for row in rows if row.method == name]
            if name == FLOAT:
                axes.axhline(own[0].mean_accuracy(), color="0.4", linewidth=1, linestyle=":", label=FLOAT)
                continue
            simulated = own[0].results[0].source is Source.SIMULATED
            label = name + (", simulated" if simulated else "")
            below = sum(row.mean_accuracy() < floor for row in own)
            axes.errorbar(
                [row.mean_bytes() for row in own],
                [row.mean_accuracy() for row in own],
                xerr=[row.spread_bytes() or 0.0 for row in own],
                yerr=[row.spread_accuracy() or 0.0 for row in own],
                marker=MARKERS[place % len(MARKERS)],
                markerfacecolor="none" if simulated else None,
                linestyle="--" if simulated else "-",
                linewidth=1,
                capsize=2,
                label=f"{label} ({below} below the frame)" if below else label,
            )
        axes.set_xscale("log")
        axes.set_ylim(bottom=max(floor, axes.get_ylim()[0]))
        axes.xaxis.set_major_locator(LogLocator(subs=TICKS))
        axes.xaxis.set_major_formatter(lambda value, _: _size(value))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("bytes")
        axes.set_ylabel("accuracy, %")
        axes.set_title(title)
        axes.tick_params(labelsize="small")
        axes.grid(visible=True, linewidth=0.3)
        axes.legend(fontsize="small")
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:g} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:g} kB"
