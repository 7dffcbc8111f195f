"""The page that explains an output folder to who opens it: Markdown made from the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgecomp.artifact import FILES
from edgecomp.methods import CHOSEN, OURS
from edgecomp.report import table

_BUDGETS = {
    "avg_bits": "mean bits a weight, at most",
    "max_size": "bytes of the largest file, at most",
    "max_drop": "points of accuracy lost by the worst file on held-out training images, at most",
}
_FILES = {
    "model.onnx": "the compressed network for onnxruntime 1.17 or newer; weights are unpacked once, at load; in little "
    "memory by edgecomp.runtime.onnx_session",
    "model.tflite": "the compressed network for LiteRT / TensorFlow Lite",
    "model.tflite, packed": "the compressed network for LiteRT / TensorFlow Lite; unpack it before running, see below",
    "model.tflm.tflite": "the compressed network for TFLite Micro; each weight is decoded before its layer runs",
    "model.cc": "the same file as an array for a firmware, with model.h",
    "model.h": "the array's declaration",
    "network.c": "the compressed network in C99 for a firmware: constants, one call a layer",
    "network.h": "what a caller has to know: NAME_run(), sizes of input, output and arena, scales",
    "edgecomp_kernels.c": "the kernels that every network in C shares",
    "edgecomp_kernels.h": "their declarations",
    "graph.edgecomp": "the float network, BatchNorm folded, adjusted to the plan; the two give every file again",
    "plan.json": "what was decided: channels kept, bits of each layer, activation ranges, preprocessing",
    "manifest.json": "what was measured, byte counts, digests and tool versions, for programs",
}
_PACKED = """
## Running the packed TFLite file

It is widened to int8 in memory, and then runs like any int8 file; stock interpreters refuse it as it is.

    edgecomp unpack DIR/model.tflite -o full.tflite        # or, on the device, with numpy alone:
    interpreter = Interpreter(model_content=edgecomp.runtime.load("model.tflite"))

In C++ edgecomp_unpack.hpp does the same; `edgecomp unpack --cpp-header` says where it is.
"""

_MICRO = """
## The TFLite Micro file

Its arena took {arena_total_bytes} bytes in the interpreter on the machine that built it: {arena_head_bytes} for
activations and decoded weights, {arena_tail_bytes} for records, most of which are smaller where pointers have 32 bits.
`edgecomp inspect DIR/model.tflm.tflite` lists the operators that a MicroMutableOpResolver must know; TFLM_DECODE is
AddDecode(). For less RAM and more flash: `edgecomp export ... --format tflm --weights-at-rest int8`.
"""

_FIRMWARE = """
## The network in C

