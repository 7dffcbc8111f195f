"""nncf: int8 after training of the ONNX file, with its fast bias correction; weights stored as int8."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .peer_entry import Job


def compress(job: Job) -> dict[str, Any]:
    """Quantize the job's ONNX file with nncf's defaults over all calibration images."""
    os.environ["NNCF_CI"] = "1"  # nncf's switch that keeps it from reporting its use to its makers
    import nncf
    import onnx

    model = onnx.load(job.onnx)
    name = model.graph.input[0].name
    images, _ = job.calibration()
    # One image at a time: nncf counts samples, and takes each item for one.
    data = nncf.Dataset([images[i : i + 1] for i in range(len(images))], lambda x: {name: x})
    quantized = nncf.quantize(model, data, subset_size=len(images))
    onnx.save(quantized, job.folder / "model.onnx")
    return {"file": "model.onnx", "details": {"preset": "performance", "bias_correction": "fast"}}
