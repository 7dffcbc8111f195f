"""Make the bundled sample: train ResNet-8 on Fashion-MNIST and cut a slice of its images.

::

    python -m edgecomp.samples.train --data ROOT [--epochs N] [--seed N] [--threads N] [--out DIR]

ROOT holds torchvision's folder layout, FashionMNIST/raw/*.gz. Writes resnet8_fmnist.safetensors, images.npz and
sample.json into this folder, or into DIR. Same seed, machine and number of threads: the same images, and weights as
equal as torch's own kernels are from run to run.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from edgecomp.errors import DataError, EdgecompError, UsageError
from edgecomp.pytorch.networks import resnet8

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MEAN, STD, PAD = 0.2860, 0.3530, 2
HELD_OUT = 5000  # the last training images: never trained on; accuracy is watched on them, calibration drawn from them
CALIBRATION, TEST = 512, 2000
BATCH, PEAK_RATE, WEIGHT_DECAY = 128, 0.2, 5e-4


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read one of the data set's gzipped IDX files: uint8, labels (N,) for ndim 1, images (N, 28, 28) for ndim 3.

    Raises:
        DataError: the file is missing, damaged, or holds something else.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a gzipped IDX file of Fashion-MNIST") from error
    start = 4 + 4 * ndim
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4)]
    if raw[:4] != bytes((0, 0, 8, ndim)) or len(raw) != start + math.prod(shape):
        raise DataError(f"{path}: not an IDX file of bytes with {ndim} dimension(s); fetch Fashion-MNIST again")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape).copy()


def prepare(images: Tensor) -> Tensor:
    """Map pixels uint8 (N, 28, 28) to the network's input float32 (N, 1, 32, 32): / 255, pad with 0, normalise."""
    return (F.pad(images[:, None].float() / 255, (PAD,) * 4) - MEAN) / STD


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images uint8 (N, 28, 28) and shift each by up to PAD pixels; what leaves the frame is cut."""
    n, height, width = images.shape
    padded = F.pad(images, (PAD,) * 4)
    shift = torch.randint(0, 2 * PAD + 1, (2, n), generator=generator)
    rows = shift[0, :, None] + torch.arange(height)
    columns = shift[1, :, None] + torch.arange(width)
    mirrored = torch.rand(n, generator=generator) < 0.5
    columns[mirrored] = columns[mirrored].flip(1)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def count_correct(network: nn.Module, images: np.ndarray, labels: np.ndarray) -> int:
    """Count the images uint8 (N, 28, 28) that the network puts into their class, labels uint8 (N,)."""
    network.eval()
    with torch.inference_mode():
        parts = [
            network(prepare(torch.from_numpy(images[at : at + 500]))).argmax(1) for at in range(0, len(images), 500)
        ]
    return int((torch.cat(parts).numpy() == labels).sum())


def draw_balanced(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` indices int64 into labels (N,), every class equally often or once more, in mixed order."""
    order = rng.permutation(len(labels))
    ranks = np.empty(len(labels), dtype=np.int64)  # the how-many-th of its class an image is, in the order drawn
    for label in np.unique(labels):
        members = order[labels[order] == label]
        ranks[members] = np.arange(len(members))
    return rng.permutation(order[np.argsort(ranks[order], kind="stable")][:count])


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a compressed .npz without dates in it: the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, buffer.getvalue(), compress_type=zipfile.ZIP_DEFLATED, compresslevel=9)


def train(images: np.ndarray, labels: np.ndarray, *, epochs: int, seed: int) -> nn.Module:
    """Train on all but the last HELD_OUT images: uint8 (N, 28, 28), labels uint8 (N,)."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = resnet8()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this form
    pixels = torch.from_numpy(images[:-HELD_OUT])
    targets = torch.from_numpy(labels[:-HELD_OUT]).long()
    steps = len(pixels) // BATCH
    optimizer = torch.optim.SGD(
        network.parameters(), lr=PEAK_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * steps, pct_start=0.2)
    with tqdm(total=epochs * steps, unit="step", mininterval=2) as bar:
        for _ in range(epochs):
            network.train()
            for batch in torch.randperm(len(pixels), generator=generator)[: steps * BATCH].view(steps, BATCH):
                x = prepare(augment(pixels[batch], generator)).contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(network(x), targets[batch])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                bar.update()
            correct = count_correct(network, images[-HELD_OUT:], labels[-HELD_OUT:])
            bar.set_postfix(loss=f"{loss.item():.3f}", held_out=f"{100 * correct / HELD_OUT:.2f} %")
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return network


def make(data: Path, out: Path, *, epochs: int, seed: int) -> None:
    """Train, measure, draw the images, and write the three files of the sample into `out`.

    Raises:
        DataError: the data set is missing or damaged.
        UsageError: `epochs` is below 1, or `out` is no directory.
    """
    if epochs < 1:
        raise UsageError(f"--epochs {epochs}: expected 1 or more")
    if not out.is_dir():
        raise UsageError(f"--out {out}: not a directory; make it first")
    raw = data / "FashionMNIST" / "raw"
    train_x, train_y = read_idx(raw / "train-images-idx3-ubyte.gz", 3), read_idx(raw / "train-labels-idx1-ubyte.gz", 1)
    test_x, test_y = read_idx(raw / "t10k-images-idx3-ubyte.gz", 3), read_idx(raw / "t10k-labels-idx1-ubyte.gz", 1)
    rng = np.random.default_rng(seed)
    calibration = len(train_y) - HELD_OUT + draw_balanced(train_y[-HELD_OUT:], CALIBRATION, rng)
    test = draw_balanced(test_y, TEST, rng)

    network = train(train_x, train_y, epochs=epochs, seed=seed)
    measured = {
        "test": (test_x, test_y),
        "bundled_test": (test_x[test], test_y[test]),
        "held_out": (train_x[-HELD_OUT:], train_y[-HELD_OUT:]),
        "bundled_calibration": (train_x[calibration], train_y[calibration]),
    }
    record = {
        "schema": "edgecomp sample 1",
        "model": "edgecomp.pytorch.networks:resnet8",
        "weights": "resnet8_fmnist.safetensors",
        "images": "images.npz",
        "data": "Fashion-MNIST",
        "classes": CLASSES,
        "input_shape": (1, 32, 32),
        "preprocessing": {"mean": [MEAN], "std": [STD], "resize": None, "pad": PAD},
        "parameters": sum(p.numel() for p in network.parameters()),
        "accuracy": {name: {"correct": count_correct(network, *xy), "n": len(xy[1])} for name, xy in measured.items()},
        "torch": torch.__version__,
        "command": f"python -m edgecomp.samples.train --data ROOT --epochs {epochs} --seed {seed}"
        f" --threads {torch.get_num_threads()}",
    }
    (out / "resnet8_fmnist.safetensors").write_bytes(save(network.state_dict()))
    write_npz(
        out / "images.npz",
        {
            "calib_x": train_x[calibration],
            "calib_y": train_y[calibration],
            "test_x": test_x[test],
            "test_y": test_y[test],
        },
    )
    (out / "sample.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line and make the sample; a known fault ends with one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m edgecomp.samples.train", description="Make the bundled sample.")
    parser.add_argument("--data", type=Path, required=True, metavar="ROOT", help="folder with FashionMNIST/raw/*.gz")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's choice")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: the package's own folder")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        make(args.data, args.out, epochs=args.epochs, seed=args.seed)
    except EdgecompError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
