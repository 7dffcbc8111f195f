"""A tiny torch model and data set on disk, as a user would have them: what the command-line tests run on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

MODULE = '''
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.fc = nn.Linear(8 * 16, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.conv2(x))
        return self.fc(torch.flatten(torch.max_pool2d(x, 2), 1))


class Other(Tiny):
    def forward(self, x):
        return torch.sin(super().forward(x))


def tiny():
    return Tiny()


def other():
    return Other()


def wide():
    return Tiny(classes=7)


def broken():
    raise RuntimeError("no such luck")
'''


class Place:
    """A user's folder: tinymodels.py, weights in several conditions, data.npz."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "tinymodels.py").write_text(MODULE)
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        import tinymodels

        torch.manual_seed(0)
        model = tinymodels.tiny()
        rng = np.random.default_rng(0)
        # Four classes that differ in which corner is bright: learnt in a moment.
        labels = np.arange(400) % 4
        images = rng.integers(0, 80, (400, 8, 8), dtype=np.uint8)
        for i, label in enumerate(labels):
            y, x = divmod(int(label), 2)
            images[i, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 120
        parts = {"x_train": images[:200], "y_train": labels[:200], "x_test": images[200:], "y_test": labels[200:]}
        np.savez(folder / "data.npz", **parts)
        x, y = torch.tensor(images[:200, None] / 255, dtype=torch.float32), torch.tensor(labels[:200])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(30):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        torch.save(model.state_dict(), folder / "tiny.pt")
        torch.save(model, folder / "pickled.pt")
        nan = dict(model.state_dict())
        nan["conv2.weight"] = nan["conv2.weight"] * float("nan")
        torch.save(nan, folder / "nan.pt")
        torch.save(tinymodels.wide().state_dict(), folder / "wide.pt")

    def command(self) -> list[str]:
        """A build that works; the last argument is the folder."""
        model = ["tinymodels:tiny", "--weights", "tiny.pt", "--data", "npz:data.npz"]
        return ["build", *model, "--calib", "64", "-o", "out"]
