"""onnxruntime.quantization: static int8 in QDQ form, weights per channel, ranges from the calibration images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .peer_entry import Job


def compress(job: Job) -> dict[str, Any]:
    """Quantize the job's ONNX file; `options["calibrate"]` is "MinMax", "Entropy" or "Percentile"."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(job.onnx).graph.input[0].name

    class Reader(CalibrationDataReader):
        """Hands out the calibration images."""

        def __init__(self) -> None:
            self._batches = job.batches()

        def get_next(self) -> dict[str, Any] | None:
            """Give the next batch by the input's name."""
            x = next(self._batches, None)
            return None if x is None else {name: x}

    prepared = job.folder / "prepared.onnx"
    # Symbolic inference serves transformers; the plain one is enough here.
    quant_pre_process(str(job.onnx), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(job.folder / "model.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[job.options["calibrate"]],
    )
    return {"file": "model.onnx", "details": {}}
