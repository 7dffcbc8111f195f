"""The same files in every runtime that is supported: `python -m tests.runtimes --folder .runtimes`.

Each line of runtimes.txt is a virtual environment, made by pip when it is missing. A handful of small networks, in all
widths and ways to store weights, are exported once and run in each environment (`runtimes_run`). What must hold:

- ONNX: outputs are the same bytes in all versions; in what each of them really executes no weight is left to unpack.
  On an emulated board too, but for the last bit of a softmax on real numbers.
- TFLite, in each runtime and by each kind of kernels: a packed file gives the bytes that the int8 file gives; by the
  built-in ones, an int4 file that our reader widens gives those that it gives as it is.
- TFLite, operator by operator on the reference's own inputs: both runtimes' built-in kernels, and both runtimes'
  reference kernels, give the same bytes but for EXCEPTIONS, and are one step from our reference at most, as XNNPACK is.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgecomp import quantmath, reference
from edgecomp.coding import encode
from edgecomp.compress import compress
from edgecomp.exporters import export
from edgecomp.graph import Array, Graph, Node, Op, Tensor
from edgecomp.plan import Io
from edgecomp.report import table
from edgecomp.targets import cores, emulated
from tests.graphs import GRAPHS, Build, alone, dense, images, plan_for
from tests.packed_files import wide

HERE = Path(__file__).parent
PINS = HERE / "runtimes.txt"
READY = "ready.txt"
N_IMAGES = 8
FORMS = {
    "onnx": "onnx",
    "tflite": "tflite",
    "tflite-int8": "int8.tflite",
    "tflite-packed": "packed.tflite",
}
# Operators that LiteRT computes in another way than tflite-runtime 2.14 did, by kind of kernels: rounding alone.
EXCEPTIONS = {("reference", "linear"), ("built-in", "depthwise"), ("built-in", "global_avg_pool")}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, or a single operator of one, and what integer arithmetic says of its inputs.

    Attributes:
        graph: quantized.
        inputs: in order.
        want: the reference's output.
        kind: of a single operator; empty for a network.
    """

    graph: Graph
    inputs: tuple[Array, ...]
    want: Array
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What came out of one environment.

    Attributes:
        facts: "runtime" and "numpy" with their versions, "machine", "in_xnnpack": the files that XNNPACK took over.
        outputs: by file and kernels; a text where the runtime refuses the file.
        folder: where the optimized models lie.
    """

    facts: Mapping[str, Any]
    outputs: Mapping[tuple[str, str], Array | str]
    folder: Path


# ---- files -----------------------------------------------------------------------------------------------------------


def groups(seed: int = 0) -> Graph:
    """Layers most of whose weights are zero; in those of a million two or four neighbouring codes are one symbol."""
    b = Build(seed, (64, 2, 2))
    x = b.clip("relu", b.conv("conv", b.clip("stem.relu", b.conv("stem", "input", 256)), 456))
    x = b.node(Op.FLATTEN, "flatten", (b.node(Op.GLOBAL_AVG_POOL, "mean", (x,), {}),), {})
    x = b.linear("fc", x, 2304)
    for name, step in (("stem", 2.2), ("conv", 6.6), ("fc", 2.2)):
        old = b.tensors[f"{name}.weight"]
        codes = np.rint(b.rng.standard_normal(old.shape) / step)
        b.tensors[old.name] = Tensor(name=old.name, shape=old.shape, data=(codes * 0.1).astype(np.float32))
    return b.graph(x, "groups")


def reshaped(seed: int = 0) -> Graph:
    """Images of one shape read as images of another, then as features, between layers."""
    b = Build(seed, (3, 8, 8))
    x = b.node(Op.RESHAPE, "view", (b.clip("stem.relu", b.conv("stem", "input", 8)),), {"shape": (1, 16, 4, 8)})
    x = b.clip("conv.relu", b.conv("conv", x, 6, stride=(2, 2)))
    return b.graph(b.linear("fc", b.node(Op.RESHAPE, "features", (x,), {"shape": (1, 48)}), 10), "reshaped")


def cases() -> dict[str, Case]:
    """Every width as dense codes, words in groups of 1, 2 and 4, every kind of network, both kinds of borders."""
    rows: list[tuple[Callable[[], Graph], int | Mapping[str, int], Io]] = [
        *((GRAPHS["plain"], bits, Io.INT8) for bits in range(2, 9)),
        (GRAPHS["residual"], 4, Io.INT8),
        (GRAPHS["separable"], 3, Io.FLOAT),
        (GRAPHS["separable"], 4, Io.INT8),
        (GRAPHS["branches"], 5, Io.INT8),
        (GRAPHS["gated"], 4, Io.FLOAT),
        (GRAPHS["gated"], 8, Io.INT8),
        (GRAPHS["shuffled"], 4, Io.INT8),
        (reshaped, 5, Io.INT8),
        (dense, 6, Io.INT8),
        (wide, 2, Io.INT8),
        (groups, {"stem": 3, "conv": 2, "fc": 3}, Io.INT8),
    ]
    found = {}
    for make, bits, io in rows:
        graph = make()
        quantized = compress(graph, plan_for(graph, bits, io=io))
        x, quant = images(graph, N_IMAGES), quantized.tensors["input"].quant
        x = x if quant is None else quantmath.quantize(x, quant)
        values = reference.run(quantized, {"input": x})
        name = f"{graph.name}-{bits if isinstance(bits, int) else 'mixed'}-{io}"
        found[name] = Case(graph=quantized, inputs=(x,), want=values[quantized.outputs[0]])
        if io is Io.INT8 and graph.name != "groups":
            for node in quantized.nodes:
                found[f"{name}@{node.name.replace('.', '_')}"] = single(quantized, node, values)
    return found


def single(graph: Graph, node: Node, values: Mapping[str, Array]) -> Case:
    one = alone(graph, node)
    depthwise = node.op is Op.CONV2D and node.attrs["groups"] == graph.tensors[node.inputs[0]].shape[1] > 1
    return Case(
        graph=one,
        inputs=tuple(values[name] for name in one.inputs),
        want=values[node.outputs[0]],
        kind="depthwise" if depthwise else node.op.value,
    )


def write_files(folder: Path, found: Mapping[str, Case]) -> None:
    for name, case in found.items():
        np.savez(folder / f"{name}.npz", **{str(i): x for i, x in enumerate(case.inputs)})
        for form, suffix in {"tflite-int8": "int8.tflite"}.items() if case.kind else FORMS.items():
            data = export(case.graph, form).data
            (folder / f"{name}.{suffix}").write_bytes(data)
            if form == "tflite":  # int4 as other tools write it too, and what our reader makes of it
                (folder / f"{name}.widened.tflite").write_bytes(data)


def encodings(graph: Graph) -> Counter[str]:
    """Count layers by how their weights are stored in ONNX: "dense 5 bits", "words, groups of 2"."""
    found: Counter[str] = Counter()
    words_pay = any(w.encoding == "words" for w in export(graph, "onnx").weights)
    for node in graph.layers():
        weight = graph.weight(node)
        assert weight.data is not None
        assert weight.quant is not None
        encoded = encode(weight.data, weight.quant.bits)
        if encoded.words is None or not words_pay:
            found[f"dense {weight.quant.bits} bits"] += 1
        else:
            found[f"words, groups of {encoded.words.symbols.shape[1]}"] += 1
    return found


# ---- environments ----------------------------------------------------------------------------------------------------


def pins(text: str) -> dict[str, list[str]]:
    """Read runtimes.txt: the packages of each environment.

    Raises:
        ValueError: a line is something else.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, *packages = line.partition("#")[0].split() or [""]
        if name and (name in found or not packages or not all(re.fullmatch(r"[\w-]+==[\w.]+", p) for p in packages)):
            raise ValueError(f"runtimes.txt:{number}: found {line!r:.80}, expected a new NAME and PACKAGE==VERSION ...")
        if name:
            found[name] = packages
    return found


