"""Views against numpy indexing, one image at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgecomp.pytorch.views import draw_views, look


@pytest.mark.parametrize("shape", [(5, 3, 16, 24), (3, 1, 7, 40), (1, 2, 1, 1)])
def test_a_view_is_the_image_moved_and_turned(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=shape).astype(np.float32)
    n, _, height, width = shape
    views = draw_views(n, height, width, np.random.default_rng(4))
    found = look(torch.from_numpy(x), views).numpy()
    for image, (mirrored, rows, columns), seen in zip(x, views, found, strict=True):
        source_rows = np.clip(np.arange(height) - rows, 0, height - 1)
        source_columns = np.clip(np.arange(width) - columns, 0, width - 1)
        wanted = image[:, source_rows][:, :, source_columns]
        assert np.array_equal(seen, wanted[:, :, ::-1] if mirrored else wanted)


def test_views_reach_everywhere_and_follow_their_seed() -> None:
    views = draw_views(4000, 32, 16, np.random.default_rng(0))
    assert np.array_equal(views, draw_views(4000, 32, 16, np.random.default_rng(0)))
    assert [sorted(set(views[:, i].tolist())) for i in range(3)] == [
        [0, 1], list(range(-4, 5)), list(range(-2, 3))
    ]  # fmt: skip
    assert not draw_views(9, 7, 7, np.random.default_rng(0))[:, 1:].any()
