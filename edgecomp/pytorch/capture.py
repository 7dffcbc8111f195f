"""Take a trained network in: `nn.Module` or exported program -> the neutral float graph, BatchNorm folded."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from edgecomp.errors import CaptureError, EdgecompError, GraphError, UnsupportedOp, UsageError
from edgecomp.graph import Graph, Node, Tensor
from edgecomp.ops import Shape
from edgecomp.pytorch.aten import TRANSLATORS, VIEWS
from edgecomp.pytorch.calls import (
    SUPPORTED,
    UNFINISHED,
    Activation,
    Builder,
    Call,
    Value,
    bind,
    in_graph,
    operator_name,
)

# torch logs a traceback of its own beside the exception that it raises; the exception says it all.
_ECHOES = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch.export")
_MUTED = logging.CRITICAL + 1
_WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def capture(module: nn.Module | ExportedProgram, input_shape: tuple[int, ...], *, name: str) -> Graph:
    """Trace a network and translate it, in evaluation mode, to float32 and a batch of 1.

    The module is left as it was. Nodes carry PyTorch's layer names: a module's qualified name, "stack1.add" for a
    function called inside a module, ":2" appended where a module or function is used a second time.

    Args:
        module: the trained network; one image batch in, one tensor out (a tuple or dict of one is unwrapped).
        input_shape: C, H, W, or C, T of a network that takes signals (N, C, T). These are images of one row in the
            graph, and C, 1, T, the shape that data of them have, means C, T where the network takes nothing else.
        name: the model's name, for people.

    Raises:
        UnsupportedOp: an operator that edgecomp does not know; layer, operator and what is known are named.
        CaptureError: weights with NaN or infinity, an input shape that does not fit, control flow that depends on the
            image, several inputs or outputs.
        UsageError: `input_shape` is not two or three positive numbers.
    """
    if len(input_shape) not in (2, 3) or any(n < 1 for n in input_shape):
        raise UsageError(f"input shape {input_shape}: expected C,H,W, three numbers above zero, e.g. (3, 32, 32)")
    shape = (1, *input_shape)
    if isinstance(module, ExportedProgram):
        _check_finite(dict(module.state_dict) | dict(module.constants), name)
        taken = _image_shape(module, name)
        if in_graph(taken) == in_graph(shape):
            return _translate(module, taken, name)
        return _traced(module.module(), shape, name)
    _check_finite(module.state_dict(), name)
    with _evaluating(module) as ready:
        return _traced(ready, shape, name)


_WANTS_SIGNALS = re.compile(r"2D \(unbatched\) or 3D \(batched\)|2D or 3D input")
"""What torch's one-dimensional layers say to an image."""


def _traced(module: nn.Module, shape: Shape, name: str) -> Graph:
    """Trace and translate; an image of one row that a network does not take is shown to it as a signal."""
    signal = (*shape[:2], *shape[3:])
    try:
        program = _export(module, shape, name)
    except CaptureError as error:
        if in_graph(signal) != shape:
            raise
        try:
            program, shape = _export(module, signal, name), signal
        except CaptureError as other:
            # A network of signals says so when it is shown an image; what is wrong stands in the other error.
            told = other if _WANTS_SIGNALS.search(str(error)) else error
            raise told from told.__cause__
    return _translate(program, shape, name)


