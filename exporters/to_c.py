"""A quantized graph as C99: constants, one call a layer, and the places of all activations in the caller's arena."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgecomp.arena import Arena, Buffer, arrange, drawn, widest_gap
from edgecomp.artifact import FILES, AtRest, Exported, StoredWeight
from edgecomp.compress import border_codes, run_codes
from edgecomp.errors import ExportError
from edgecomp.graph import Array, Graph, QuantParams

from .c_facts import CodeBorder, NetworkFacts, digest_of
from .c_steps import Constant, Lowering, Step, lower
from .layout import stored_shape

_, HEADER, *KERNELS = FILES["c"]
"""The header's name, and those of what every network needs beside it: the same files for all, written by hand."""
_WIDTH = 116
MOST_NAME = 48
_HEADERS = (
    "assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdalign stdarg stdatomic",
    "stdbool stddef stdint stdio stdlib stdnoreturn string tgmath threads time uchar wchar wctype arduino edgecomp",
    "edgecomp_kernels network",
)
RESERVED_NAMES = frozenset(name for line in _HEADERS for name in line.split())
"""What no network may be called: its header would hide another."""
_LCG_FACTOR, _LCG_TERM = 1664525, 1013904223
_SCRATCH = "scratch:"
"""Before the number of the step whose memory it is, in the name of a buffer."""
_NAME = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """A network in C before it is text.

    Attributes:
        name: what all its names begin with.
        graph: that it computes.
        steps: in order.
        place: of every tensor, in C: an offset in the arena, or the caller's input or output.
        scratch: offset and bytes of the memory that a step has for itself, by its number.
        buffers: all that lies in the arena.
        arena: their places.
        input_offset: where the input may lie in the arena, at no cost; None where it would make the arena larger.
        left_out: operators on real numbers that the caller has to do behind the output.
        peak_step: the layer of the step that needs most of the arena at once.
    """

    name: str
    graph: Graph
    steps: Sequence[Step]
    place: Mapping[str, str]
    scratch: Mapping[int, tuple[int, int]]
    buffers: Sequence[Buffer]
    arena: Arena
    input_offset: int | None
    left_out: Sequence[str]
    peak_step: str


def to_c(graph: Graph, *, at_rest: AtRest = AtRest.NATIVE) -> Exported:
    """Write a graph in C.

    Args:
        graph: quantized, as `verify_quantized` defines it.
        at_rest: how weights are stored; INT8: a byte each, for comparison.

    Returns:
        the source, and beside it header and kernels. Equal graphs give equal bytes.

    Raises:
        ExportError: the graph is float, or the kernels cannot do a node.
    """
    program = program_of(graph, at_rest=at_rest)
    weights = tuple(
        StoredWeight(
            layer=step.layer,
            bits=_bits(graph, step.layer),
            stored_bits=step.weights.bits,
            stored_bytes=step.weights.n_bytes,
            encoding=step.weights.form.name.lower(),
        )
        for step in program.steps
        if step.weights is not None
    )
    return Exported(
        format="c",
        data=source_text(program).encode(),
        weights=weights,
        at_rest=at_rest,
        companions=companions_of(program),
        flash_bytes=facts_of(program).constant_bytes,
        memory_plan=memory_plan(program),
    )


def kernel_files() -> dict[str, bytes]:
    """Give the kernels, by file name."""
    return {name: Path(__file__).with_name(name).read_bytes() for name in KERNELS}


def _bits(graph: Graph, layer: str) -> int:
    (quant,) = (graph.weight(node).quant for node in graph.layers() if node.name == layer)
    assert quant is not None
    return quant.bits


def program_of(graph: Graph, *, at_rest: AtRest = AtRest.NATIVE) -> Program:
    """Lower a graph and plan its memory.

    Raises:
        ExportError: as `to_c`.
    """
    if all(tensor.quant is None for tensor in graph.tensors.values()):
        raise ExportError("c: the network is float; compress it first, the kernels compute in integers")
    work = lower(graph, packed=at_rest is not AtRest.INT8)
    own = _shared_memory(work)
    source, result = work.memory_of(graph.inputs[0]), own(graph.outputs[0])
    buffers = {b.name: b for b in _buffers(work, own) if b.name != result}
    taken = buffers.pop(source)
    inside = buffers
    arena = arrange(inside.values())
    both = {**buffers, source: replace(taken, first=0)}
    with_input = arrange(both.values())
    input_offset = None
    if with_input.n_bytes == arena.n_bytes:
        inside, arena, input_offset = both, with_input, with_input.offsets[source]
    inside, arena = _with_free_memory(work.steps, inside, arena)
    place = {source: "in", result: "out"}
    place |= {name: f"memory + {arena.offsets[name]}" for name in buffers if not name.startswith(_SCRATCH)}
    keys = {i: f"{_SCRATCH}{i}" for i in range(len(work.steps)) if f"{_SCRATCH}{i}" in buffers}
    scratch = {i: (arena.offsets[key], inside[key].n_bytes) for i, key in keys.items()}
    names = {name for step in work.steps for name in step.pointers.values()}
    return Program(
        name=_c_name(graph.name),
        graph=graph,
        steps=work.steps,
        place={name: place[own(name)] for name in names},
        scratch=scratch,
        buffers=tuple(inside.values()),
        arena=arena,
        input_offset=input_offset,
        left_out=work.left_out,
        peak_step=_peak_step(work, buffers.values()),
    )


