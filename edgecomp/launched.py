"""Which of torchrun's processes this is: what it says in the environment of each, read without torch.

The one place that looks there: before torch is loaded nobody else can tell who may print and write.
"""

from __future__ import annotations

import os


def place() -> tuple[int, int]:
    """Give this process's number and how many torchrun started; (0, 1) without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def place_on_machine() -> int:
    """Give this process's number among those on this machine; 0 without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def is_first() -> bool:
    """Tell whether this is the process that prints and writes."""
    return place()[0] == 0
