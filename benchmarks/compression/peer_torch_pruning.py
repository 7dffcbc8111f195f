"""torch-pruning: whole channels, in coupled groups ranked over the network, without training afterwards.

The share of channels to cut is searched so that the weights that remain, at 8 bits, are as many bits as were asked
for: keep bits / 8 of them. The result is a float ONNX file.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .peer_entry import Job

SEARCH_STEPS = 12
MOST_OF_A_LAYER = 0.95
"""At most this share of one layer's channels is cut: a layer without any would cut the network in two."""


def compress(job: Job) -> dict[str, Any]:
    """Prune; `options["importance"]` is "magnitude" (group norm of weights) or "taylor" (weight times gradient)."""
    module = job.module()
    wanted = _weights(module) * job.bits / 8
    low, high = 0.0, 1.0
    best = module
    for _ in range(SEARCH_STEPS):
        ratio = (low + high) / 2
        pruned = _pruned(job, copy.deepcopy(module), ratio)
        if _weights(pruned) > wanted:
            low = ratio
        else:
            best, high = pruned, ratio
    _export(job, best)
    return {
        "file": "model.onnx",
        "details": {"channel_ratio": high, "weights_kept": _weights(best) / _weights(module)},
    }


def _weights(module: Any) -> int:
    """Count the values of convolutions and linear layers, without biases and normalisation."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


def _pruned(job: Job, module: Any, ratio: float) -> Any:
    import torch
    import torch_pruning as tp

    images, labels = job.calibration()
    if job.options["importance"] == "taylor":
        importance = tp.importance.GroupTaylorImportance()
        for start in range(0, len(images), 64):
            x, y = torch.from_numpy(images[start : start + 64]), torch.from_numpy(labels[start : start + 64])
            torch.nn.functional.cross_entropy(module(x), y, reduction="sum").backward()
    else:
        importance = tp.importance.GroupMagnitudeImportance(p=2)
    last = [m for m in module.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][-1]
    pruner = tp.pruner.BasePruner(
        module,
        torch.from_numpy(images[:1]),
        importance=importance,
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=MOST_OF_A_LAYER,
        ignored_layers=[last],
    )
    pruner.step()
    module.zero_grad(set_to_none=True)
    return module.eval()


def _export(job: Job, module: Any) -> None:
    import torch

    images, _ = job.calibration()
    # The exporter of TorchScript: it folds BatchNorm, and stores weights once and inside the file.
    torch.onnx.export(
        module,
        (torch.from_numpy(images[:1]),),
        str(job.folder / "model.onnx"),
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
        opset_version=17,
        dynamo=False,
    )