def _c_name(name: str) -> str:
    """Make a name for C of the network's, which may be anything."""
    plain = _NAME.sub("_", name.lower()).strip("_")[:MOST_NAME] or "net"
    return f"net_{plain}" if plain in RESERVED_NAMES or plain[0].isdigit() else plain


def _peak_step(work: Lowering, buffers: Collection[Buffer]) -> str:
    needs = [sum(b.n_bytes for b in buffers if b.first <= i <= b.last) for i in range(len(work.steps))]
    return work.steps[needs.index(max(needs))].name if needs else ""


# ---- memory ----------------------------------------------------------------------------------------------------------


def _lives(work: Lowering) -> dict[str, tuple[int, int]]:
    """Give the first and the last step that need each tensor."""
    found: dict[str, tuple[int, int]] = {}
    for i, step in enumerate(work.steps):
        for name in step.pointers.values():
            found[name] = (found.get(name, (i, i))[0], i)
    return found


def _shared_memory(work: Lowering) -> _Shared:
    lives = _lives(work)
    source, result = work.memory_of(work.graph.inputs[0]), work.memory_of(work.graph.outputs[0])
    shared = _Shared(work)
    for i, step in enumerate(work.steps):
        for name in step.may_overwrite:
            free = lives[name][1] == i and shared(name) != source and step.output != result
            # Only of one size: a smaller one would not need less.
            if free and shared.size(name) == shared.size(step.output) and lives[step.output][0] == i:
                shared.same[step.output] = shared(name)
                break
    return shared


class _Shared:
    """Looks up whose memory a tensor lives in.

    Attributes:
        same: the tensor whose memory an output takes over.
    """

    def __init__(self, work: Lowering) -> None:
        self._work = work
        self.same: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        name = self._work.memory_of(name)
        return self.same.get(name, name)

    def size(self, name: str) -> int:
        """Count the bytes of a tensor: one for each code."""
        return math.prod(self._work.graph.tensors[name].shape)


def _buffers(work: Lowering, own: _Shared) -> list[Buffer]:
    spans: dict[str, tuple[int, int]] = {}
    for name, (first, last) in _lives(work).items():
        before = spans.get(own(name), (first, last))
        spans[own(name)] = (min(before[0], first), max(before[1], last))
    found = [Buffer(name=n, n_bytes=own.size(n), first=first, last=last) for n, (first, last) in spans.items()]
    found += [
        Buffer(name=f"{_SCRATCH}{i}", n_bytes=step.scratch_bytes, first=i, last=i)
        for i, step in enumerate(work.steps)
        if step.scratch_bytes
    ]
    return found


def _with_free_memory(
    steps: Sequence[Step], buffers: Mapping[str, Buffer], arena: Arena
) -> tuple[dict[str, Buffer], Arena]:
    """Let scratch memory grow where that costs nothing: into what is free in the arena at that time."""
    grown, offsets = dict(buffers), dict(arena.offsets)
    lasting = [b for name, b in buffers.items() if not name.startswith(_SCRATCH)]
    for i, step in enumerate(steps):
        if step.more_scratch:
            offset, room = widest_gap(lasting, arena.offsets, arena.n_bytes, i)
            n_bytes = max(n for n in (step.scratch_bytes, *step.more_scratch) if n <= room)
            grown[f"{_SCRATCH}{i}"] = replace(grown[f"{_SCRATCH}{i}"], n_bytes=n_bytes)
            offsets[f"{_SCRATCH}{i}"] = offset
    return grown, replace(arena, offsets=offsets)


# ---- text ------------------------------------------------------------------------------------------------------------


