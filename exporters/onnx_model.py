"""An ONNX model while it is written: nodes, initializers, functions, and names that do not collide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgecomp.artifact import StoredWeight
from edgecomp.graph import Array

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from edgecomp.coding import Encoded

DOMAIN = "edgecomp"
"""Of the model's own functions: each is a list of standard operators that stands in the file once."""
_NODE_BYTES = 64


class Model:
    """The nodes and initializers written so far; equal small constants are stored once.

    Names that the exporter makes up give way to those of the graph.
    """

    def __init__(
        self, names: Iterable[str], *, codes: Mapping[str, Encoded], levels: Mapping[int, int], folds: bool
    ) -> None:
        """Reserve the names of a graph's tensors.

        Args:
            names: of the tensors.
            codes: encoded weights by name.
            levels: what `word_levels` says.
            folds: the file may leave constants to be computed when it is loaded.
        """
        self._names = set(names)
        self.folds = folds
        self.codes = codes
        self.levels = levels
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.stored: list[StoredWeight] = []
        self.functions: dict[str, Any] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._zeros: dict[tuple[str, int], str] = {}

    def fresh(self, wanted: str) -> str:
        """Give a tensor name that nothing else has: the one wanted, or as near as possible."""
        while wanted in self._names:
            wanted += "'"
        self._names.add(wanted)
        return wanted

    def node(self, op_type: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        """Append a node of one output, and name that."""
        from onnx import helper

        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def temporary(self, op_type: str, inputs: Sequence[str], **attributes: object) -> str:
        """Append a node whose output needs no name that says something: bytes on disk count."""
        return self.node(op_type, inputs, self.fresh(f"%{len(self.nodes)}"), **attributes)

    def define(self, text: str) -> Any:
        """Put a function, in ONNX's textual form and of DOMAIN, in the file, once; others may call it by its name."""
        from onnx import parser

        if text not in self.functions:
            self.functions[text] = _shortened(parser.parse_function(text))
        return self.functions[text]

    def call(self, text: str, inputs: Sequence[str]) -> list[str]:
        """Append a call of a function and name its outputs.

        Args:
            text: the function in ONNX's textual form, of DOMAIN; one that is there already is used again.
            inputs: names.
        """
        from onnx import helper

        function = self.define(text)
        outputs = [self.fresh(f"%{len(self.nodes)}{letter}") for letter in "abcdef"[: len(function.output)]]
        self.nodes.append(helper.make_node(function.name, list(inputs), outputs, domain=DOMAIN))
        return outputs

    def weight(self, name: str, values: Array) -> str:
        """Store an initializer under its own name."""
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def constant(self, values: Array) -> str:
        """Store a constant once for equal values, under a short name: bytes on disk count."""
        values = np.asarray(values, order="C")
        key = (values.dtype.name, values.shape, values.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(self.fresh(f"#{len(self._constants)}"), values)
        return self._constants[key]

    def zeros(self, n: int, dtype: type[np.generic]) -> str:
        """Give n zeros, one axis, once for each n: written out where that is shorter than a node, or must be."""
        from onnx import helper

        values = np.zeros(n, dtype=dtype)
        if not self.folds or values.nbytes < _NODE_BYTES:
            return self.constant(values)
        key = (values.dtype.name, n)
        if key not in self._zeros:
            zero = helper.make_tensor("", helper.np_dtype_to_tensor_dtype(values.dtype), [1], [0])
            shape = self.constant(np.array([n], dtype=np.int64))
            self._zeros[key] = self.temporary("ConstantOfShape", [shape], value=zero)
        return self._zeros[key]


def _shortened(function: Any) -> Any:
    """Rename what is inside a function to as few letters as possible: bytes on disk count."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    uses: dict[str, int] = {}
    for names in (function.input, function.output, *(part for n in function.node for part in (n.input, n.output))):
        for name in names:
            uses[name] = uses.get(name, 0) + 1
    words = [*letters, *(a + b for a in letters for b in letters)]
    short = dict(zip(sorted(uses, key=lambda name: -uses[name]), words, strict=False))
    for holder, fields in ((function, ("input", "output")), *((node, ("input", "output")) for node in function.node)):
        for field in fields:
            names = [short[name] for name in getattr(holder, field)]
            holder.ClearField(field)
            getattr(holder, field).extend(names)
    for node in function.node:
        node.ClearField("name")
        if not node.domain:
            node.ClearField("domain")
        for attribute in node.attribute:
            if attribute.HasField("t"):
                attribute.t.ClearField("name")
            if attribute.HasField("t") and min(attribute.t.int32_data, default=0) < 0:
                # Negative numbers take ten bytes each otherwise.
                attribute.t.raw_data = np.array(attribute.t.int32_data, dtype="<i4").tobytes()
                attribute.t.ClearField("int32_data")
    return function
