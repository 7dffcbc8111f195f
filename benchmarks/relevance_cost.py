"""What explaining a batch costs, measured against a forward-backward pass of the same batch by torch.

python -m edgecomp.benchmarks.relevance_cost prints a table: VGG16 with BatchNorm on 32 images of 32x32, untrained, one
thread; seconds are medians, ratios those of rounds in which all take turns (`harness`). A script: nobody imports it.
"""

from __future__ import annotations

import random
import time

import numpy as np
import torch
import torch.nn.functional as F

from edgecomp.pytorch.capture import capture
from edgecomp.pytorch.network import Network
from edgecomp.pytorch.networks import vgg16_bn_cifar
from edgecomp.pytorch.propagate import explain
from edgecomp.pytorch.rules import parse_composite
from edgecomp.pytorch.sums import Sums, WeightForm
from edgecomp.report import table

from .harness import measure

N_IMAGES = 32
COMPOSITES = ("epsilon", "epsilon-plus-flat", "gamma", "alpha2-beta1")
BASE = "forward-backward"


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = vgg16_bn_cifar().eval()
    network = Network(capture(module, (3, 32, 32), name="vgg16_bn"))
    rng = np.random.default_rng(0)
    images = rng.standard_normal((N_IMAGES, 3, 32, 32)).astype(np.float32)
    labels = rng.integers(0, 10, N_IMAGES)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)

    def forward_backward() -> None:
        module.zero_grad()
        F.cross_entropy(module(x), y).backward()

    # The sums are made once, as in `score`: they are the run's, not the batch's.
    def scoring(text: str, form: WeightForm) -> object:
        sums = Sums(network, form=form, per_class=False, per_activation=False)
        composite = parse_composite(text)
        return lambda: sums.add(explain(network, images, labels, composite=composite), labels, None)

    bodies = {BASE: forward_backward}
    for text in COMPOSITES:
        bodies[f"relevance, {text}"] = scoring(text, WeightForm.OWN)
    bodies["relevance, alpha2-beta1, weights as the rule sees them"] = scoring("alpha2-beta1", WeightForm.RULE)
    turns = random.Random(0)
    timings = measure(bodies, clock=time.perf_counter_ns, rng=turns, warmup_max_s=0, warmup_min_s=0, rounds=5, min_s=0)
    base = np.array(timings[BASE].samples_us)
    rows = []
    for name, timing in timings.items():
        samples = np.array(timing.samples_us)
        rows.append((name, f"{np.median(samples) / 1e6:.2f}", f"{np.median(samples / base):.2f}"))
    print(table(rows, ("batch of 32, VGG16-BN, 32x32", "seconds", "times forward-backward")))


if __name__ == "__main__":
    main()