def facts_of(program: Program) -> NetworkFacts:
    """Say what a caller and a linker have to know of a network."""
    graph = program.graph
    first, last = border_codes(graph)
    return NetworkFacts(
        name=program.name,
        graph_digest=graph.digest(),
        input=_border(graph, first),
        output=_border(graph, last),
        arena_bytes=program.arena.n_bytes,
        input_offset=program.input_offset,
        constant_bytes=sum(constant.n_bytes for step in program.steps for constant in step.constants),
        macs=sum(step.macs for step in program.steps),
        steps=tuple(_comment(step.name) for step in program.steps),
        weight_bytes={step.layer: step.weights.n_bytes for step in program.steps if step.weights is not None},
        peak_step=_comment(program.peak_step),
    )


def _border(graph: Graph, name: str) -> CodeBorder:
    tensor = graph.tensors[name]
    quant: QuantParams | None = tensor.quant
    assert quant is not None
    return CodeBorder(
        shape=stored_shape(tensor.shape)[1:], scale=np.float32(quant.scale), zero_point=int(quant.zero_point)
    )


def header_text(program: Program) -> str:
    """Write the header: what a caller has to know."""
    facts = facts_of(program)
    n, x, y = facts.name, facts.input, facts.output
    upper = n.upper()
    left = ""
    if program.left_out:
        left = f"\n * Not done here, on the real numbers behind the output: {', '.join(program.left_out)}."
    inside = ""
    if facts.input_offset is not None:
        inside = f"""\
/* The input may lie in the arena, but only here; it is then written over. */
#define {upper}_INPUT_OFFSET {facts.input_offset}

"""
    return f"""\
/* {_comment(program.graph.name)}, written by edgecomp; edit nothing here.
 *
 * in:  {_extent(x.shape)} codes, real = {_c_float(x.scale)} * (code - {_operand(x.zero_point)})
 * out: {_extent(y.shape)} codes, real = {_c_float(y.scale)} * (code - {_operand(y.zero_point)}){left}
 * constants: {facts.constant_bytes:,} bytes of weights and their scales; {facts.macs:,} multiplications a run
 */
#ifndef {upper}_H_
#define {upper}_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

#define {upper}_INPUT_BYTES {x.n_bytes}
#define {upper}_OUTPUT_BYTES {y.n_bytes}
#define {upper}_ARENA_BYTES {facts.arena_bytes}

{inside}/* Run the network. arena: {upper}_ARENA_BYTES on a multiple of 4; nothing in it is needed before or afterwards;
 * in and out belong to the caller and lie apart. Gives 0, or 1 where the arena is not on a multiple of 4. */
int {n}_run(const int8_t *in, int8_t *out, void *arena);

/* Real numbers, in the order of the codes, to codes, and back. */
void {n}_quantize(const float *real, int8_t *in);
void {n}_dequantize(const int8_t *out, float *real);

#ifdef {upper}_SELF_TEST
/* Run on fixed codes and compare with what the integer reference makes of them: 0 where all are equal, 1 where the
 * arena is not on a multiple of 4, 2 where a code differs. in and out are written. Compile network.c with
 * -D{upper}_SELF_TEST; it costs {y.n_bytes:,} bytes of flash and some code. */
int {n}_self_test(int8_t *in, int8_t *out, void *arena);
#endif

#ifdef __cplusplus
}}
#endif

#endif
"""


def source_text(program: Program) -> str:
    """Write the constants and the calls."""
    facts = facts_of(program)
    n, x, y = facts.name, facts.input, facts.output
    arrays = "\n".join(_constant(constant) for step in program.steps for constant in step.constants)
    calls = "\n".join(_call(program, i) for i in range(len(program.steps)))
    start = "  int8_t *memory = (int8_t *)arena;" if "memory" in calls else "  (void)arena;"
    body = f"""\
/* {_comment(program.graph.name)}, written by edgecomp; edit nothing here.
 *
{_table(program)}
 *
 * The arena, call by call; # is scratch memory:
 *
{_picture(program)}
 */
#include "{HEADER}"

#include "{KERNELS[1]}"

{arrays}

int {n}_run(const int8_t *in, int8_t *out, void *arena) {{
{start}
  if ((uintptr_t)arena & 3u) return 1;
{calls}
  return 0;
}}

void {n}_quantize(const float *real, int8_t *in) {{
  uint32_t i;
  for (i = 0; i < {x.n_bytes}u; i++) in[i] = edgecomp_code(real[i], {_c_float(x.scale)}, {x.zero_point});
}}

void {n}_dequantize(const int8_t *out, float *real) {{
  uint32_t i;
  for (i = 0; i < {y.n_bytes}u; i++) real[i] = (float)(out[i] - {_operand(y.zero_point)}) * {_c_float(y.scale)};
}}

#ifdef {n.upper()}_SELF_TEST
{_constant(Constant(name="self_test_out", type="int8_t", values=golden_output(program)))}

int {n}_self_test(int8_t *in, int8_t *out, void *arena) {{
  uint32_t i, state = 1;
  for (i = 0; i < {x.n_bytes}u; i++) {{
    state = state * {_LCG_FACTOR}u + {_LCG_TERM}u;
    in[i] = (int8_t)((int32_t)(state >> 24) - 128);
  }}
  if ({n}_run(in, out, arena)) return 1;
  for (i = 0; i < {y.n_bytes}u; i++) {{
    if (out[i] != self_test_out[i]) return 2;
  }}
  return 0;
}}
#endif
"""
    whole = replace(facts, files_sha256=digest_of(body.encode(), companions_of(program)))
    return f"{whole.to_line()}\n{body}"


