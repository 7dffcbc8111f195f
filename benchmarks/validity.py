"""Whether a run counts: not where the machine was throttled, moved memory to swap, or changed its speed meanwhile."""

from __future__ import annotations

from collections.abc import Mapping

from edgecomp.report import Fact

from .harness import MIN_ROUNDS, Timing, median, medians

DRIFT = 0.05
"""So much may the median of the last third of the rounds be away from that of the first third."""

_FLAGS = ("under-voltage", "clock capped", "throttled", "soft temperature limit")
"""Bits 0-3 of the Raspberry Pi's flags; 16 higher: so it was at any time since the board was switched on."""


def why_not_valid(before: Mapping[str, Fact], after: Mapping[str, Fact], timings: Mapping[str, Timing]) -> list[str]:
    """Say what spoilt a run, a line for each reason; none where nothing is known to have.

    Args:
        before: the machine's state, see `environment.state`; what is None was not known.
        after: the same, when the run was over.
        timings: what was measured, by label.
    """
    reasons = []
    flags, flags_after = (_whole(facts, "throttle_flags") or 0 for facts in (before, after))
    # Set at one of the borders, or for the first time since power-on in between.
    seen = (flags | flags_after | (flags_after & ~flags) >> 16) & 0xF
    if seen:
        names = ", ".join(name for bit, name in enumerate(_FLAGS) if seen >> bit & 1)
        reasons.append(f"throttled: the board's firmware reports {names}")
    if (times := _rise(before, after, "throttle_count")) > 0:
        reasons.append(f"throttled: {times} times because of heat")
    if (pages := _rise(before, after, "swapped_pages")) > 0:
        reasons.append(f"swapped: {pages} pages went to or came from swap")
    for label, timing in timings.items():
        if not timing.steady:
            reasons.append(f"drifted: {label} had not settled when its warm-up was over")
        if timing.rounds >= MIN_ROUNDS:
            each = medians(timing)
            third = max(2, timing.rounds // 3)
            first, last = median(each[:third].tolist()), median(each[-third:].tolist())
            if abs(last - first) > DRIFT * max(first, 1e-3):
                reasons.append(f"drifted: {label} took {first:.1f} us at first and {last:.1f} us at last")
    return reasons


def _whole(facts: Mapping[str, Fact], name: str) -> int | None:
    value = facts.get(name)
    return value if isinstance(value, int) else None


def _rise(before: Mapping[str, Fact], after: Mapping[str, Fact], name: str) -> int:
    first, last = _whole(before, name), _whole(after, name)
    return 0 if first is None or last is None else last - first
