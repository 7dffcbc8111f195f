"""model-compression-toolkit: mixed precision from {2, 4, 8} bits, with or without its gradient reconstruction.

It writes no file with packed weights. So its network is run as it simulates it, in torch, and its bytes are computed:
every weight at its layer's width, and 4 bytes for each bias and for each channel's threshold.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from .peer_entry import Job


def compress(job: Job) -> dict[str, Any]:
    """Quantize; `options["epochs"]` above 0 adds reconstruction over that many passes through the images."""
    module = job.module()  # before the import below, which needs torchvision
    import model_compression_toolkit as mct

    def images() -> Iterator[list[np.ndarray]]:
        for batch in job.batches():
            yield [batch]

    config = mct.core.CoreConfig(mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig())
    at_eight = mct.core.pytorch_resource_utilization_data(module, images, core_config=config)
    limit = mct.core.ResourceUtilization(weights_memory=at_eight.weights_memory * job.bits / 8)
    epochs = int(job.options["epochs"])
    if epochs:
        quantized, _ = mct.gptq.pytorch_gradient_post_training_quantization(
            module,
            images,
            target_resource_utilization=limit,
            core_config=config,
            # Its per-sample attention takes 100 backward passes for every 32 images, hours on a CPU. Without it the
            # layers are weighted by the Hessian of 32 images.
            gptq_config=mct.gptq.get_pytorch_gptq_config(n_epochs=epochs, use_hessian_sample_attention=False),
        )
    else:
        quantized, _ = mct.ptq.pytorch_post_training_quantization(
            module, images, target_resource_utilization=limit, core_config=config
        )
    bits, n_bytes = _stored(quantized)
    return {
        "logits": job.save_logits(quantized.eval()),
        "n_bytes": n_bytes,
        "details": {"bits": bits, "epochs": epochs},
    }


def _stored(quantized: Any) -> tuple[dict[str, int], int]:
    """Give each layer's width, and the bytes that a packed file would spend on parameters."""
    bits, n_bytes = {}, 0
    for name, layer in quantized.named_modules():
        for weight_name, quantizer in getattr(layer, "weights_quantizers", {}).items():
            weight = getattr(layer.layer, weight_name)
            bits[name] = int(quantizer.num_bits)
            n_bytes += math.ceil(weight.numel() * bits[name] / 8) + 4 * weight.shape[0]
            if getattr(layer.layer, "bias", None) is not None:
                n_bytes += 4 * layer.layer.bias.numel()
    return bits, n_bytes