def is_ready(home: Path, packages: Sequence[str]) -> bool:
    ready = home / READY
    return ready.is_file() and ready.read_text("utf-8").split() == list(packages)


def make(home: Path, packages: Sequence[str]) -> None:
    """Make an environment, unless it is there with these packages.

    Raises:
        subprocess.CalledProcessError: venv or pip fails; its own output says why.
    """
    if is_ready(home, packages):
        return
    python, pip = home / "bin" / "python", ["-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", "--clear", home], [python, *pip, "--no-deps", *packages]):
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    (home / READY).write_text(" ".join(packages), "utf-8")  # last, so that an interrupted installation is repeated


def run(home: Path, files: Path, results: Path) -> Ran:
    """Run all files in an environment.

    Raises:
        subprocess.CalledProcessError: something but a refused file went wrong; its own output says what.
    """
    results.mkdir()
    script = [HERE / "runtimes_run.py", HERE.parent, files, results]
    # -I: no PYTHONPATH of this process may put other packages before the environment's.
    subprocess.run([home / "bin" / "python", "-I", *script], check=True, stdin=subprocess.DEVNULL)
    return read_results(results)


def run_emulated(target: str, files: Path, results: Path) -> Ran:
    """Run the ONNX files on an emulated board, which is installed where it is not there yet.

    Raises:
        subprocess.CalledProcessError: as `run`.
        TargetError: it cannot be installed.
    """
    root = emulated.install(lambda name, total: nullcontext(lambda n: None))
    with tempfile.TemporaryDirectory(prefix="edgecomp-emulated-") as folder:
        place = Path(folder)
        shutil.copytree(files, place / "files", ignore=shutil.ignore_patterns("*.tflite"))
        shutil.copy(HERE / "runtimes_run.py", place)
        for name in ("edgecomp", "exporters", "targets"):
            shutil.copytree(HERE.parent / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "samples"))
        (place / "results").mkdir()
        script = [f"{emulated.WORK}/{name}" for name in ("runtimes_run.py", ".", "files", "results")]
        command = emulated.inside(root, cores.core_of(target), place, ["/usr/bin/python3", "-I", *script])
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        shutil.copytree(place / "results", results)
    return read_results(results)


