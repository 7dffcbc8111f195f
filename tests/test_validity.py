"""A run that was throttled, swapped or drifted is told apart from one that counts."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from edgecomp.benchmarks.environment import state
from edgecomp.benchmarks.harness import Timing, measure
from edgecomp.benchmarks.validity import why_not_valid
from tests.test_bench import MS, Clock, machine

CALM = {"throttle_flags": 0, "throttle_count": 7, "swapped_pages": 40}
UNKNOWN = dict.fromkeys(CALM)


def timing(medians: list[float], *, steady: bool = True) -> Timing:
    samples = tuple(np.repeat(medians, 3).tolist())
    return Timing(warmups=9, steady=steady, rounds=len(medians), samples_us=samples)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (CALM, CALM, None),
        (UNKNOWN, UNKNOWN, None),
        (CALM, UNKNOWN, None),
        ({**CALM, "throttle_flags": 0x50000}, {**CALM, "throttle_flags": 0x50000}, None),  # long ago
        (CALM, {**CALM, "throttle_flags": 0x4}, "throttled: the board's firmware reports throttled"),
        ({**CALM, "throttle_flags": 0x3}, CALM, "reports under-voltage, clock capped"),
        (CALM, {**CALM, "throttle_flags": 0x80000}, "reports soft temperature limit"),  # for a moment in between
        (CALM, {**CALM, "throttle_count": 9}, "throttled: 2 times because of heat"),
        (CALM, {**CALM, "swapped_pages": 41}, "swapped: 1 pages went to or came from swap"),
    ],
)
def test_what_the_machine_says(before, after, reason):
    found = why_not_valid(before, after, {"a": timing([100.0] * 9)})
    assert (found == []) if reason is None else (len(found) == 1 and reason in found[0])


@pytest.mark.parametrize(
    ("medians", "reason"),
    [
        ([100.0] * 9, None),
        ([100.0, 100, 100, 100, 100, 100, 104, 104, 104], None),
        ([100.0, 100, 100, 100, 100, 100, 106, 106, 106], "drifted: a took 100.0 us at first and 106.0 us at last"),
        ([106.0, 106, 106, 100, 100, 100, 90, 90, 90], "drifted: a took 106.0 us at first and 90.0 us at last"),
        ([100.0, 100, 100, 900, 900, 900, 100, 100, 100], None),  # a neighbour in between: the percentiles tell
        ([100.0, 900, 100, 100, 900], None),
    ],
)
def test_what_the_samples_say(medians, reason):
    assert why_not_valid(CALM, CALM, {"a": timing(medians)}) == ([] if reason is None else [reason])


def test_a_warm_up_that_never_settled():
    (reason,) = why_not_valid(CALM, CALM, {"a": timing([1.0] * 9), "b": timing([1.0] * 9, steady=False)})
    assert reason == "drifted: b had not settled when its warm-up was over"


def test_the_state_of_a_raspberry_pi(tmp_path):
    files = {
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000\n",
        "sys/class/thermal/thermal_zone0/temp": "81200\n",
        "proc/vmstat": "nr_free_pages 1\npswpin 3\npswpout 4\n",
    }
    assert state(machine(tmp_path, files)) == {
        "governor": "performance",
        "frequency_mhz": 600.0,
        "temperature_c": 81.2,
        "throttle_flags": 0x50005,
        "throttle_count": None,
        "swapped_pages": 7,
    }


def test_flags_from_vcgencmd_and_counts_of_x86(tmp_path):
    program = tmp_path / "usr/bin/vcgencmd"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0xe0008\n')
    program.chmod(0o755)
    for core, count in enumerate((2, 3)):
        path = f"sys/devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count"
        machine(tmp_path, {path: f"{count}\n"})
    found = state(tmp_path)
    assert (found["throttle_flags"], found["throttle_count"]) == (0xE0008, 5)
    program.write_text("#!/bin/sh\nexit 1\n")
    assert state(tmp_path)["throttle_flags"] is None


def test_counts_that_were_asked_for():
    clock = Clock()
    timing = measure({"a": clock.body("a", 10 * MS)}, clock=clock, rng=Random(0), min_s=0.0, rounds=1, samples=41)["a"]
    assert (timing.rounds, len(timing.samples_us)) == (21, 42)  # two a turn of 20 ms
    clock = Clock()
    timing = measure({"a": clock.body("a", MS)}, clock=clock, rng=Random(0), min_s=0.0, warmup_runs=1000)["a"]
    assert 1000 <= timing.warmups < 1050
    assert timing.steady
