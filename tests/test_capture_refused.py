"""Capture: what edgecomp does not take in is refused in one line, of the right class, and with nothing else printed."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgecomp.errors import CaptureError, EdgecompError, UnsupportedOp, UsageError
from edgecomp.pytorch import aten, calls
from edgecomp.pytorch.capture import capture
from tests.test_capture import Function, zoo

C, H, W = 4, 9, 7


def net(forward, **parts) -> nn.Module:
    return Function(forward, conv=nn.Conv2d(C, C, 1), **parts).eval()


def broken(key: str, value: float, scale: float = 1) -> nn.Module:
    module = nn.Sequential(nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6))
    with torch.no_grad():
        module[0].weight *= scale
        module.state_dict()[key].view(-1)[1] = value
    return module


def complaining(m, x):
    raise ValueError("first line\nsecond line")


REFUSED = {
    "add alpha": (lambda: net(lambda m, x: torch.add(x, x, alpha=2)), UnsupportedOp, "layer 'add': add with alpha=2"),
    "add a number": (lambda: net(lambda m, x: x + 1), UnsupportedOp, "layer 'add': add with the constant 1"),
    "add a tensor": (
        lambda: net(lambda m, x: x + m.b, b=nn.Parameter(torch.zeros(1, C, H, W))),
        UnsupportedOp,
        "layer 'add': add with a constant tensor",
    ),
    "add broadcast": (lambda: net(lambda m, x: x + x.mean((2, 3), keepdim=True)), UnsupportedOp, "of shapes"),
    "mul by a number": (lambda: net(lambda m, x: 2 * m.conv(x)), UnsupportedOp, "layer 'mul': mul with the constant 2"),
    "mul by a tensor": (
        lambda: net(lambda m, x: x * m.b, b=nn.Parameter(torch.zeros(1, C, 1, 1))),
        UnsupportedOp,
        "layer 'mul': mul with a constant tensor",
    ),
    "mul of rows": (lambda: net(lambda m, x: x * x.mean(3, keepdim=True)), UnsupportedOp, "layer 'mean'"),
    "mul of a spatial gate": (
        lambda: net(lambda m, x: x * m.one(x), one=nn.Conv2d(C, 1, 1)),
        UnsupportedOp,
        "layer 'mul': mul of shapes (1, 4, 9, 7) and (1, 1, 9, 7) is not supported, only equal shapes",
    ),
    "add of what was expanded": (
        lambda: net(lambda m, x: x + x.mean((2, 3), keepdim=True).expand_as(x)),
        UnsupportedOp,
        "layer 'add': add of a tensor that was expanded is not supported, only mul of such",
    ),
    "expand by rows": (
        lambda: net(lambda m, x: F.avg_pool2d(x, (9, 1)).expand_as(x) * x),
        UnsupportedOp,
        "layer 'expand_as': expand_as to torch.float32",
    ),
    "inside a module": (lambda: nn.Sequential(nn.ReLU(), nn.Tanh()), UnsupportedOp, "layer '1': tanh"),
    "transposed": (lambda: nn.ConvTranspose2d(C, 2, 3), UnsupportedOp, "layer 'conv_transpose2d': conv_transpose2d"),
    "reflect": (
        lambda: nn.Sequential(nn.Conv2d(C, 6, 3, padding=1, padding_mode="reflect")),
        UnsupportedOp,
        "layer '0': pad with mode 'reflect'",
    ),
    "pad with ones": (lambda: net(lambda m, x: m.conv(F.pad(x, (1, 1), value=1.0))), UnsupportedOp, "and value 1.0"),
    "pad inwards": (lambda: net(lambda m, x: m.conv(F.pad(x, (-1, 0)))), UnsupportedOp, "only outwards"),
    "pad channels": (lambda: net(lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 1)).relu()), UnsupportedOp, "around the image"),
    "pad before a pool": (
        lambda: net(lambda m, x: F.max_pool2d(F.pad(x, (1, 1)), 2)),
        UnsupportedOp,
        "layer 'max_pool2d': max_pool2d of a tensor with zeros around it is not supported, only conv2d of such",
    ),
    "cat of padded": (
        lambda: net(lambda m, x: torch.cat([F.pad(x, (1, 1)), F.pad(x, (1, 1))], 1)),
        UnsupportedOp,
        "of a tensor with zeros around it",
    ),
    "conv2d of what has no batch": (
        lambda: net(lambda m, x: m.one(x.flatten(1, 2)).relu(), one=nn.Conv2d(1, 6, 3)),
        UnsupportedOp,
        "layer 'one': conv2d on a tensor of shape (1, 36, 7) is not supported, only 4 dimensions",
    ),
    "linear on a signal": (
        lambda: nn.Sequential(nn.Flatten(2), nn.Linear(H * W, 3)),
        UnsupportedOp,
        "layer '1': linear on a tensor of shape (1, 4, 63) is not supported, only 2 dimensions",
    ),
    "mul of an image and a signal": (
        lambda: net(lambda m, x: x.flatten(2) * x.mean((2, 3), keepdim=True)),
        UnsupportedOp,
        "mul of shapes (1, 4, 63) and (1, 4, 1, 1) is not supported",
    ),
    "transpose of a signal": (
        lambda: net(lambda m, x: x.flatten(2).transpose(1, 2)),
        UnsupportedOp,
        "layer 'transpose': transpose is not supported, only of axes",
    ),
    "mean over channels": (
        lambda: net(lambda m, x: x.flatten(2).mean(1)),
        UnsupportedOp,
        "layer 'mean': mean over axes [1] is not supported, only over all of space",
    ),
    "pad channels of a signal": (
        lambda: net(lambda m, x: m.one(F.pad(x.flatten(2), (0, 0, 0, 1))), one=nn.Conv1d(C + 1, 2, 1)),
        UnsupportedOp,
        "pad by [0, 0, 0, 1] is not supported, only outwards and around the image",
    ),
    "slice of a signal": (lambda: net(lambda m, x: x.flatten(2)[:, :, 1:]), UnsupportedOp, "only of channels (axis 1)"),
    "linear on an image": (lambda: nn.Sequential(nn.Linear(W, 3)), UnsupportedOp, "only 2 dimensions"),
    "matmul of two": (lambda: net(lambda m, x: x.flatten(2)[0] @ x.flatten(2)[0].t()), UnsupportedOp, "layer 'select'"),
    "kernel from the image": (
        lambda: net(lambda m, x: F.conv2d(x, x)),
        UnsupportedOp,
        "layer 'conv2d': conv2d with a 'weight' that is computed from the image",
    ),
    "clamp by a tensor": (lambda: net(lambda m, x: torch.clamp(x, min=x)), UnsupportedOp, "a tensor as its bound"),
    "divisor_override": (lambda: nn.AvgPool2d(2, divisor_override=3), UnsupportedOp, "divisor_override"),
    "avg ceil include": (lambda: nn.AvgPool2d(3, 3, padding=1, ceil_mode=True), UnsupportedOp, "count_include_pad"),
    "adaptive uneven": (lambda: nn.AdaptiveAvgPool2d(2), UnsupportedOp, "from (9, 7) to (2, 2)"),
    "adaptive max uneven": (lambda: nn.AdaptiveMaxPool2d(4), UnsupportedOp, "from (9, 7) to (4, 4)"),
    "pool indices": (lambda: net(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[1] + 1), UnsupportedOp, "layer"),
    "mean channels": (lambda: net(lambda m, x: x.mean(1)), UnsupportedOp, "mean over axes [1]"),
    "mean of all": (lambda: net(lambda m, x: x.mean()), UnsupportedOp, "mean over axes all"),
    "cat rows": (lambda: net(lambda m, x: torch.cat([x, x], 2)), UnsupportedOp, "cat along axis 2"),
    "cat a constant": (
        lambda: net(lambda m, x: torch.cat([x, m.b], 1), b=nn.Parameter(torch.zeros(1, C, H, W))),
        UnsupportedOp,
        "layer 'cat': cat with a constant tensor",
    ),
    "softmax of the batch": (lambda: nn.Softmax(dim=0), UnsupportedOp, "softmax along the batch"),
    "no batch left": (lambda: net(lambda m, x: x.flatten()), UnsupportedOp, "must stay the batch of 1"),
    "transpose of an image": (
        lambda: net(lambda m, x: x.transpose(2, 3).relu()),
        UnsupportedOp,
        "layer 'transpose': transpose is not supported, only of axes that a view has made of the channels",
    ),
    "transpose of channels and rows": (
        lambda: net(lambda m, x: x.view(1, 2, 2, H, W).transpose(2, 3).relu()),
        UnsupportedOp,
        "layer 'transpose': transpose is not supported, only of axes",
    ),
    "transpose of what rows became": (
        lambda: net(lambda m, x: x.view(1, C, 3, 3, W).transpose(1, 2).relu()),
        UnsupportedOp,
        "layer 'transpose': transpose is not supported, only of axes",
    ),
    "relu of shuffled groups": (
        lambda: net(lambda m, x: x.view(1, 2, 2, H, W).transpose(1, 2).relu()),
        UnsupportedOp,
        "layer 'relu': relu of channels that were transposed is not supported, only view(N, C, H, W) of such",
    ),
    "flatten of shuffled groups": (
        lambda: net(lambda m, x: x.view(1, 2, 2, H, W).transpose(1, 2).flatten(1)),
        UnsupportedOp,
        "flatten of channels that were transposed, to (1, 252), is not supported, only to (N, C, H, W)",
    ),
    "chunk of rows": (lambda: net(lambda m, x: x.chunk(3, 2)[0]), UnsupportedOp, "chunk along axis 2 is not supported"),
    "slice of rows": (lambda: net(lambda m, x: x[:, :, 1:]), UnsupportedOp, "only of channels (axis 1)"),
    "other dtype": (lambda: net(lambda m, x: m.conv(x).half()), UnsupportedOp, "to torch.float16"),
    "dropout for ever": (lambda: net(lambda m, x: F.dropout(x)), UnsupportedOp, "training=self.training"),
    "random": (
        lambda: net(lambda m, x: x + torch.rand_like(m.b), b=nn.Parameter(torch.zeros(1, C, H, W))),
        UnsupportedOp,
        "draws random numbers",
    ),
    "bn of the batch": (
        lambda: nn.Sequential(nn.BatchNorm2d(C, track_running_stats=False)),
        UnsupportedOp,
        "layer '0': batch_norm that takes its statistics from the batch",
    ),
    "negative variance": (lambda: broken("1.running_var", -3.0), CaptureError, "layer '1': running_var"),
    "NaN weight": (lambda: broken("0.weight", math.nan), CaptureError, "weight '0.weight' holds NaN or infinity"),
    "infinite statistics": (lambda: broken("1.running_mean", -math.inf), CaptureError, "'1.running_mean'"),
    "overflow in folding": (lambda: broken("1.weight", 3e38, scale=1e3), CaptureError, "weight '0.weight' holds NaN"),
    "two outputs": (lambda: net(lambda m, x: (x + x, x.relu())), CaptureError, "returns 2 tensors (add, relu)"),
    "no output": (lambda: net(lambda m, x: None), CaptureError, "returns 0 tensors"),
    "nothing done": (lambda: nn.Identity(), CaptureError, "does not depend on the image"),
    "constant output": (lambda: net(lambda m, x: m.conv.weight + m.conv.weight), CaptureError, "does not depend"),
    "wrong channels": (lambda: nn.Conv2d(C + 1, 6, 3), CaptureError, "does not run on one image of C,H,W = 4,9,7 (Run"),
    "wrong size": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(7, 2)),
        CaptureError,
        "(RuntimeError: a and b must have same reduction dim",
    ),
    "two inputs": (lambda: nn.Bilinear(2, 2, 2), CaptureError, "missing a required argument"),
    "raises": (lambda: net(complaining), CaptureError, "(ValueError: first line);"),
    "data-dependent": (
        lambda: net(lambda m, x: x + x if x.sum() > 0 else x.relu()),
        CaptureError,
        "decides by the values of the image",
    ),
    "item": (lambda: net(lambda m, x: x.clamp(max=x.max().item())), UnsupportedOp, "layer 'max': max"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=[case.replace(" ", "-") for case in REFUSED])
def test_refused_in_one_line(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, kind, message = REFUSED[case]
    with pytest.raises(EdgecompError) as error:
        capture(make(), (C, H, W), name="net")
    assert type(error.value) is kind
    text = str(error.value)
    assert message in text
    assert "\n" not in text
    if kind is UnsupportedOp:
        assert text.startswith("layer ")
        assert text.endswith(calls.SUPPORTED)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_torch_logs_nothing_beside_the_error() -> None:
    """In a process of its own: pytest takes the place of torch's log handlers."""
    code = (
        "from torch import nn\n"
        "from edgecomp.errors import CaptureError\n"
        "from edgecomp.pytorch.capture import capture\n"
        "class Deciding(nn.Module):\n"
        "    def forward(self, x): return x if x.sum() > 0 else -x\n"
        "for module in (nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), Deciding()):\n"
        "    try: capture(module, (1, 4, 4), name='net')\n"
        "    except CaptureError: continue\n"
        "    raise SystemExit('no error')\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("shape", [(3,), (0, 8, 8), (3, -1, 8), (3, 0), (1, 3, 8, 8)])
def test_an_input_shape_that_is_none(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="expected C,H,W"):
        capture(nn.ReLU(), shape, name="relu")


def test_what_the_message_teaches_is_what_is_translated() -> None:
    taught = calls.SUPPORTED.removeprefix("edgecomp takes in ").split(", ")
    assert set(taught) <= set(aten.TRANSLATORS)


@pytest.mark.parametrize(
    ("name", "found"),
    [("convnext_tiny", "layer 'features.0.1.permute': permute is not supported, only of axes that a view has made")],
)
def test_torchvision_with_operators_we_do_not_know(name: str, found: str) -> None:
    with pytest.raises(UnsupportedOp, match=f"^{re.escape(found)}") as error:
        capture(zoo(name), (3, 32, 32), name=name)
    assert "edgecomp takes in conv2d, conv1d, linear" in str(error.value)
