"""Round the weights of one layer so that what it gives changes least: column by column, errors passed on.

A column is rounded, and its error is pushed into the columns not rounded yet by the inverse of H = sum x x^T over what
the layer reads (optimal brain surgeon: Hassibi and Stork 1993; Frantar et al., GPTQ, arXiv 2210.17323). With U the
upper Cholesky factor of H^-1, rounding column j of a row by e_j adds e_j^2 / U_jj^2 to the squared error of the output.
A weight that is to be 0 is rounded to 0, and its error is passed on like any other (Frantar and Alistarh, SparseGPT,
arXiv 2301.00774).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecomp import quantmath
from edgecomp.graph import Array, Node, Op
from edgecomp.ops import ints

_DAMPING = 0.01
_RIDGE = 0.5
_POSITIONS = 16
_BLOCK = 64
_CLIP_STEPS = 24
_COLUMN_BYTES = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Basis:
    """What the inputs of a layer tell about rounding its weights, d inputs of one output value.

    Attributes:
        energy: float32 (d,): sum of squares of each input.
        order: int64 (d,): the columns in the order in which they are rounded, most energy first.
        upper: float32 (d, d): U, rows and columns in that order.
    """

    energy: Tensor
    order: Tensor
    upper: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounded:
    """Weights on a grid.

    Attributes:
        codes: int8 (O, d).
        scale: float32 (O,): weight = code * scale.
        error: float64 (O,): what rounding adds to the sum of squared errors of each output channel.
    """

    codes: Array
    scale: Array
    error: Array


def enough(node: Node, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Give as many batches as it takes to know H well: _POSITIONS positions for each input of one output value.

    Args:
        node: conv2d or linear.
        inputs: what it reads, (N, C, H, W) or (N, F) each.
        weight: of the node.
    """
    wanted = _POSITIONS * weight[0].numel()
    strides = ints(node.attrs, "stride") if node.op is Op.CONV2D else ()
    positions = np.prod([size / stride for size, stride in zip(inputs[0].shape[2:], strides, strict=True)])
    n_images = 0
    for count, x in enumerate(inputs):
        if n_images * positions >= wanted:
            return inputs[:count]
        n_images += len(x)
    return inputs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Sums over images and positions, d inputs of one output value.

    Attributes:
        energy: float32 (d, d): sum x x^T.
        cross: float32 (O, d): sum e x^T, with e what was asked of the outputs; None where nothing was.
    """

    energy: Tensor
    cross: Tensor | None


def moments(
    node: Node, inputs: list[Tensor], group: int, groups: int, weight: Tensor, errors: list[Tensor] | None = None
) -> Moments:
    """Sum x x^T, and e x^T where errors are given.

    Args:
        node: conv2d or linear.
        inputs: what it reads, (N, C, H, W) or (N, F) each.
        group: number of the group of channels.
        groups: how many there are.
        weight: of the node, for its shape.
        errors: of the node's outputs, (N, O, OH, OW) or (N, O) each; of one group only.
    """
    d = weight[0].numel()
    h = torch.zeros(d, d)
    cross = None if errors is None else torch.zeros(len(weight), d)
    for number, x in enumerate(inputs):
        e = None if errors is None else errors[number]
        if node.op is Op.LINEAR:
            h.addmm_(x.T, x)
            if e is not None and cross is not None:
                cross.addmm_(e.T, x)
            continue
        top, left, bottom, right = ints(node.attrs, "pads")
        channels = x.shape[1] // groups
        part = F.pad(x[:, group * channels : (group + 1) * channels], (left, right, top, bottom))
        _, _, height, width = part.shape
        step = max(1, _COLUMN_BYTES // (4 * d * height * width))
        for start in range(0, len(part), step):
            columns = F.unfold(
                part[start : start + step],
                weight.shape[2:],
                dilation=ints(node.attrs, "dilation"),
                stride=ints(node.attrs, "stride"),
            )
            flat = columns.transpose(1, 2).reshape(-1, d)
            h.addmm_(flat.T, flat)
            if e is not None and cross is not None:
                rows = e[start : start + step].flatten(2).transpose(1, 2).reshape(-1, len(weight))
                cross.addmm_(rows.T, flat)
    return Moments(energy=h, cross=cross)


def corrected(rows: Tensor, found: Moments) -> Tensor:
    """Give weights (O, d) that undo as much of the outputs' error as the inputs explain: ridge regression.

    W + E X^T (X X^T + r I)^-1, with r half the mean of the diagonal: inputs are few beside the weights they decide on.
    """
    if found.cross is None:
        return rows
    h = found.energy.clone()
    h.diagonal().add_(max(_RIDGE * float(h.diagonal().mean()), 1e-12))
    return rows + torch.cholesky_solve(found.cross.T, torch.linalg.cholesky(h)).T


def basis(h: Tensor) -> Basis:
    """Factor the inverse of H (d, d); a diagonal of 1 % of its mean is added, inputs that are always 0 get a 1."""
    energy = h.diagonal().clone()
    order = torch.argsort(energy, descending=True, stable=True)
    h = h[order][:, order]
    silent = energy[order] == 0
    h.diagonal()[silent] = 1
    h.diagonal().add_(_DAMPING * (float(energy[energy > 0].mean()) if bool((~silent).any()) else 1.0))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return Basis(energy=energy, order=order, upper=upper.float())


def choose_scale(rows: Tensor, energy: Tensor, bits: int) -> Tensor:
    """Choose each row's scale (O,) for weights (O, d): the least squared error weighted by input energy (d,)."""
    peak = rows.abs().amax(dim=1)
    base = torch.where(peak > 0, peak, torch.ones_like(peak)) / quantmath.weight_limit(bits)
    best, best_error = base.clone(), torch.full_like(base, torch.inf)
    for share in np.linspace(1.0, quantmath.CLIP_FLOOR[bits], _CLIP_STEPS):
        scale = base * float(share)
        error = ((round_nearest(rows, scale, bits) - rows).square_() @ energy[:, None])[:, 0]
        better = error < best_error
        best[better], best_error[better] = scale[better], error[better]
    return best


