"""What is made of comparisons: a plot as SVG, and whether a model has become slower than it was or than another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from edgecomp.artifact import FILES
from edgecomp.benching import YARDSTICKS, stands_alone
from edgecomp.bundle import GRAPH_FILE
from edgecomp.errors import BudgetError, BundleError, UsageError
from edgecomp.files import MANIFEST, PLAN_FILE, check_new_file
from edgecomp.folder import read_file
from edgecomp.report import Comparison, Ratio, Source

_ROW, _LEFT, _WIDTH, _RIGHT = 26, 260, 420, 190


def plot(comparisons: Sequence[Comparison], titles: Sequence[str]) -> str:
    """Draw time divided by the baseline's, a bar for each model with its 95 % interval, as SVG text.

    Raises:
        UsageError: nothing was measured.
    """
    if not any(c.ratios for c in comparisons):
        raise UsageError("nothing to plot: expected models that were measured side by side")
    most = max(r.high for c in comparisons for r in (*c.ratios.values(), _ONE)) * 1.05
    lines, y = [], 10
    for comparison, title in zip(comparisons, titles, strict=True):
        y += _ROW
        lines.append(f'<text x="10" y="{y}" font-weight="bold">{escape(title)}</text>')
        for report in comparison.reports:
            ratio = comparison.ratios.get(report.label)
            if ratio is None and report.label != comparison.baseline:
                continue
            y += _ROW
            lines += _bar(report.label, report.p50_us, _ONE if ratio is None else ratio, y, most)
        y += _ROW // 2
    width, height = _LEFT + _WIDTH + _RIGHT, y + _ROW
    size = f'width="{width}" height="{height}" font-family="sans-serif" font-size="13"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    x = _at(1.0, most)
    rule = f'<line x1="{x}" y1="14" x2="{x}" y2="{y}" stroke="#888" stroke-dasharray="3 3"/>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', rule, *lines, "</svg>", ""])


_ONE = Ratio(median=1.0, low=1.0, high=1.0)


def _at(ratio: float, most: float) -> str:
    return f"{_LEFT + _WIDTH * ratio / most:.1f}"


def _bar(label: str, p50_us: float | None, ratio: Ratio, y: int, most: float) -> list[str]:
    low, middle, high = (_at(r, most) for r in (ratio.low, ratio.median, ratio.high))
    length = f"{_WIDTH * ratio.median / most:.1f}"
    ms = "" if p50_us is None else f", p50 {p50_us / 1e3:.3f} ms"
    return [
        f'<text x="{_LEFT - 8}" y="{y}" text-anchor="end">{escape(label[-36:])}</text>',
        f'<rect x="{_LEFT}" y="{y - 13}" width="{length}" height="16" fill="#5b8db8"/>',
        f'<line x1="{low}" y1="{y - 5}" x2="{high}" y2="{y - 5}" stroke="black" stroke-width="2"/>',
        f'<text x="{float(max(middle, high, key=float)) + 6:.1f}" y="{y}">{ratio.median:.3f}{ms}</text>',
    ]


def check_asked(
    paths: Sequence[Path],
    kind: str,
    *,
    svg: Path | None,
    force: bool,
    percent: float | None,
    baseline: Path | None,
) -> list[Comparison] | None:
    """Refuse what could not be done with the measurements, before there are any; give the stored comparisons.

    Args:
        paths: what is to be measured.
        kind: where, see `devices.kind_of`.
        svg: where the plot is to be written.
        force: whether a file may be replaced by it.
        percent: of `--fail-if-slower`.
        baseline: the file of stored comparisons.

    Raises:
        BundleError: the baseline is something else.
        UsageError: what cannot be done.
    """
    if baseline is not None and percent is None:
        raise UsageError("--baseline is for --fail-if-slower P; add it")
    if kind in ("emulated", "core") and percent is not None:
        raise UsageError(_NO_TIMES)
    if kind in ("emulated", "core") and svg is not None:
        raise UsageError("--svg is a plot of times that were measured; an emulator has none")
    if force and svg is None:
        raise UsageError("--force is of --svg, which is not given")
    if svg is not None:
        for path in (*paths, *([] if baseline is None else [baseline])):
            if _holds(path, svg):
                raise UsageError(f"--svg {svg}: is {path} or a file that belongs to it; choose another --svg")
    before = None if baseline is None else read_baseline(baseline)
    if spoilt := [why for each in before or () for report in each.reports[:1] for why in report.not_valid]:
        raise UsageError(f"--baseline {baseline}: is of a run that was not valid: {spoilt[0]}; measure it again")
    if len(paths) == 1 and stands_alone(paths[0]):
        if svg is not None:
            raise UsageError(f"nothing to plot: {paths[0]} stands alone; expected models to measure side by side")
        if percent is not None and before is None:
            raise UsageError(_NOTHING)
    if len(paths) > 1 and before is not None and stands_alone(paths[0]):
        _check_first(str(paths[0]), before)
    if svg is not None:
        check_new_file(svg, "--svg", force=force)
    return before


_BUILT = {MANIFEST, PLAN_FILE, GRAPH_FILE, *(name for names in FILES.values() for name in names)}
_NO_TIMES = "--fail-if-slower is about times that were measured; an emulator has none"
_NOTHING = "--fail-if-slower: nothing to compare with; expected several models, or their --baseline"


def _holds(path: Path, file: Path) -> bool:
    if not file.exists() or not path.exists():
        return False
    folder = path if path.is_dir() else path.parent
    return path.samefile(file) or (file.name in _BUILT and file.parent.samefile(folder))


def _check_first(label: str, before: Sequence[Comparison]) -> None:
    """Refuse stored ratios to another model."""
    firsts = list(dict.fromkeys(each.baseline for each in before))
    if label not in firsts:
        then = " and ".join(firsts)
        raise UsageError(f"--baseline: its ratios are to {then}, here the first is {label}; give that one first")


def read_baseline(path: Path) -> list[Comparison]:
    """Read what `edgecomp bench --json` wrote.

    Raises:
        BundleError: it is something else.
    """
    try:
        found = json.loads(read_file(path))
    except BundleError as e:
        raise BundleError(f"{e}; expected what edgecomp bench --json wrote") from e
    except (ValueError, RecursionError) as e:
        reason = "is not JSON"
        raise BundleError(f"{path}: {reason}; expected what edgecomp bench --json wrote") from e
    if not isinstance(found, list) or not found:
        raise BundleError(f"{path}: expected a list of comparisons, as edgecomp bench --json writes")
    return [Comparison.from_json(json.dumps(each), str(path)) for each in found]


def check_not_slower(now: Sequence[Comparison], before: Sequence[Comparison] | None, percent: float) -> None:
    """Fail where a model is surely slower than is allowed: even the near end of its interval is above the limit.

    What the user did not build is compared with, and not judged; no more is what a run says that is not valid.

    Args:
        now: what was measured.
        before: stored comparisons. What is compared is the ratio to the baseline of its own run, so that another
            machine's load or clock does not count; without ratios, p50 on the same target. None: each model with the
            baseline that it took turns with.
        percent: how much slower is allowed.

    Raises:
        BudgetError: a model is slower; all of them are named.
        UsageError: nothing can be compared, or what was not measured.
    """
    lines, compared = [], 0
    for comparison in now:
        if any(r.source is not Source.MEASURED for r in comparison.reports):
            raise UsageError(_NO_TIMES)
        for report in comparison.reports:
            if report.label in YARDSTICKS:
                continue
            for what, low, limit in _pairs(comparison, report.label, before):
                compared += 1
                if low > limit * (1 + percent / 100) and not report.not_valid:
                    where = f" ({report.runtime}, {report.target})" if len(now) > 1 else ""
                    lines.append(f"{report.label}{where}: {what} {low / limit - 1:+.1%}")
    if not compared and before is None:
        raise UsageError(_NOTHING)
    if not compared:
        for comparison in now:
            if comparison.ratios:
                _check_first(comparison.baseline, before or ())
        what = "name, target, runtime and threads"
        raise UsageError(f"--fail-if-slower: nothing to compare with; --baseline has no model of the same {what}")
    if lines:
        raise BudgetError(f"slower by more than {percent:g} %: {'; '.join(lines)}")


def _pairs(
    comparison: Comparison, label: str, before: Sequence[Comparison] | None
) -> list[tuple[str, float, float]]:
    """Give what is compared for a model: its name, the low end of what is now, what was."""
    ratio = comparison.ratios.get(label)
    if before is None:
        return [] if ratio is None else [(f"than {comparison.baseline}", ratio.low, 1.0)]
    (report,) = (r for r in comparison.reports if r.label == label)
    found = []
    for old in before:
        for then in (r for r in old.reports if r.label == label):
            if (then.target, then.runtime, then.threads) != (report.target, report.runtime, report.threads):
                continue
            if ratio is not None and label in old.ratios and old.baseline == comparison.baseline:
                found.append((f"beside {old.baseline}, than before", ratio.low, old.ratios[label].median))
            elif len(comparison.reports) == 1 and report.p50_us and then.p50_us:
                found.append(("than before", report.p50_us, then.p50_us))
    return found