Add network.c and edgecomp_kernels.c to the firmware's sources, with no more than <stdint.h> and <string.h> behind them.
The caller gives {arena_bytes} bytes of RAM for the time of a call; network.h says whether the input may lie there, too.
Weights and scales take {flash_bytes} bytes of flash (this is what counts as the file's bytes above), and stay packed
there. Images are height x width x channels.

    #include "network.h"          // says the sizes, and what the codes mean
    static int32_t arena[..._ARENA_BYTES / 4];
    ..._run(input_codes, output_codes, arena);

The first lines of network.c show which kernel runs each layer. What lies where in the arena, call by call; # is scratch
memory:

"""


def results_table(record: Mapping[str, Any]) -> str:
    """Give the table of bytes and accuracies, float model first.

    Args:
        record: a manifest.
    """
    base = record["float"]
    rows: list[tuple[object, ...]] = [
        ("float weights", base["weight_bytes"], "1.0x", "32.00", f"{base['accuracy']:.2f} %", "-", "-", "torch")
    ]
    for a in record["artifacts"]:
        parity = a["parity"]
        rows.append(
            (
                a["path"],
                size := a.get("flash_bytes", a["bytes"]),
                f"{base['weight_bytes'] / size:.1f}x",
                f"{a['mean_bits']:.2f}",
                f"{a['accuracy']['value']:.2f} %",
                f"{round(a['accuracy']['value'] - base['accuracy'], 2) + 0.0:+.2f}",
                f"{parity['equal_percent']:.2f} % (max {parity['max_steps']})",
                a["accuracy"]["runtime"],
            )
        )
    header = ("file", "bytes", "smaller", "bits a weight", "accuracy", "points", "equal to reference", "runtime")
    return table(rows, header)


def layers_table(record: Mapping[str, Any]) -> str:
    """Give the table of layers.

    Args:
        record: a manifest.
    """
    rows = [
        (
            layer["name"],
            layer["kind"],
            layer["weights"],
            f"{layer['kept_channels']}/{layer['channels_before']}",
            layer["bits"],
            f"{layer['zero_percent']:.1f} %",
            f"{layer['relevance']:.2f} %",
            layer["stored_bytes"],
            "█" * layer["bits"],
        )
        for layer in record["layers"]
    ]
    return table(
        rows, ("layer", "kind", "weights", "channels", "bits", "zeros", "relevance", "stored bytes", "bits drawn")
    )


def _making(record: Mapping[str, Any], made_by: Mapping[str, str]) -> str:
    """Say in plain words what was done to the network, a line for each step that was taken."""
    layers = record["layers"]
    weights, weights_before, channels, channels_before = (
        sum(layer[key] for layer in layers) for key in ("weights", "weights_before", "kept_channels", "channels_before")
    )
    lines = []
    if "classes" in made_by:
        lines.append(f"For {made_by['classes']}. Outputs, images, relevance and every figure here are theirs alone.")
    if "relevance" in made_by:
        lines.append(f"What matters was told by {made_by['relevance']}, on {made_by['samples']} training images.")
    if channels < channels_before:
        asked = made_by.get("pruning", "zero")
        what = "channels without any relevance" if asked == "zero" else f"whole channels (--prune {asked})"
        if "latency" in made_by:
            what = f"whole channels, for a latency of {made_by['latency']}"
        if "classes" in made_by:
            what = f"outputs of the other classes, and {what}{', if any' if asked == 'zero' else ''}"
        lines.append(
            f"Cut: {what}; {channels} of {channels_before} output channels are left, {weights} of {weights_before} "
            f"weights, {100 * weights / weights_before:.1f} %."
        )
    if made_by.get("sparsifying", "none") != "none":
        option = "" if "method" in made_by and made_by["method"] != OURS else " (--sparsify)"
        lines.append(f"Single weights set to zero{option}: {made_by['sparsifying']}.")
    if made_by.get("reconstruction", "none") != "none":
        lines.append(f"Reconstruction on the same images, without labels: {made_by['reconstruction']}.")
    if "recovery" in made_by:
        lines.append(f"Recovery, fine-tuning to the uncut float network's answers: {made_by['recovery']}.")
    if made_by.get("method", OURS) != OURS:
        chosen = [f"\n  - {name.removeprefix(CHOSEN)}: {how}" for name, how in made_by.items() if CHOSEN in name]
        lines.append(f"By a paper's recipe, {made_by['method']}. What it leaves open was chosen here:{''.join(chosen)}")
    return "".join(f"- {line}\n" for line in lines)


def _measuring(record: Mapping[str, Any]) -> str:
    """Give the commands that measure the files of a folder."""
    lines = []
    if others := [a["path"] for a in record["artifacts"] if a["format"] != "c"]:
        lines.append("bench DIR            # latency and memory beside the float and the plain int8 model")
        lines.append(f"inspect DIR/{others[0]}")
    if len(others) < len(record["artifacts"]):
        lines.append("bench DIR --target cortex-m4     # instructions, flash and RAM on an emulated core")
        lines.append("gate DIR --max-flash 64K --max-ram 32K")
    return "".join(f"    edgecomp {line}\n" for line in lines)


def overview(record: Mapping[str, Any], made_by: Mapping[str, str], memory_plan: str | None = None) -> str:
    """Write the page.

    Args:
        record: a manifest.
        made_by: what the plan says of its making, see `plan.CompressionPlan`.
        memory_plan: a picture of it, of the network in C; None where there is none.
    """
    budget, n = record["budget"], record["float"]["n"]
    first_artifact = record["artifacts"][0]
    first_form = first_artifact["format"]
    if first_form == "tflite" and first_artifact.get("weights_at_rest", "native") != "native":
        first_form += f" --weights-at-rest {first_artifact['weights_at_rest']}"
    names = [a["path"] + ", packed" * (a.get("weights_at_rest") == "packed") for a in record["artifacts"]]
    names += [name for a in record["artifacts"] for name in FILES[a["format"]][1:]]
    names += ["graph.edgecomp", "plan.json", "manifest.json"]
    files = [(name, what) for name, what in _FILES.items() if name in names]
    packed = _PACKED if any(name.endswith(", packed") for name in names) else ""
    packed += "".join(_MICRO.format_map(a) for a in record["artifacts"] if "arena_total_bytes" in a)
    packed += "".join(_FIRMWARE.format_map(a) for a in record["artifacts"] if a["format"] == "c")
    packed += "".join(f"    {line}\n" for line in (memory_plan or "").splitlines())
    first = record["artifacts"][0]["path"]
    unmet = "" if budget["met"] else " (not met)"
    return f"""# {record["model"]}, compressed by edgecomp

{results_table(record)}

The float row counts the weights alone, as float32. Accuracies are measured on {n} test images, those of a file through
the runtime named; "equal to reference" compares the file's outputs with edgecomp's integer reference, in steps of the
last place. A file is accepted when on 99 % of them it names the reference's class, or one within 4 steps of it.
Budget: {_BUDGETS[budget["kind"]]} {budget["asked"]:g}, came to {budget["got"]:g}{unmet}.

## How it was made

{_making(record, made_by)}
## Files

{table(files, ("file", "what it is"))}

## Layers

{layers_table(record)}

"relevance" is the layer's share of all absolute relevance at layer outputs; "bits" are those of the plan, "stored
bytes" those in {first}. ONNX and packed TFLite store codes that are unevenly used in fewer bits than that; for TFLite
Micro they are indices into a table of those that occur, or 8 bits and a map of the zeros; C has both, in any width;
other TFLite stores 4 or 8 bits, whichever holds the codes.
{packed}
## What next, with this folder for DIR

    edgecomp verify DIR           # digests, accuracy and parity again
{_measuring(record)}    edgecomp export DIR/plan.json --graph DIR/graph.edgecomp --format {first_form} -o NEW
"""
