"""Descent by rows: Adam's where a row is one weight, and of one pace within a row."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecomp.pytorch.descent import Descent, Paced


def followed(
    shape: tuple[int, ...], gradients: list[torch.Tensor], rates: list[float], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Where zeros of a shape get to by these gradients, at these shares of a rate of 0.1."""
    x = torch.zeros(shape, requires_grad=True)
    descent = Descent([Paced(tensors={"x": x}, rate=0.1, masks={} if mask is None else {"x": mask})])
    for i, (gradient, share) in enumerate(zip(gradients, rates, strict=True)):
        descent.forget_gradients()
        x.grad = gradient.clone()
        descent.update(i, share)
    return x.detach()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 8))
def test_rows_of_one_weight_move_as_by_adam(seed: int, n: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(5, 1, generator=rng) for _ in range(n)]
    shares = torch.rand(n, generator=rng).tolist()
    x = torch.zeros(5, 1, requires_grad=True)
    adam = torch.optim.Adam([x], betas=(0.9, 0.99), eps=1e-12)
    for gradient, share in zip(gradients, shares, strict=True):
        adam.param_groups[0]["lr"] = 0.1 * share
        x.grad = gradient.clone()
        adam.step()
    torch.testing.assert_close(followed((5, 1), gradients, shares), x.detach())


def test_within_a_row_weights_move_in_proportion_to_their_gradients() -> None:
    gradient = torch.tensor([[[4.0], [0.0], [-1.0], [1.0]], [[0.004], [0.0], [-0.001], [0.001]]])
    found = followed((2, 4, 1), [gradient] * 3, [1.0, 0.5, 0.25]).numpy()
    # Three times the same gradient: each update is the gradient over the root mean square of its row.
    wanted = -0.1 * 1.75 * gradient[0].numpy() / np.sqrt(18 / 4)
    np.testing.assert_allclose(found, [wanted, wanted], rtol=1e-5)


def test_a_vector_is_one_row_and_what_has_no_gradient_stays() -> None:
    found = followed((3,), [torch.tensor([3.0, 0.0, 0.0])], [1.0])
    np.testing.assert_allclose(found.numpy(), [-0.1 * np.sqrt(3), 0, 0], rtol=1e-6)
    assert not followed((2, 3), [torch.zeros(2, 3)] * 2, [1.0, 1.0]).any()
    x = torch.zeros(2, 2, requires_grad=True)
    Descent([Paced(tensors={"x": x}, rate=0.1)]).update(0, 1.0)
    assert not x.detach().any()


def test_masked_weights_do_not_hasten_those_that_are_left() -> None:
    rng = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, False, True, False, False, False], [False] * 6])
    gradients = [torch.randn(2, 6, generator=rng) * mask for _ in range(4)]
    found = followed((2, 6), gradients, [1.0] * 4, mask)
    alone = followed((1, 2), [gradient[:1, ::2][:, :2] for gradient in gradients], [1.0] * 4)
    torch.testing.assert_close(found[:1, [0, 2]], alone)
    assert not found[~mask].any()
