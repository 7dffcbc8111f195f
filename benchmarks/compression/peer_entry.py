"""Run one peer in the peer's own environment: the script that `peers.run_peer` starts there.

`ENVIRONMENT/bin/python -I peer_entry.py JOB.json`: reads the job, loads the peer's module by its path, calls its
`compress(job)`, and writes what that gives into result.json in the job's folder. Stands alone: neither edgecomp nor any
module beside this one can be imported there. A peer never sees the labels of the test images.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

RESULT = "result.json"
BATCH = 64
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[Any] = []  # torch forgets the schemas when their Library is collected


class Job:
    """What a peer is to do.

    Attributes:
        bits: mean bits for each weight of the float network that are asked for.
        seed: of every random choice; random and numpy have it already, torch once `module` was called.
        options: that tell this method from others of the same peer.
        folder: where its files go.
        onnx: the float network as a file, BatchNorm folded; for a second step, the file that the first wrote.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.bits = float(record["bits"])
        self.seed = int(record["seed"])
        self.options: Mapping[str, Any] = record["options"]
        self.folder = Path(record["folder"])
        self.onnx = Path(record["onnx"])
        self._record = record

    def calibration(self) -> tuple[np.ndarray, np.ndarray]:
        """Give the preprocessed images float32 (N, C, H, W) that may be looked at, and their labels int64 (N,)."""
        with np.load(self._record["calibration"], allow_pickle=False) as arrays:
            return arrays["x"], arrays["y"]

    def batches(self, size: int = BATCH) -> Iterator[np.ndarray]:
        """Give the calibration images `size` at once, the last ones fewer."""
        images, _ = self.calibration()
        for start in range(0, len(images), size):
            yield images[start : start + size]

    def module(self) -> Any:
        """Give the float network as a torch.nn.Module in eval mode."""
        torch = torch_beside_torchvision()
        torch.manual_seed(self.seed)
        network = self._record["network"]
        if network["torchvision"] is not None:
            import torchvision

            module = torchvision.models.get_model(network["torchvision"], weights=None, **network["options"])
        else:
            module = getattr(_module_at(Path(network["file"])), network["factory"])()
        with np.load(network["weights"], allow_pickle=False) as arrays:
            module.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
        return module.eval()

    def save_logits(self, module: Any) -> str:
        """Classify every test image with a torch module and keep its outputs: the name of the file."""
        import torch

        images = np.load(self._record["test"], mmap_mode="r", allow_pickle=False)
        parts = []
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                x = torch.from_numpy(np.array(images[start : start + BATCH]))
                parts.append(module(x).reshape(len(x), -1).numpy())
        np.save(self.folder / "logits.npy", np.concatenate(parts))
        return "logits.npy"


def torch_beside_torchvision() -> Any:
    """Import torch so that torchvision can be imported too.

    torchvision's compiled half does not load beside a torch without CUDA; its import then stops over two operators that
    no classifier uses. Declaring them first is enough.
    """
    import torch

    if not torch.cuda.is_available():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name, schema in _SCHEMAS.items():
            if not hasattr(torch.ops.torchvision, name):
                library.define(schema)
        _declared.append(library)
    return torch


def _module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _versions(names: list[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


def main(path: Path) -> None:
    """Do the job that a file describes, and write its result."""
    record = json.loads(path.read_text("utf-8"))
    job = Job(record)
    random.seed(job.seed)
    np.random.seed(job.seed)  # noqa: NPY002 - what the peers draw from
    result = _module_at(Path(record["script"])).compress(job)
    result["versions"] = _versions(record["packages"])
    unfinished = job.folder / f"{RESULT}.unfinished"
    unfinished.write_text(json.dumps(result, indent=1), "utf-8")
    unfinished.replace(job.folder / RESULT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