def _check_finite(weights: dict[str, Any], name: str) -> None:
    for key, value in weights.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise CaptureError(
                f"{name}: weight {key!r} holds NaN or infinity; expected finite numbers: check the training"
            )


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Give the module in evaluation mode, float32, on the CPU; put its training flags back afterwards."""
    tensors = (*module.parameters(), *module.buffers())
    if any(t.device.type != "cpu" or (t.is_floating_point() and t.dtype != torch.float32) for t in tensors):
        module = copy.deepcopy(module).cpu().float()
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, training in flags:
            part.training = training


# ---- torch.export ----------------------------------------------------------------------------------------------------


def _export(module: nn.Module, shape: Shape, name: str) -> ExportedProgram:
    """Trace with an image batch of `shape`, quietly."""
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(module, (torch.zeros(shape),), strict=False)
    except EdgecompError:
        raise
    except Exception as error:  # whatever the forward pass of a stranger's model raises
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        if "data-dependent" in reason or "DataDependent" in reason:
            raise CaptureError(
                f"{name}: the forward pass decides by the values of the image ({reason}); "
                "expected the same operations for every image: take the condition out of forward()"
            ) from error
        raise CaptureError(
            f"{name}: does not run on one {'image of C,H,W' if len(shape) == 4 else 'signal of C,T'} = "
            f"{','.join(map(str, shape[1:]))} ({reason}); "
            "check the input shape and the model's forward()"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging, and printing, a failure beside raising it."""
    loggers = [logging.getLogger(echo) for echo in _ECHOES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(_MUTED)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            # About torch's own kernels; the graph pads on its own.
            warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _image_shape(program: ExportedProgram, name: str) -> Shape:
    """Give the shape of the one image input; a dynamic size stays symbolic."""
    value = _node(program, _image_input(program, name)).meta["val"]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _image_input(program: ExportedProgram, name: str) -> str:
    specs = program.graph_signature.input_specs
    found = [str(spec.arg.name) for spec in specs if spec.kind is InputKind.USER_INPUT]
    if len(found) != 1:
        raise CaptureError(f"{name}: the model takes {len(found)} inputs ({', '.join(found)}); expected one: images")
    return found[0]


def _output(program: ExportedProgram, name: str) -> str:
    specs = program.graph_signature.output_specs
    found = [
        str(spec.arg.name)
        for spec in specs
        if spec.kind is OutputKind.USER_OUTPUT and isinstance(spec.arg, TensorArgument)
    ]
    if len(found) != 1:
        raise CaptureError(
            f"{name}: the model returns {len(found)} tensors ({', '.join(found)}); expected one: wrap it so that "
            "forward() returns the prediction alone"
        )
    return found[0]


def _node(program: ExportedProgram, name: str) -> fx.Node:
    nodes: dict[str, fx.Node] = {node.name: node for node in program.graph.nodes}
    return nodes[name]


# ---- translation -----------------------------------------------------------------------------------------------------


def _translate(program: ExportedProgram, shape: Shape, name: str) -> Graph:
    """Walk the exported program once, in running order."""
    image, output = _node(program, _image_input(program, name)), _node(program, _output(program, name))
    live = _live(program, output)
    env: dict[fx.Node, Value | None] = _constants(program)
    root: dict[fx.Node, fx.Node] = {}  # whose memory a node's value lies in
    modules = frozenset(_path(node) for node in live) - {""}
    input_name = "input" if "input" not in modules else "image"
    build = Builder(used={input_name}, reserved=modules)
    build.tensors[input_name] = Tensor(name=input_name, shape=in_graph(shape))
    env[image] = Activation(input_name, shape)
    weights = {node: _weight_name(program, node) for node in env}

    for node in program.graph.nodes:
        if node.op != "call_function" or node not in live:
            continue
        memory = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else node
        shares = operator_name(node) in VIEWS or _is_in_place(node)
        root[node] = root.get(memory, memory) if shares else node
        env[node] = _value(node, env=env, live=live, build=build, weights=weights)
        if _is_in_place(node):
            _spread(node, memory, env=env, root=root)

    result = env.get(output)
    if not isinstance(result, Activation) or result.name == input_name:
        raise CaptureError(f"{name}: the model's output does not depend on the image through any layer")
    return _pruned(build, name=name, input_name=input_name, output=result.name)


def _constants(program: ExportedProgram) -> dict[fx.Node, Value | None]:
    """Look up parameters, buffers and constants behind the program's inputs."""
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    found: dict[fx.Node, Value | None] = {}
    for node in program.graph.nodes:
        spec = kinds.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind in _WEIGHT_KINDS and spec.target is not None:
            stored = program.state_dict if spec.target in program.state_dict else program.constants
            value = stored[spec.target]
            found[node] = value if isinstance(value, torch.Tensor) else None
    return found


def _weight_name(program: ExportedProgram, node: fx.Node) -> str:
    signature = program.graph_signature
    return signature.inputs_to_parameters.get(node.name) or signature.inputs_to_buffers.get(node.name) or ""


def _live(program: ExportedProgram, output: fx.Node) -> set[fx.Node]:
    """Collect what the output needs. What works in place is kept: its result may be read under an older name."""
    live: set[fx.Node] = set()
    waiting = [output, *(n for n in program.graph.nodes if n.op == "call_function" and _is_in_place(n))]
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting += node.all_input_nodes
    # The program's last node reads the output, so that nothing is folded across it.
    return live | {node for node in program.graph.nodes if node.op == "output"}


def _is_in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _value(
    node: fx.Node,
    *,
    env: dict[fx.Node, Value | None],
    live: set[fx.Node],
    build: Builder,
    weights: dict[fx.Node, str],
) -> Value | None:
    """Translate one call: an activation by the table, a constant by computing it."""
    layer, functional = _layer(node, weights)
    name = operator_name(node)
    read: dict[fx.Node, Any] = {source: env.get(source) for source in node.all_input_nodes}
    if name == "getitem":
        source, index = node.args
        several = read.get(source) if isinstance(source, fx.Node) else None
        return several[index] if isinstance(several, tuple) and isinstance(index, int) else None
    known = isinstance(node.target, torch._ops.OpOverload)
    if known and read and all(isinstance(value, torch.Tensor) for value in read.values()):
        return _computed(node, read, layer)
    if name not in TRANSLATORS or not known:
        raise UnsupportedOp(f"layer {layer!r}: {name} is not supported; {SUPPORTED}")
    if any(value is None for value in read.values()):
        raise UnsupportedOp(f"layer {layer!r}: {name} reads a value that edgecomp does not follow; {SUPPORTED}")

    def sole(x: Activation) -> bool:
        plain = {other: value.inner if isinstance(value, UNFINISHED) else value for other, value in env.items()}
        aliases = [other for other, value in plain.items() if isinstance(value, Activation) and value.name == x.name]
        waiting = {user for alias in aliases for user in alias.users if user in live and user not in env}
        return waiting <= {node} and not any(x.name in done.inputs for done in build.nodes)

    args = {key: fx.node.map_arg(value, read.__getitem__) for key, value in bind(node).items()}
    call = Call(build=build, node=node, layer=layer, functional=functional, args=args, sole=sole)
    value = TRANSLATORS[name](call)
    first = value[0] if isinstance(value, tuple) else value
    if isinstance(first, Activation) and first.shape != call.out_shape():
        raise GraphError(f"layer {layer!r}: {name} gives {first.shape}, but torch gives {call.out_shape()}")
    return value


def _computed(node: fx.Node, read: dict[fx.Node, Any], layer: str) -> Value | None:
    """Compute what depends on weights alone, e.g. a transposed or a normalised weight."""
    target: Any = node.target
    if operator_name(node) == "detach":  # done in place to constants that forward() makes
        return next(iter(read.values()), None)
    if _is_in_place(node) or torch.Tag.nondeterministic_seeded in target.tags:
        raise UnsupportedOp(
            f"layer {layer!r}: {operator_name(node)} changes a weight or draws random numbers; {SUPPORTED}"
        )
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), read.__getitem__)
    with torch.no_grad():
        value = target(*args, **kwargs)
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return value if isinstance(value, torch.Tensor) else None