def companions_of(program: Program) -> dict[str, bytes]:
    """Give header and kernels, by file name."""
    return {HEADER: header_text(program).encode(), **kernel_files()}


def golden_output(program: Program) -> Array:
    """Give the codes, as the network lays them out, that the reference makes of the self-test's input.

    That is the upper byte, less 128, of state = state * 1664525 + 1013904223 modulo 2**32, from 1 on (the generator of
    Numerical Recipes): as good as random, and it takes no flash.
    """
    shape = facts_of(program).input.shape
    state, codes = 1, []
    for _ in range(math.prod(shape)):
        state = (state * _LCG_FACTOR + _LCG_TERM) & 0xFFFF_FFFF
        codes.append((state >> 24) - 128)
    image = np.array(codes, dtype=np.int8).reshape(1, *shape)
    result = run_codes(program.graph, image.transpose(0, 3, 1, 2) if image.ndim == 4 else image)
    return (result.transpose(0, 2, 3, 1) if result.ndim == 4 else result).reshape(-1)


def _operand(value: int) -> str:
    return f"({value})" if value < 0 else str(value)


def _call(program: Program, i: int) -> str:
    step = program.steps[i]
    pointers = {key: program.place[name] for key, name in step.pointers.items()}
    if i in program.scratch:
        offset, n_bytes = program.scratch[i]
        pointers |= {"scratch": f"memory + {offset}", "scratch_bytes": str(n_bytes)}
    return f"  {step.kernel}({step.arguments.format(**pointers)}); /* {_comment(step.name)} */"


def _table(program: Program) -> str:
    """Show which kernel runs each layer, on what."""
    head = ("layer", "kernel", "weights", "bytes", "scratch bytes", "multiplications")
    rows = [head]
    for i, step in enumerate(program.steps):
        w = step.weights
        scratch = program.scratch.get(i, (0, 0))[1]
        stored = "" if w is None else f"{w.form.name.lower()}, {w.bits} bits"
        size = "" if w is None else f"{w.n_bytes:,}"
        kernel = step.kernel.removeprefix("edgecomp_")
        rows.append((_comment(step.name), kernel, stored, size, f"{scratch:,}", f"{step.macs:,}"))
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    lines = (" * " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def memory_plan(program: Program) -> str:
    """Draw what lies where in the arena, call by call."""
    if not program.arena.n_bytes:
        return "nothing"
    scratch = {b.name for b in program.buffers if b.name.startswith(_SCRATCH)}
    return "\n".join(drawn(program.buffers, program.arena, [_comment(s.name) for s in program.steps], scratch))


def _picture(program: Program) -> str:
    return "\n".join(f" * {line}".rstrip() for line in memory_plan(program).splitlines())


def _constant(constant: Constant) -> str:
    if isinstance(constant.values, str):
        return f"static const {constant.type} {constant.name} = {constant.values};"
    numbers = [_literal(int(v)) for v in constant.values]
    lines, line = [], " "
    for number in numbers:
        if len(line) + len(number) + 2 > _WIDTH:
            lines.append(line)
            line = " "
        line += f" {number},"
    lines.append(line)
    body = "\n".join(lines)
    return f"static const {constant.type} {constant.name}[{len(numbers)}] = {{\n{body}\n}};"


def _literal(value: int) -> str:
    # -2147483648 is no literal in C: it is a minus before a number that an int cannot hold.
    return str(value) if value > -(1 << 31) else "-2147483647 - 1"


def _c_float(scale: np.float32) -> str:
    """Write a float32 so that it is read back as it was."""
    return f"{np.format_float_scientific(scale, unique=True, trim='0')}f"


def _extent(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _comment(text: str) -> str:
    """Make text safe within a comment."""
    plain = "".join(c if " " <= c <= "~" else "?" for c in text)
    return plain.replace("*/", "* /").replace("/*", "/ *").replace("??", "? ?")