def read_results(results: Path) -> Ran:
    outputs: dict[tuple[str, str], Array | str] = {}
    for path in sorted((*results.glob("*.npy"), *results.glob("*.txt"))):
        file, _, kernels = path.stem.rpartition(".")
        outputs[file, kernels] = np.load(path) if path.suffix == ".npy" else path.read_text("utf-8")
    return Ran(facts=json.loads((results / "facts.json").read_text("utf-8")), outputs=outputs, folder=results)


# ---- what must hold --------------------------------------------------------------------------------------------------


def steps_apart(got: Array, want: Array) -> float | None:
    """How far two outputs are apart at most: None for the same bytes, infinite if they cannot be compared."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return np.inf
    if got.tobytes() == want.tobytes():
        return None
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max())


def compared(ran: Ran, kernels: str, wants: Mapping[str, Array | str]) -> dict[str, float | None]:
    """Compare all outputs by some kernels with those of the same files in `wants`, where both are outputs."""
    return {
        file: steps_apart(got, want)
        for (file, by), got in ran.outputs.items()
        if by == kernels and isinstance(got, np.ndarray) and isinstance(want := wants.get(file), np.ndarray)
    }


def by_kernels(ran: Ran, kernels: str) -> dict[str, Array | str]:
    return {file: got for (file, by), got in ran.outputs.items() if by == kernels}


def name_of(ran: Ran) -> str:
    machine = ran.facts["machine"]
    return ran.facts["runtime"] + (f", {machine}" if machine == "aarch64" else "")


def onnx_defects(ran: Ran, newest: Ran, found: Mapping[str, Case]) -> list[str]:
    who, lines = name_of(ran), []
    # Another processor's exponential function may end in another last bit: that is a softmax on real numbers.
    allowed = 0.0 if ran.facts["machine"] == newest.facts["machine"] else 1e-6
    for file, steps in compared(ran, "default", by_kernels(newest, "default")).items():
        if steps is not None and not 0 < steps < allowed:
            lines.append(f"{who}: {file}: not the bytes of {name_of(newest)}, up to {steps:g} apart")
    for name, case in found.items():
        if not case.kind:
            model = onnx.load(ran.folder / f"{name}.onnx.optimized.onnx")
            if text := not_folded(model, len(case.graph.layers())):
                lines.append(f"{who}: {name}.onnx: {text}")
    return lines


def tflite_defects(ran: Ran, newest: Ran, found: Mapping[str, Case]) -> list[str]:
    who, lines = ran.facts["runtime"], []
    for kernels in sorted({by for _, by in ran.outputs}):
        mine = by_kernels(ran, kernels)
        plain = {file.replace(".int8.", ".packed."): got for file, got in mine.items() if ".int8." in file}
        if kernels == "built-in":  # others may have a kernel for int4 that rounds as its authors liked
            plain |= {file.replace(".tflite", ".widened.tflite"): mine[file] for file in mine if file.count(".") == 1}
        lines += [
            f"{who}, {kernels}: {file}: not the bytes of the ordinary file, up to {steps:g} apart"
            for file, steps in compared(ran, kernels, plain).items()
            if steps is not None
        ]
        singles = {f"{name}.int8.tflite": case for name, case in found.items() if case.kind}
        for file, steps in compared(ran, kernels, {file: case.want for file, case in singles.items()}).items():
            if steps is not None and steps > 1:
                lines.append(f"{who}, {kernels}: {file}: {steps:g} steps from the reference")
        # tflite-runtime's default kernels are the built-in ones: its XNNPACK takes no integers.
        for file, steps in compared(ran, kernels, by_kernels(newest, kernels)).items():
            case = singles.get(file)
            if kernels != "default" and case and steps is not None and (kernels, case.kind) not in EXCEPTIONS:
                lines.append(f"{who}, {kernels}: {file}: not the bytes of {newest.facts['runtime']}, {steps:g} apart")
    return lines


def not_folded(model: onnx.ModelProto, n_layers: int) -> str:
    """Say what of the weights an optimized model would still unpack in every run, nothing if it is folded.

    Args:
        model: as onnxruntime saves it.
        n_layers: convolutions and linear layers of the network.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    # 1.17 reshapes a gate's constant, a single number, in every run: that is no weight.
    single = {tensor.name for tensor in model.graph.initializer if math.prod(tensor.dims) == 1}
    left: Counter[str] = Counter()
    for node in model.graph.node:
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
            left[node.op_type] += node.input[0] not in single
    ops = Counter(node.op_type for node in model.graph.node)
    layers = ops["QLinearConv"] + ops["QGemm"]
    if +left:
        return "computed from constants in every run: " + ", ".join(f"{n} {op}" for op, n in sorted(left.items()))
    if layers != n_layers:
        executed = ", ".join(f"{n} {op}" for op, n in ops.items())
        return f"{layers} QLinearConv and QGemm for {n_layers} layers: {executed}"
    return ""