def round_columns(rows: Tensor, inputs: Basis, scale: Tensor, bits: int, mask: Tensor | None = None) -> Rounded:
    """Round weights (O, d) to multiples of each row's scale (O,); those of inputs that are always 0 become 0.

    Args:
        rows: weights.
        inputs: of the layer.
        scale: of each row.
        bits: of a code.
        mask: bool (O, d), False where the code is to be 0; None for everywhere True.
    """
    step, limit = scale.numpy(), np.float32(quantmath.weight_limit(bits))

    def nearest(column: Array) -> Array:
        return np.asarray(np.clip(np.rint(column / step), -limit, limit) * step)

    values, error = _by_columns(rows, inputs, nearest, mask)
    return Rounded(codes=np.rint(values / step[:, None]).astype(np.int8), scale=step, error=error)


def prune_columns(rows: Tensor, inputs: Basis, mask: Tensor) -> Tensor:
    """Set weights (O, d) to 0 where the mask bool (O, d) is False, and have those that remain make up for it."""
    values, _ = _by_columns(rows, inputs, lambda column: column, mask)
    return torch.from_numpy(values)


def _by_columns(
    rows: Tensor, inputs: Basis, rounded: Callable[[Array], Array], mask: Tensor | None
) -> tuple[Array, Array]:
    """Replace column after column (O,) by what it is rounded to: the values float32 (O, d), and `Rounded.error`."""
    rows = rows.clone()
    rows[:, inputs.energy == 0] = 0
    left = rows[:, inputs.order].T.contiguous()
    kept = None if mask is None else mask[:, inputs.order].T.contiguous().numpy()
    values = np.empty(left.shape, dtype=np.float32)
    error = np.zeros(len(rows))
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        factors = inputs.upper[start:stop, start:stop].numpy()
        # In numpy: the pieces are too small for torch's threads, which would wait for each other longer than they work.
        block = left[start:stop].numpy()
        errors = np.empty_like(block)
        for j in range(stop - start):
            value = rounded(block[j])
            if kept is not None:
                value = value * kept[start + j]
            errors[j] = (block[j] - value) / factors[j, j]
            block[j + 1 :] -= factors[j, j + 1 :, None] * errors[j]
            values[start + j] = value
        error += np.einsum("jo,jo->o", errors, errors, dtype=np.float64)
        if stop < len(left):
            left[stop:].addmm_(inputs.upper[start:stop, stop:].T, torch.from_numpy(errors), alpha=-1)
    found = np.empty_like(values)
    found[inputs.order.numpy()] = values
    return np.ascontiguousarray(found.T), error


def round_nearest(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round weights (O, d) to the nearest multiples of each row's scale (O,) that `bits` bits can hold."""
    limit = quantmath.weight_limit(bits)
    return torch.clamp(torch.round(rows / scale[:, None]), -limit, limit) * scale[:, None]
