"""Views of images, mirrored and shifted: what a network is asked when it must not answer by heart.

A network that was trained on images has seen them all, and its answers to them tell little. No label is asked for, so a
view need not look like anything: whatever the float network answers is what is wanted (Beyer et al. 2022,
arXiv 2106.05237: a teacher must be asked about the very view that the student sees).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp.graph import Array

_SHIFT_PART = 8
"""A view is shifted by at most this part of a side, each way."""


def draw_views(n: int, height: int, width: int, rng: np.random.Generator) -> Array:
    """Draw n views of images of this size: int64 (n, 3) of mirrored (0 or 1), rows and columns of the shift."""
    reach = _reach(height, width)
    return np.stack([rng.integers(0, 2, n), *(rng.integers(-r, r + 1, n) for r in reach)], axis=1)


def look(x: Tensor, views: Array) -> Tensor:
    """Show images (N, C, H, W) as these views (N, 3) of them; the border is repeated into what a shift leaves open."""
    height, width = x.shape[2:]
    down, right = _reach(height, width)
    wide = F.pad(x, (right, right, down, down), mode="replicate")
    found = torch.empty_like(x)
    for i, (mirrored, rows, columns) in enumerate(views.tolist()):
        top, left = down - rows, right - columns
        seen = wide[i, :, top : top + height, left : left + width]
        found[i] = seen.flip(2) if mirrored else seen
    return found


def _reach(height: int, width: int) -> tuple[int, int]:
    return height // _SHIFT_PART, width // _SHIFT_PART
