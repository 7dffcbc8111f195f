"""What is decided about a network (the plan) and what is known about it when deciding (relevance, ranges).

A plan is the whole experiment: with the float graph it determines every byte of every exported file. It is JSON that a
person can read, edit and compare. Weight scales are not in it: they follow from weights and bits (`quantmath`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

import numpy as np

from edgecomp.errors import PlanError
from edgecomp.graph import Array, Graph, frozen
from edgecomp.preprocessing import Preprocessing
from edgecomp.quantmath import WEIGHT_BITS
from edgecomp.strictjson import check_keys, checked_object, load_strict_json, write_json

PLAN_SCHEMA = "edgecomp-plan/1"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerRelevance:
    """What Layer-wise Relevance Propagation says of one layer, as means over the samples.

    With a the input, s = R_out / stabilised(z) and c_w = sum over positions of a * s, a weight's relevance is
    R_w = w * c_w (epsilon rule; c_w is the gradient of the explained output in the limit epsilon -> 0). Of a
    layer that acts on the output through gates alone these are its effects to first order, not relevance
    (`pytorch.propagate`, "aside").

    Attributes:
        weight: float32, the weight's shape: mean R_w, signed.
        weight_abs: float32, the same shape: mean |R_w|.
        weight_cost: float32, the same shape: mean c_w^2, the second-order cost of changing the weight by one.
        channel: float64 (O,): mean relevance of each output channel, summed over positions, signed.
        channel_abs: float64 (O,): mean of |relevance of the channel in one sample|.
        output_cost: float64 (O,): mean of s^2 over samples and output positions, the second-order cost of changing the
            channel by one at one position.
    """

    weight: Array
    weight_abs: Array
    weight_cost: Array
    channel: Array
    channel_abs: Array
    output_cost: Array

    def __post_init__(self) -> None:
        for name in ("weight", "weight_abs", "weight_cost", "channel", "channel_abs", "output_cost"):
            object.__setattr__(self, name, frozen(getattr(self, name)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClassRelevance:
    """Relevance of output channels for each class alone, as means over the samples of that class; 0 where it has none.

    Attributes:
        n_samples: int64 (n_classes,): images that were explained.
        channel: by layer name, float64 (n_classes, O): as `LayerRelevance.channel`.
        channel_abs: by layer name, float64 (n_classes, O): as `LayerRelevance.channel_abs`.
    """

    n_samples: Array
    channel: Mapping[str, Array]
    channel_abs: Mapping[str, Array]

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_samples", frozen(self.n_samples))
        for name in ("channel", "channel_abs"):
            arrays = {layer: frozen(array) for layer, array in getattr(self, name).items()}
            object.__setattr__(self, name, MappingProxyType(arrays))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActivationRelevance:
    """Relevance of each element of an activation tensor, as means over the samples.

    Attributes:
        mean: float64, the tensor's shape without N: signed.
        mean_abs: float64, the same shape: of absolute values.
    """

    mean: Array
    mean_abs: Array

    def __post_init__(self) -> None:
        for name in ("mean", "mean_abs"):
            object.__setattr__(self, name, frozen(getattr(self, name)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relevance:
    """Relevance of every layer, with how it was made.

    Attributes:
        rule: how it was made, for people, e.g. "epsilon 1e-06"; what differs from the default follows after semicolons.
        n_samples: images that were explained; those of classes without weight are not counted.
        layers: by layer name.
        conservation: by layer name, the share of its relevance that a layer lost in the first batch, by rule and
            rounding: |sum R_in + sum R_bias - sum R_out| / sum |R_out|. Layers that no relevance reached are missing.
        per_class: where it was asked for.
        activations: by tensor name, the input included; empty unless it was asked for.
    """

    rule: str
    n_samples: int
    layers: Mapping[str, LayerRelevance]
    conservation: Mapping[str, float] = field(default_factory=dict)
    per_class: ClassRelevance | None = None
    activations: Mapping[str, ActivationRelevance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("layers", "conservation", "activations"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


@dataclass(frozen=True, slots=True, kw_only=True)
class ActRange:
    """The values an activation tensor takes on real data, after outliers were weighed against resolution."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        keep: a flag for each output channel of the original layer.
        weight_bits: 2-8.
    """

    keep: tuple[bool, ...]
    weight_bits: int


class Io(StrEnum):
    """What the exported file takes and gives."""

    FLOAT = "float"
    INT8 = "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionPlan:
    """Everything that is decided about a network.

    Attributes:
        graph_digest: of the float graph; the plan refuses any other.
        io: what the exported files take and give.
        layers: by layer name, all of the graph's.
        ranges: by activation tensor of the float graph.
        preprocessing: what turns pixels into the network's input.
        classes: names of the outputs, may be empty.
        made_by: rule, samples, seed, budget, versions; for people, never read by code.
    """

    graph_digest: str
    io: Io
    layers: Mapping[str, LayerPlan]
    ranges: Mapping[str, ActRange]
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()
    made_by: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("layers", "ranges", "made_by"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def to_json(self) -> str:
        """Write as JSON text: keys in a fixed order, floats so that they read back to the same bits."""
        layers = {
            name: {
                "out_channels": len(layer.keep),
                "dropped": [i for i, keep in enumerate(layer.keep) if not keep],
                "weight_bits": layer.weight_bits,
            }
            for name, layer in self.layers.items()
        }
        obj = {
            "schema": PLAN_SCHEMA,
            "graph_digest": self.graph_digest,
            "io": self.io.value,
            "preprocessing": self.preprocessing.to_json(),
            "classes": list(self.classes),
            "layers": layers,
            "ranges": {name: [r.low, r.high] for name, r in self.ranges.items()},
            "made_by": dict(sorted(self.made_by.items())),
        }
        return write_json(obj)

    @staticmethod
    def from_json(text: str, where: str = "plan") -> CompressionPlan:
        """Read what `to_json` wrote; strict.

        Raises:
            PlanError: not JSON, unknown version, a key missing, unknown or twice, a value of the wrong type or range.
        """
        obj = load_strict_json(text, where)
        check_keys(
            obj,
            ("schema", "graph_digest", "io", "preprocessing", "classes", "layers", "ranges", "made_by"),
            where,
        )
        if obj["schema"] != PLAN_SCHEMA:
            raise PlanError(f"{where}: schema is {obj['schema']!r}, this edgecomp reads {PLAN_SCHEMA!r}")
        digest, io = obj["graph_digest"], obj["io"]
        if not (isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
            raise PlanError(f"{where}: graph_digest is {digest!r:.80}, expected 64 hexadecimal digits")
        if io not in tuple(Io):
            raise PlanError(f"{where}: io is {io!r:.80}, expected one of {', '.join(Io)}")
        classes = obj["classes"]
        if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
            raise PlanError(f"{where}: classes: expected a list of strings")
        made_by = checked_object(obj["made_by"], f"{where}: made_by")
        if not all(isinstance(v, str) for v in made_by.values()):
            raise PlanError(f"{where}: made_by: expected strings")
        return CompressionPlan(
            graph_digest=digest,
            io=Io(str(io)),
            layers={
                name: _layer_from_json(value, f"{where}: layer {name!r}")
                for name, value in checked_object(obj["layers"], f"{where}: layers").items()
            },
            ranges={
                name: _range_from_json(value, f"{where}: range of {name!r}")
                for name, value in checked_object(obj["ranges"], f"{where}: ranges").items()
            },
            preprocessing=Preprocessing.from_json(obj["preprocessing"], where),
            classes=tuple(classes),
            made_by={key: str(value) for key, value in made_by.items()},
        )

    def with_uniform_bits(self, bits: int) -> CompressionPlan:
        """Give the same plan with every layer at `bits`: the yardstick to compare mixed bits with."""
        layers = {name: LayerPlan(keep=layer.keep, weight_bits=bits) for name, layer in self.layers.items()}
        return self._replace_layers(layers)

    def without_pruning(self) -> CompressionPlan:
        """Give the same plan with every channel kept."""
        layers = {
            name: LayerPlan(keep=(True,) * len(layer.keep), weight_bits=layer.weight_bits)
            for name, layer in self.layers.items()
        }
        return self._replace_layers(layers)

    def _replace_layers(self, layers: Mapping[str, LayerPlan]) -> CompressionPlan:
        return CompressionPlan(
            graph_digest=self.graph_digest,
            io=self.io,
            layers=layers,
            ranges=self.ranges,
            preprocessing=self.preprocessing,
            classes=self.classes,
            made_by=self.made_by,
        )


def validate(plan: CompressionPlan, graph: Graph) -> None:
    """Check that a plan fits a float graph.

    Raises:
        PlanError: the plan was made for another model, misses a layer or a range, or keeps no channel of a layer.
    """
    digest = graph.digest()
    if plan.graph_digest != digest:
        raise PlanError(
            f"plan: made for the graph {plan.graph_digest[:12]}…, this one is {digest[:12]}…; "
            "use the graph file that lies beside the plan"
        )
    layers = {node.name: graph.weight(node).shape[0] for node in graph.layers()}
    if plan.layers.keys() != layers.keys():
        odd = sorted(plan.layers.keys() ^ layers.keys())
        raise PlanError(f"plan: its layers and the model's differ in {', '.join(odd[:5])}; expected one entry a layer")
    for name, channels in layers.items():
        layer = plan.layers[name]
        if len(layer.keep) != channels:
            raise PlanError(f"plan: layer {name!r} has {len(layer.keep)} channels, the model's has {channels}")
        if not any(layer.keep):
            raise PlanError(f"plan: layer {name!r} keeps no channel; expected at least one")
        if layer.weight_bits not in WEIGHT_BITS:
            raise PlanError(f"plan: layer {name!r} has {layer.weight_bits} bits, expected one of {WEIGHT_BITS}")
    activations = {name for name, tensor in graph.tensors.items() if tensor.data is None}
    if plan.ranges.keys() != activations:
        odd = sorted(plan.ranges.keys() ^ activations)
        raise PlanError(f"plan: its ranges and the model's activations differ in {', '.join(odd[:5])}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _layer_from_json(value: object, where: str) -> LayerPlan:
    obj = checked_object(value, where)
    check_keys(obj, ("out_channels", "dropped", "weight_bits"), where)
    channels, dropped, bits = obj["out_channels"], obj["dropped"], obj["weight_bits"]
    if not (_is_int(channels) and 0 < channels <= 1 << 20):  # type: ignore[operator]
        raise PlanError(f"{where}: out_channels is {channels!r:.80}, expected a whole number above 0")
    assert isinstance(channels, int)
    if bits not in WEIGHT_BITS or not _is_int(bits):
        raise PlanError(f"{where}: weight_bits is {bits!r:.80}, expected one of {', '.join(map(str, WEIGHT_BITS))}")
    if not (isinstance(dropped, list) and all(_is_int(i) and 0 <= i < channels for i in dropped)):
        raise PlanError(f"{where}: dropped: expected channel numbers from 0 to {channels - 1}")
    if sorted(set(dropped)) != dropped:
        raise PlanError(f"{where}: dropped: expected each channel once, in rising order")
    keep = np.ones(channels, dtype=bool)
    keep[dropped] = False
    assert isinstance(bits, int)
    return LayerPlan(keep=tuple(keep.tolist()), weight_bits=bits)


def _range_from_json(value: object, where: str) -> ActRange:
    if not (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    ):
        raise PlanError(f"{where}: expected [low, high]")
    try:
        low, high = float(value[0]), float(value[1])
    except OverflowError as e:
        raise PlanError(f"{where}: a number is too large") from e
    if not (math.isfinite(low) and math.isfinite(high) and low <= high and max(-low, high) < 1e30):
        raise PlanError(f"{where}: [{low}, {high}], expected finite numbers with low <= high")
    return ActRange(low=low, high=high)
