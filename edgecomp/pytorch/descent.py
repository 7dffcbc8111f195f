"""Gradient descent for weights in units of a step: as far as matters, within a row of them in proportion to gradients.

Adam gives every weight the same pace, whether its gradient says anything or not. Most weights of a compressed network
are 0, and their gradients are mostly noise: at one pace for all they wander over the border of their code, ever more
take bits, and what drives them back undoes what was learnt. Here the second moment is one for a row, the weights of an
output channel: few move, those by which the loss falls (cf. Adam-mini, arXiv 2406.16793).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_BETA_MEAN, _BETA_SQUARE = 0.9, 0.99
_LEAST = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Paced:
    """Tensors that move at one rate.

    Attributes:
        tensors: leaves that require gradients, by name; rows (O, ...), a vector is one row.
        rate: how far a weight of the root mean square gradient of its row goes in the first update.
        masks: bool, of the shape of a tensor, by its name: where False nothing moves, and nothing counts in the root
            mean square, or the fewer weights of a row are left the faster they would go.
    """

    tensors: dict[str, Tensor]
    rate: float
    masks: Mapping[str, Tensor] = field(default_factory=dict)


class Descent:
    """Adam (arXiv 1412.6980) with one second moment for a row, without its epsilon where that would matter.

    Attributes:
        moments: by names of the tensors with " mean" and " square" behind: the state but for the number of updates.
    """

    def __init__(self, groups: Sequence[Paced]) -> None:
        self._groups = groups
        self.moments: dict[str, Tensor] = {}
        for group in groups:
            for name, tensor in group.tensors.items():
                self.moments[f"{name} mean"] = torch.zeros_like(tensor)
                self.moments[f"{name} square"] = _row_means(torch.zeros_like(tensor))

    def tensors(self) -> dict[str, Tensor]:
        """Give what moves."""
        return {name: tensor for group in self._groups for name, tensor in group.tensors.items()}

    def forget_gradients(self) -> None:
        """Drop all gradients."""
        for tensor in self.tensors().values():
            tensor.grad = None

    @torch.no_grad()
    def update(self, n_before: int, share: float) -> None:
        """Move along the gradients.

        Args:
            n_before: updates before this one.
            share: of each rate.
        """
        for group in self._groups:
            for name, tensor in group.tensors.items():
                if tensor.grad is None:
                    continue
                mean, square = self.moments[f"{name} mean"], self.moments[f"{name} square"]
                mean.lerp_(tensor.grad, 1 - _BETA_MEAN)
                mask = group.masks.get(name)
                squares = _row_means(tensor.grad.square())
                if mask is not None:
                    squares /= _row_means(mask.to(squares)).clamp_(min=1 / tensor[0].numel())
                square.lerp_(squares, 1 - _BETA_SQUARE)
                root = (square / (1 - _BETA_SQUARE ** (n_before + 1))).sqrt_().add_(_LEAST)
                pace = share * group.rate / (1 - _BETA_MEAN ** (n_before + 1))
                tensor.addcdiv_(mean, root, value=-pace)


def _row_means(values: Tensor) -> Tensor:
    """Give the means of rows (O, ...) as (O, 1, ...), of a vector (O,) as (1,)."""
    if values.ndim == 1:
        return values.mean(dim=0, keepdim=True)
    return values.flatten(1).mean(dim=1).reshape(-1, *[1] * (values.ndim - 1))