def _spread(
    node: fx.Node, target: fx.Node, *, env: dict[fx.Node, Value | None], root: dict[fx.Node, fx.Node]
) -> None:
    """Let every other name of the memory that `node` wrote mean its result from here on."""
    before = env.get(target)
    home = root.get(target, target)
    for other in list(env):
        if other is not node and root.get(other, other) is home:
            # A view of another shape has changed too, in a way that nothing here expresses: unknown from now on.
            env[other] = env[node] if env[other] == before else None


def _path(node: fx.Node) -> str:
    """Give the qualified name of the module that a node was called in, "" for the model itself."""
    return _module(node)[0]


def _module(node: fx.Node) -> tuple[str, str]:
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values()), ("", ""))
    return re.sub(r"@\d+$", "", path), kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _layer(node: fx.Node, weights: dict[fx.Node, str]) -> tuple[str, bool]:
    """Name a call; say whether the name is made up of a module and a function rather than a module's own.

    A layer of torch.nn is the module itself, and so is a call with the weight of the module it stands in.
    """
    path, kind = _module(node)
    owns = any(weights.get(source) == f"{path}.weight" for source in node.all_input_nodes)
    if path and (kind.startswith("torch.nn.modules.") or owns):
        return path, False
    name = operator_name(node)
    return (f"{path}.{name}" if path else name), True


def _pruned(build: Builder, *, name: str, input_name: str, output: str) -> Graph:
    """Keep what the output needs."""
    needed = {output}
    nodes: list[Node] = []
    for node in reversed(build.nodes):
        if needed.intersection(node.outputs):
            nodes.append(node)
            needed.update(node.inputs)
    if input_name not in needed:
        raise CaptureError(f"{name}: the model's output does not depend on the image")
    return Graph(
        name=name,
        nodes=tuple(reversed(nodes)),
        tensors={key: tensor for key, tensor in build.tensors.items() if key in needed},
        inputs=(input_name,),
        outputs=(output,),
    )
