"""Graphs as files: one function a format, in one visible table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgecomp.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgecomp.artifact import Exported
    from edgecomp.graph import Graph

FORMATS = ("onnx", "tflite", "tflm", "c")
"""What `export` can write; "tflm" is a TFLite file for TFLite Micro, "c" source for firmware."""


def export(graph: Graph, form: str) -> Exported:
    """Write a float or quantized graph in a format.

    Args:
        graph: see `edgecomp.verify` for what is legal.
        form: one of FORMATS, or with the way to store weights, as `artifact.form_of` names it.

    Raises:
        ExportError: the format is unknown, its writer library is missing, or it cannot express the graph.
    """
    from edgecomp.artifact import AtRest

    _, _, rest = form.partition("-")
    at_rest = AtRest(rest) if rest in tuple(AtRest) else AtRest.NATIVE
    match form:
        case "onnx" | "onnx-int8":
            from .to_onnx import to_onnx

            return to_onnx(graph, at_rest=at_rest)
        case "tflite" | "tflite-int8" | "tflite-packed":
            from .to_tflite import to_tflite

            return to_tflite(graph, at_rest=at_rest)
        case "tflm" | "tflm-int8":
            from .to_tflite import to_tflm

            return to_tflm(graph, at_rest=at_rest)
        case "c" | "c-int8":
            from .to_c import to_c

            return to_c(graph, at_rest=at_rest)
        case _:
            raise ExportError(f"format {form!r} is unknown; expected one of {', '.join(FORMATS)}")


def files_of(exported: Exported) -> Mapping[str, bytes]:
    """Give the files to write by name: the exported one and its companions; for TFLite Micro the same in C++."""
    from edgecomp.artifact import FILES

    from .c_array import c_array

    name, *others = FILES[exported.format]
    array = c_array(exported.data) if exported.format == "tflm" else (exported.companions[n] for n in others)
    return {name: exported.data, **dict(zip(others, array, strict=True))}