# ---- the whole matrix ------------------------------------------------------------------------------------------------


def matrix(folder: Path, names: Sequence[str], board: str | None = None) -> tuple[str, list[str]]:
    """Run everything.

    Args:
        folder: of the environments.
        names: of those to run, oldest first.
        board: an emulated one, if that is to run the ONNX files too.

    Returns:
        a table, and what does not hold.
    """
    found = cases()
    with tempfile.TemporaryDirectory(prefix="edgecomp-runtimes-") as place:
        files = Path(place) / "files"
        files.mkdir()
        write_files(files, found)
        ran = [run_emulated(board, files, Path(place) / board)] if board else []
        ran += [run(folder / name, files, Path(place) / name) for name in names]
        rows, lines = [], []
        for result in ran:
            is_onnx = "onnxruntime" in result.facts["runtime"]
            newest = next(r for r in reversed(ran) if ("onnxruntime" in r.facts["runtime"]) == is_onnx)
            lines += (onnx_defects if is_onnx else tflite_defects)(result, newest, found)
            rows += [_row(result, newest, by, found) for by in sorted({by for _, by in result.outputs})]
    heads = ("runtime", "numpy", "kernels", "in XNNPACK", "networks as the newest", "operators as the newest",
             "operators as our reference", "refused")  # fmt: skip
    refusals = sorted({text for result in ran for text in _refusals(result)})
    return "\n".join((table(rows, heads), "", *refusals)), lines


def _row(ran: Ran, newest: Ran, kernels: str, found: Mapping[str, Case]) -> tuple[str, ...]:
    against_newest = compared(ran, kernels, by_kernels(newest, kernels))
    wants = {file: found[file.partition(".")[0]].want for file in by_kernels(ran, kernels)}
    against_us = compared(ran, kernels, wants)
    mine = by_kernels(ran, kernels)
    in_xnnpack = len(ran.facts["in_xnnpack"]) if kernels == "default" and ".onnx" not in next(iter(mine)) else None
    return (
        name_of(ran),
        ran.facts["numpy"],
        kernels,
        "-" if in_xnnpack is None else f"{in_xnnpack} of {len(mine)}",
        _share(steps for file, steps in against_newest.items() if "@" not in file),
        _share(steps for file, steps in against_newest.items() if "@" in file),
        _share(steps for file, steps in against_us.items() if "@" in file),
        str(sum(isinstance(got, str) for got in mine.values())),
    )


def _refusals(ran: Ran) -> Iterator[str]:
    """Name what a runtime refuses, and why, without the files' own numbers."""
    for (file, kernels), got in ran.outputs.items():
        if isinstance(got, str):
            suffix, why = file.partition(".")[2], re.sub(r"Node number \d+", "node", got)
            yield f"{ran.facts['runtime']}, {kernels} kernels, refuses a network as .{suffix}: {why:.160}"


def _share(steps: Iterable[float | None]) -> str:
    """Say how many are the same bytes, and how far the others are off at most."""
    steps = list(steps)
    off = [s for s in steps if s is not None]
    if not steps:
        return "-"
    return f"{len(steps) - len(off)} of {len(steps)}" + (f", else {max(off):.3g} apart" if off else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.runtimes", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where environments are kept; by default they are thrown away")
    parser.add_argument("--only", action="append", help="a line of runtimes.txt by its name; may be given again")
    boards = [name for name, core in cores.EMULATED.items() if core.machine is cores.AARCH64]
    parser.add_argument("--emulated", choices=boards, help="also on this board; ONNX only")
    args = parser.parse_args(argv)
    lines = pins(PINS.read_text("utf-8"))
    names = args.only or list(lines)
    if unknown := set(names) - lines.keys():
        parser.error(f"no environment {', '.join(sorted(unknown))}; there are {', '.join(lines)}")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="edgecomp-runtimes-"))
    try:
        for name in names:
            make(folder / name, lines[name])
        text, wrong = matrix(folder, [name for name in lines if name in names], args.emulated)
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(map(str, error.cmd[:5]))} ended with code {error.returncode}", file=sys.stderr)
        return 1
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    print(text)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
