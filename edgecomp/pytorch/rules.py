"""How a layer shares the relevance of its output out among its inputs, and which layer of a network does it how.

A rule is a sum of terms. Term k is the layer's own map with an input a_k and weights w_k put in their place; J_k is its
Jacobian. With stab(z) = z + epsilon * sign(z), sign(0) = 1, and x+ = max(x, 0), x- = min(x, 0):

    R_in = sum_k a_k * J_k^T s_k

    Epsilon     a, w                          s = R_out / stab(z)
    Gamma       a+, w + g w+ and a-, w + g w- s = [z > 0] R_out / stab(sum of the two)
                a+, w + g w- and a-, w + g w+ s = [z < 0] R_out / stab(sum of the two)
    ZPlus       a+, w+       and a-, w-       s = R_out / stab(sum of the two)
    AlphaBeta   a+, w+       and a-, w-       s = alpha R_out / stab(sum of the two)
                a+, w-       and a-, w+       s = -beta R_out / stab(sum of the two)
    Flat        1, 1                          s = R_out / stab(z)
    WSquare     1, w^2                        s = R_out / stab(z)

A bias is treated as a weight of the input 1 and keeps its share; Flat and WSquare leave it out, which makes them
conserve relevance. Sources: Epsilon and AlphaBeta, Bach et al. 2015; ZPlus and WSquare, Montavon et al. 2017; Gamma,
Montavon et al. 2019, for inputs of both signs by Andeol et al. 2021; Flat, Lapuschkin et al. 2019.

Not here: what the other operators do, and the walk through the network (`propagate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgecomp.errors import UsageError
from edgecomp.graph import Graph, Node, Op
from edgecomp.pytorch.network import compute

# ---- rules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Epsilon:
    """In proportion to each input's share of z; what epsilon takes is lost. First-order Taylor for small epsilon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma:
    """As Epsilon, with the weights that agree with the sign of z made larger by a factor 1 + gamma.

    Raises:
        UsageError: gamma is negative or not finite.
    """

    gamma: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise UsageError(f"gamma is {self.gamma}, expected a number of 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZPlus:
    """In proportion to the positive contributions alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlphaBeta:
    """alpha times in proportion to the positive contributions, minus beta times to the negative ones.

    An output without any negative contribution has nothing to take beta from: it gives alpha times its relevance.

    Raises:
        UsageError: beta is negative or not finite, or alpha is not 1 + beta.
    """

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf or self.alpha - self.beta != 1:
            raise UsageError(f"alpha is {self.alpha} and beta {self.beta}, expected beta of 0 or more, alpha one more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """Evenly among all inputs of an output: for first layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WSquare:
    """In proportion to squared weights, whatever the inputs are: for first layers."""


Rule = Epsilon | Gamma | ZPlus | AlphaBeta | Flat | WSquare


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Term:
    """One term of a rule at a layer, for a batch of N images.

    Attributes:
        a: what stands for the layer's input, (N, ...).
        s: what each output hands to its inputs per unit of contribution, like the output.
        slope: w_k / w, like the weight: so sum_k slope * c_k is to w what c_w is in the epsilon rule. None for 1.
        bias: what stands for the layer's bias, (O,), where this term has one.
    """

    a: Tensor
    s: Tensor
    slope: Tensor | None = None
    bias: Tensor | None = None


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """Move z away from 0 by epsilon, 0 itself upwards."""
    return torch.where(z < 0, z - epsilon, z + epsilon)


def share(
    rule: Rule, node: Node, values: Sequence[Tensor], z: Tensor, r_out: Tensor, *, epsilon: float
) -> tuple[Tensor, tuple[Term, ...]]:
    """Share the relevance of a layer's output out among its inputs.

    Args:
        rule: any; for Epsilon it costs one run of the layer more than is needed.
        node: conv2d or linear.
        values: input (N, ...), weight and, if the layer has one, bias.
        z: the layer's output, (N, ...).
        r_out: its relevance, the same shape.
        epsilon: of the stabiliser, above 0.

    Returns:
        the relevance of the input, like the input, and the rule's terms. They are empty for Flat, whose weights of 1
        say nothing of the layer's own.
    """
    a, weight = values[0], values[1]
    bias = values[2] if len(values) > 2 else None
    positive, negative = (weight > 0).to(z.dtype), (weight < 0).to(z.dtype)
    both_signs = bool((a < 0).any())

    def by_sign(slope: Tensor, other: Tensor) -> _Parts:
        """The input's positive part with weights of one slope, its negative part, if it has one, with the other's."""
        return [(a.clamp(min=0), slope), (a.clamp(max=0), other)] if both_signs else [(a, slope)]

    def of_bias(above: float, below: float) -> Tensor | None:
        return None if bias is None else torch.where(bias > 0, bias * above, bias * below)

    groups: list[tuple[_Parts, Tensor | None, Tensor]]
    match rule:
        case Flat():
            ones = torch.ones_like(weight)
            return _group(node, ones, [(torch.ones_like(a), None)], None, r_out, epsilon)[0], ()
        case WSquare():
            groups = [([(torch.ones_like(a), weight)], None, r_out)]
        case Epsilon():
            groups = [([(a, None)], bias, r_out)]
        case Gamma(gamma=g):
            up, down = 1 + g * positive, 1 + g * negative
            groups = [
                (by_sign(up, down), of_bias(1 + g, 1), r_out * (z > 0)),
                (by_sign(down, up), of_bias(1, 1 + g), r_out * (z < 0)),
            ]
        case ZPlus():
            groups = [(by_sign(positive, negative), of_bias(1, 0), r_out)]
        case AlphaBeta(alpha=alpha, beta=beta):
            groups = [
                (by_sign(positive, negative), of_bias(1, 0), alpha * r_out),
                (by_sign(negative, positive), of_bias(0, 1), -beta * r_out),
            ]
    r_in = torch.zeros_like(a)
    terms: tuple[Term, ...] = ()
    for parts, changed_bias, r in groups:
        # Below a ReLU a negative z carries no relevance, so half of Gamma's work falls away.
        if r.any():
            shares, more = _group(node, weight, parts, changed_bias, r, epsilon)
            r_in, terms = r_in + shares, terms + more
    return r_in, terms


_Parts = list[tuple[Tensor, Tensor | None]]
"""What terms of one denominator read, and their slopes."""


def _group(
    node: Node, weight: Tensor, parts: _Parts, bias: Tensor | None, r: Tensor, epsilon: float
) -> tuple[Tensor, tuple[Term, ...]]:
    """Share r out among terms with one denominator; the bias is the first one's."""
    leaves, outs = [], []
    for i, (a, slope) in enumerate(parts):
        leaves.append(a.detach().requires_grad_())
        values = [leaves[i], weight if slope is None else weight * slope]
        with torch.enable_grad():
            outs.append(compute(node, [*values, bias] if bias is not None and i == 0 else values))
    z = sum((out.detach() for out in outs[1:]), outs[0].detach())
    s = r / stabilised(z, epsilon)
    gradients = torch.autograd.grad(outs, leaves, [s] * len(outs))
    shares = [leaf.detach() * gradient for leaf, gradient in zip(leaves, gradients, strict=True)]
    terms = tuple(Term(a=a, s=s, slope=slope, bias=bias if i == 0 else None) for i, (a, slope) in enumerate(parts))
    return sum(shares[1:], shares[0]), terms


# ---- composites ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A rule and the layers it is for.

    Attributes:
        rule: of these layers.
        op: conv2d or linear; None for both.
        depth: up to and including this depth: 0 for the layers that read the image, 1 for all. A layer's depth is the
            most layers that stand before it on a way from the image, divided by the largest such number.
    """

    rule: Rule
    op: Op | None = None
    depth: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """Which rule each layer gets.

    Attributes:
        name: as `parse_composite` reads it.
        choices: the first one that fits a layer gives its rule; where none fits it is Epsilon.
        epsilon: of the Epsilon rule, and of the stabiliser in all others; above 0.

    Raises:
        UsageError: epsilon is out of range.
    """

    name: str = "epsilon"
    choices: tuple[Choice, ...] = ()
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise UsageError(f"epsilon is {self.epsilon}, expected a number above 0")

    def __str__(self) -> str:
        """Say it for people: "epsilon 1e-06", "gamma:0.25, epsilon 1e-06"."""
        return f"epsilon {self.epsilon:g}" if self.name == "epsilon" else f"{self.name}, epsilon {self.epsilon:g}"

    def rules(self, graph: Graph) -> dict[str, Rule]:
        """Give each layer's rule by its name."""
        depths = _depths(graph)
        return {
            node.name: next(
                (c.rule for c in self.choices if c.op in (None, node.op) and depths[node.name] <= c.depth), Epsilon()
            )
            for node in graph.layers()
        }


def _depths(graph: Graph) -> dict[str, float]:
    """Give the depth of each layer, 0 to 1, as `Choice` counts it."""
    before = dict.fromkeys(graph.tensors, 0)
    found: dict[str, int] = {}
    layers = {node.name for node in graph.layers()}
    for node in graph.nodes:
        n = max(before[name] for name in node.inputs)
        if node.name in layers:
            found[node.name] = n
            n += 1
        before[node.outputs[0]] = n
    most = max(found.values(), default=0) or 1
    return {name: n / most for name, n in found.items()}


def _in_convolutions(rule: Rule) -> tuple[Choice, ...]:
    return (Choice(rule=rule, op=Op.CONV2D),)


_NAMES: Mapping[str, Callable[[float | None], tuple[Choice, ...]]] = {
    "gamma": lambda x: (Choice(rule=_gamma(x)),),
    "plus": lambda x: (Choice(rule=ZPlus()),),
    "alpha2-beta1": lambda x: (Choice(rule=AlphaBeta()),),
    "epsilon-gamma": lambda x: _in_convolutions(_gamma(x)),
    "epsilon-plus": lambda x: _in_convolutions(ZPlus()),
    "epsilon-alpha2-beta1": lambda x: _in_convolutions(AlphaBeta()),
    "lower-gamma": lambda x: (Choice(rule=_gamma(x), depth=0.5),),
    "epsilon": lambda x: (),
}
"""Names of composites, with what the number after a colon makes of them."""
_NUMBERED = ("epsilon", "gamma", "epsilon-gamma", "lower-gamma")
_FIRST: Mapping[str, Rule] = {"-flat": Flat(), "-wsquare": WSquare()}

COMPOSITES = tuple(f"{name}:X" if name in _NUMBERED else name for name in sorted(_NAMES))
"""What `parse_composite` reads, for messages; each may end in -flat or -wsquare."""


def _gamma(gamma: float | None) -> Gamma:
    return Gamma() if gamma is None else Gamma(gamma=gamma)


_LEAST_NUMBER, _MOST_NUMBER = 1e-12, 1e6


def parse_composite(text: str) -> Composite:
    """Read a composite by its name.

    - epsilon, gamma, plus (ZPlus), alpha2-beta1: one rule in all layers.
    - epsilon-gamma, epsilon-plus, epsilon-alpha2-beta1: the second in convolutions, Epsilon in linear layers.
    - lower-gamma: Gamma in the lower half of the layers, Epsilon above.
    - Any of them with -flat or -wsquare behind it: that rule in the layers that read the image.
    - A number behind a colon is epsilon ("epsilon:0.01", default 1e-6) or gamma ("gamma:0.5", default 0.25).

    Raises:
        UsageError: unknown name, or a number that is out of range or has no place there; it lists what there is.
    """
    name, colon, number = text.strip().lower().partition(":")
    suffix = next((end for end in _FIRST if name.endswith(end)), "")
    base = name.removesuffix(suffix)
    if base not in _NAMES or (colon and base not in _NUMBERED):
        raise UsageError(
            f"rule {text!r} is unknown; expected {', '.join(COMPOSITES)}, with -flat or -wsquare behind the name for "
            "the first layer"
        )
    try:
        value = float(number) if colon else None
    except ValueError as e:
        raise UsageError(f"rule {text!r}: {number!r} is not a number; expected e.g. {base}:0.1") from e
    if value is not None and not _LEAST_NUMBER <= value <= _MOST_NUMBER:
        raise UsageError(f"rule {text!r}: {number} is out of range; expected {_LEAST_NUMBER:g} to {_MOST_NUMBER:g}")
    choices = _NAMES[base](value)
    if suffix:
        choices = (Choice(rule=_FIRST[suffix], depth=0.0), *choices)
    if base == "epsilon":
        return Composite(name=name, choices=choices, epsilon=1e-6 if value is None else value)
    written = [f"{name}:{c.rule.gamma:g}" for c in choices if isinstance(c.rule, Gamma)]
    return Composite(name=written[0] if written else name, choices=choices)
