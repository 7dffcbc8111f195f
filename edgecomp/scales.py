"""Scale and zero point of every activation: one for each set of tensors that must share them, and sums that are exact.

Every runtime adds two codes in its own way: onnxruntime in float32 on x86 and in integers on Arm, XNNPACK with
multipliers of 21 bits, our C with 22. They agree as long as no sum lies within their errors of the middle between two
codes. So the scales of what is added and of the sum are small whole multiples of one step, the sum's an odd one n: then
every sum is a multiple of 1/n of a code, and none comes nearer to a middle than 1/(2n).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from edgecomp import quantmath
from edgecomp.graph import Graph, Node, Op, QuantParams
from edgecomp.ops import PROBABILITIES, SHARES_SCALE
from edgecomp.plan import ActRange

MOST_STEPS = 1023
"""Of a scale that takes part in sums, an odd number.

With u = 2^-24, codes of 0 to 255, a sum of n steps and r the larger ratio of a term's scale to its, the errors are at
most, in codes: in float32, fused or not, 4080 r u + 766 u (1530 r u by rounded scales and ratios, 1530 r u + 255 u in
the fixed part, 1020 r u + 511 u in products and sums); with multipliers of 21 bits 510 r 2^-21 + 1530 r u. Up to
1023 steps these are 0.60 and 0.68 of 1/(2n), the distance to the nearest middle, whatever r is.
"""
_MOST_COARSER = 9 / 8
"""How much coarser a scale may become for the sake of sums where something else reads it, too."""
_NOTHING = 1e-6


def activation_params(graph: Graph, ranges: Mapping[str, ActRange]) -> dict[str, QuantParams]:
    """Choose scale and zero point of every activation.

    Args:
        graph: after `compress.fuse_clips`.
        ranges: by activation tensor.
    """
    top = _sharing(graph)
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    for name, first in top.items():
        lows[first] = min(ranges[name].low, lows.get(first, np.inf))
        highs[first] = max(ranges[name].high, highs.get(first, -np.inf))
    chosen = {first: quantmath.activation_params(low, highs[first]) for first, low in lows.items()}
    # TFLite fixes the codes of probabilities; what shares its scale with anything else gets that of all together.
    others = {top[node.outputs[0]] for node in graph.nodes if node.op not in SHARES_SCALE | PROBABILITIES}
    others |= {top[name] for name in graph.inputs}
    fixed = {top[node.outputs[0]] for node in graph.nodes if node.op in PROBABILITIES} - others
    chosen.update(dict.fromkeys(fixed, quantmath.UNIT))
    for _ in graph.nodes:  # in practice once, and once more where what feeds a sum through a gate has become too fine
        _widen(graph, top, fixed, lows, chosen)
        coarser = _exact_sums(graph, top, fixed, chosen)
        chosen |= {first: quantmath.params_from(lows[first], scale) for first, scale in coarser.items()}
        if not coarser:
            break
    return {name: chosen[first] for name, first in top.items()}


def sums_are_exact(scale_a: float, scale_b: float, scale_sum: float) -> bool:
    """Tell whether all runtimes make the same codes of a sum, by the float32 scales of its terms and of itself."""
    if not 0 < scale_sum < math.inf:
        return False
    for n in range(1, MOST_STEPS + 1, 2):
        steps = [float(scale) / float(scale_sum) * n for scale in (scale_a, scale_b)]
        if all(0.5 < s < MOST_STEPS + 0.5 and abs(s - round(s)) <= 2.0**-22 * s for s in steps):
            return True
    return False


def _sharing(graph: Graph) -> dict[str, str]:
    """Map each activation to the first of the set that it shares its scale with."""
    leader = {name: name for name, tensor in graph.tensors.items() if tensor.data is None}
    for node in graph.nodes:
        if node.op in SHARES_SCALE:
            for name in node.inputs:
                _join(leader, name, node.outputs[0])
    return {name: _find(leader, name) for name in leader}


def _find(leader: Mapping[str, str], name: str) -> str:
    while leader[name] != name:
        name = leader[name]
    return name


def _join(leader: dict[str, str], name: str, other: str) -> None:
    leader[_find(leader, name)] = _find(leader, other)


def _read(graph: Graph, node: Node) -> list[str]:
    return [name for name in node.inputs if graph.tensors[name].data is None]


# ---- scales that are too fine ----------------------------------------------------------------------------------------


def _widen(
    graph: Graph, top: Mapping[str, str], fixed: set[str], lows: Mapping[str, float], chosen: dict[str, QuantParams]
) -> None:
    """Raise scales that runtimes refuse.

    Raising one output can ask for another further on; a graph settles after as many rounds as it has loops of shared
    scales, in practice one.
    """
    for _ in graph.nodes:
        raised = False
        for node in graph.nodes:
            read = [top[name] for name in _read(graph, node)]
            output = top[node.outputs[0]]
            leasts = {output: _least_scale(graph, node, [chosen[first] for first in read])}
            leasts |= {first: _least_term_scale(node, chosen[output]) for first in read if first != output}
            for first, least in leasts.items():
                # What TFLite fixes stays: a term of 1/256 is too fine only beside sums that reach beyond 1000.
                if least > float(chosen[first].scale) and first not in fixed:
                    chosen[first], raised = quantmath.params_from(lows[first], least), True
        if not raised:
            break


def _least_scale(graph: Graph, node: Node, inputs: Sequence[QuantParams]) -> float:
    """Give the finest output scale that makes sense: runtimes refuse factors of 256 and more from sums to codes.

    Only an output that was (nearly) constant on the calibration data asks for less.
    """
    if node.op not in (Op.CONV2D, Op.LINEAR, Op.ADD, Op.MUL, Op.GLOBAL_AVG_POOL, Op.SILU, Op.HARD_SWISH):
        return 0.0
    scales = [float(params.scale) for params in inputs]
    if node.op in (Op.SILU, Op.HARD_SWISH):
        scales.append(float(quantmath.SHARES.scale))
    largest = max(scales) if node.op in (Op.ADD, Op.GLOBAL_AVG_POOL) else float(np.prod(scales))
    if node.op in (Op.CONV2D, Op.LINEAR):
        weight = graph.weight(node).data
        assert weight is not None
        largest *= float(np.abs(weight).max(initial=0.0))
    return 1.0001 * largest / 128


def _least_term_scale(node: Node, output: QuantParams) -> float:
    """Give the finest scale that makes sense for what a sum reads: XNNPACK adds nothing finer than 1/1024 of its step.

    Where such a term stands in many places, LiteRT 2.3.0 ends the process ("double free") instead of falling back to
    its own kernels. A hard-sigmoid is such a sum, of x / 6 and a constant.
    """
    if node.op is Op.ADD:
        return 1.0001 * float(output.scale) / 1024
    if node.op in (Op.HARD_SIGMOID, Op.HARD_SWISH):
        return 6 * 1.0001 * float(quantmath.SHARES.scale if node.op is Op.HARD_SWISH else output.scale) / 1024
    return 0.0


# ---- sums ------------------------------------------------------------------------------------------------------------


def _exact_sums(
    graph: Graph, top: Mapping[str, str], fixed: set[str], chosen: Mapping[str, QuantParams]
) -> dict[str, float]:
    """Make the scales that meet in sums, directly or through other sums, multiples of one step; none gets finer.

    What only sums read may become as coarse as that step, for the sums are coarser. Where anything else would lose more
    than an eighth, because scales lie far apart, or where a fixed scale is below the step, they all stay as they are.

    Returns:
        the scales that change.
    """
    adds = [node for node in graph.nodes if node.op is Op.ADD]
    sums = {top[node.outputs[0]] for node in adds}
    leader = {first: first for first in top.values()}
    for node in adds:
        for name in node.inputs:
            _join(leader, top[name], top[node.outputs[0]])
    elsewhere = {top[name] for node in graph.nodes if node.op is not Op.ADD for name in _read(graph, node)}
    elsewhere |= {top[name] for name in graph.outputs}
    found: dict[str, float] = {}
    for component in sorted({_find(leader, first) for first in sums}):
        scales = {first: float(chosen[first].scale) for first in leader if _find(leader, first) == component}
        step = max(scales.values()) / MOST_STEPS
        if fixed & scales.keys():
            unit = float(quantmath.UNIT.scale)
            step = unit / max(1, int(unit / step))
        # A little less than the quotient, which for a scale that is a multiple already is whole but for rounding.
        steps = {first: math.ceil(scale / step * (1 - _NOTHING)) for first, scale in scales.items()}
        steps = {first: n | 1 if first in sums else n for first, n in steps.items()}
        fits = max(steps.values()) <= MOST_STEPS and all(
            steps[first] * step <= _MOST_COARSER * scale for first, scale in scales.items() if first in elsewhere
        )
        if fits:
            found |= {first: n * step for first, n in steps.items() if n * step > scales[first] * (1 + _NOTHING)}
    return found
