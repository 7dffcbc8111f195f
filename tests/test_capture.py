"""Capture: parity of the captured graph, run by the reference interpreter, with torch; names; exported programs."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgecomp import reference
from edgecomp.errors import CaptureError, UnsupportedOp
from edgecomp.graph import Graph, Op
from edgecomp.ops import OPS
from edgecomp.pytorch.capture import capture
from edgecomp.pytorch.torchvision_ops import define_missing_operators

C, H, W = 4, 9, 7

# torch says this once about every even kernel; the padded copy it speaks of is its own affair.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


class Function(nn.Module):
    """A forward pass given as a function, with named parts for it to use."""

    def __init__(self, forward, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def randomised(module: nn.Module) -> nn.Module:
    """Draw BatchNorm's weights and statistics, so that folding has something to get wrong; evaluation mode."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)
            if part.affine:
                nn.init.uniform_(part.weight, -1.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.3)
    return module.eval()


def assert_same(graph: Graph, module: nn.Module, shape: tuple[int, ...], n: int = 3) -> None:
    """Compare on n images, in float64; the tolerance is for folded weights, which were rounded to float32."""
    images = torch.randn(n, *shape, dtype=torch.float64)
    values = reference.run(graph, {graph.inputs[0]: images.numpy()})
    with torch.no_grad():
        expected = module.double()(images.clone())
    module.float()
    if isinstance(expected, (tuple, list)):
        expected = expected[0]
    elif isinstance(expected, dict):
        (expected,) = expected.values()
    got = values[graph.outputs[0]]
    assert got.shape == tuple(expected.shape)
    assert graph.tensors[graph.outputs[0]].shape == (1, *expected.shape[1:])
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=2e-6 * max(1.0, float(expected.abs().max())))


def assert_legal(graph: Graph) -> None:
    """Names and shapes keep the contract of edgecomp.graph."""
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    written = set(graph.inputs) | {name for name, tensor in graph.tensors.items() if tensor.data is not None}
    for node in graph.nodes:
        assert node.outputs == (node.name,)
        assert set(node.inputs) <= written
        written.update(node.outputs)
        row = OPS[node.op]
        assert set(row.attributes) == set(node.attrs)
        assert row.shape([graph.tensors[x].shape for x in node.inputs], node.attrs) == graph.tensors[node.name].shape
    for layer in graph.layers():
        assert layer.inputs[1:] in ((f"{layer.name}.weight",), (f"{layer.name}.weight", f"{layer.name}.bias"))
    assert set(graph.tensors) == written
    assert all(t.data is None or t.data.dtype == np.float32 for t in graph.tensors.values())


def ops_of(graph: Graph) -> list[Op]:
    return [node.op for node in graph.nodes]


# ---- every operator, every spelling ----------------------------------------------------------------------------------

CONV, CLIP, MAX, AVG, MEAN, FLAT = Op.CONV2D, Op.CLIP, Op.MAX_POOL, Op.AVG_POOL, Op.GLOBAL_AVG_POOL, Op.FLATTEN
HEAD = {"fc": nn.Linear(C, 5)}


def features(x):
    return x.mean((2, 3))


def shuffled(m, x):
    return m.conv(x).view(-1, 2, 3, H, W).transpose(1, 2).contiguous().view(-1, 6, H, W)


CASES = {
    "conv": (nn.Conv2d(C, 6, 3), [CONV]),
    "conv stride padding": (nn.Conv2d(C, 6, (3, 2), stride=(2, 1), padding=(1, 2)), [CONV]),
    "conv dilation": (nn.Conv2d(C, 6, 3, dilation=(2, 1), padding=2, bias=False), [CONV]),
    "conv groups": (nn.Conv2d(C, 6, 3, groups=2), [CONV]),
    "conv depthwise": (nn.Conv2d(C, 2 * C, 3, groups=C, padding=1), [CONV]),
    "conv same odd": (nn.Conv2d(C, 6, 3, padding="same", dilation=2), [CONV]),
    "conv same even": (nn.Conv2d(C, 6, (2, 4), padding="same"), [CONV]),
    "conv valid": (nn.Conv2d(C, 6, 3, padding="valid", stride=2), [CONV]),
    "zero pad": (nn.Sequential(nn.ZeroPad2d((0, 1, 2, 3)), nn.Conv2d(C, 6, 3, stride=2, padding=(1, 0))), [CONV]),
    "pad functional": (Function(lambda m, x: m.conv(F.pad(x, (1, 2, 0, 1))), conv=nn.Conv2d(C, 6, 3)), [CONV]),
    "pad twice": (nn.Sequential(nn.ZeroPad2d(1), nn.ConstantPad2d((2, 0, 0, 0), 0.0), nn.Conv2d(C, 6, 3)), [CONV]),
    "pad of a width": (Function(lambda m, x: m.conv(F.pad(x, (1, 2))), conv=nn.Conv2d(C, 6, 3)), [CONV]),
    "conv functional": (
        Function(lambda m, x: F.conv2d(x, m.k, padding=1), k=nn.Parameter(torch.randn(5, C, 3, 3))),
        [CONV],
    ),
    "linear": (Function(lambda m, x: m.fc(features(x)), **HEAD), [MEAN, FLAT, Op.LINEAR]),
    "addmm": (
        Function(
            lambda m, x: torch.addmm(m.b, features(x), m.w),
            w=nn.Parameter(torch.randn(C, 5)),
            b=nn.Parameter(torch.randn(5)),
        ),
        [MEAN, FLAT, Op.LINEAR],
    ),
    "matmul": (
        Function(lambda m, x: features(x) @ m.w, w=nn.Parameter(torch.randn(C, 5))),
        [MEAN, FLAT, Op.LINEAR],
    ),
    "mm t": (
        Function(lambda m, x: torch.mm(features(x), m.w.t()), w=nn.Parameter(torch.randn(5, C))),
        [MEAN, FLAT, Op.LINEAR],
    ),
    "weight norm": (torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(C, 6, 3)), [CONV]),
    "relu": (nn.ReLU(), [CLIP]),
    "relu functional": (Function(lambda m, x: torch.relu(x)), [CLIP]),
    "relu6": (nn.ReLU6(), [CLIP]),
    "hardtanh": (nn.Hardtanh(-0.5, 0.25), [CLIP]),
    "clamp": (Function(lambda m, x: x.clamp(-0.5, 0.5)), [CLIP]),
    "clamp one side": (Function(lambda m, x: torch.clip(x.clamp(min=-1).clamp_max(1), max=0.5)), [CLIP, CLIP, CLIP]),
    "clamp_min": (Function(lambda m, x: x.clamp_min(0.1)), [CLIP]),
    "max_pool": (nn.MaxPool2d(2), [MAX]),
    "max_pool ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), [MAX]),
    "max_pool ceil padding": (nn.MaxPool2d(2, 3, padding=1, ceil_mode=True), [MAX]),
    "max_pool ceil larger": (nn.MaxPool2d((4, 2), (3, 4), ceil_mode=True), [MAX]),
    "max_pool padding dilation": (nn.MaxPool2d(3, 2, padding=1, dilation=(1, 2)), [MAX]),
    "max_pool indices": (Function(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0].relu()), [MAX, CLIP]),
    "avg_pool": (nn.AvgPool2d((2, 3)), [AVG]),
    "avg_pool include": (nn.AvgPool2d(3, 2, padding=1), [AVG]),
    "avg_pool exclude": (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), [AVG]),
    "avg_pool ceil": (nn.AvgPool2d(2, 2, ceil_mode=True), [AVG]),
    "avg_pool ceil exclude": (nn.AvgPool2d(3, 3, padding=1, ceil_mode=True, count_include_pad=False), [AVG]),
    "adaptive avg one": (nn.AdaptiveAvgPool2d(1), [MEAN]),
    "adaptive avg same": (nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d((H, None))), [CLIP]),
    "adaptive avg divides": (nn.AdaptiveAvgPool2d((3, 7)), [AVG]),
    "adaptive max": (nn.AdaptiveMaxPool2d((3, 1)), [MAX]),
    "add": (Function(lambda m, x: torch.relu(x) + x), [CLIP, Op.ADD]),
    "add twice": (Function(lambda m, x: x + x), [Op.ADD]),
    "sigmoid": (nn.Sigmoid(), [Op.SIGMOID]),
    "sigmoid functional": (Function(lambda m, x: x.sigmoid()), [Op.SIGMOID]),
    "hardsigmoid": (nn.Hardsigmoid(inplace=True), [Op.HARD_SIGMOID]),
    "silu": (nn.SiLU(inplace=True), [Op.SILU]),
    "hardswish": (nn.Hardswish(), [Op.HARD_SWISH]),
    "silu written out": (Function(lambda m, x: x * torch.sigmoid(x)), [Op.SIGMOID, Op.MUL]),
    "mul in place": (Function(lambda m, x: m.conv(x).mul_(x), conv=nn.Conv2d(C, C, 1)), [CONV, Op.MUL]),
    "mul a value a channel": (Function(lambda m, x: x.mean((2, 3), keepdim=True) * x), [MEAN, Op.MUL]),
    "mul features": (Function(lambda m, x: features(x) * features(x)), [MEAN, FLAT, MEAN, FLAT, Op.MUL]),
    "mul expanded": (
        Function(lambda m, x: x * torch.sigmoid(m.fc(features(x))).view(-1, C, 1, 1).expand_as(x), fc=nn.Linear(C, C)),
        [MEAN, FLAT, Op.LINEAR, Op.SIGMOID, Op.RESHAPE, Op.MUL],
    ),
    "cat channels": (Function(lambda m, x: torch.cat([x, torch.relu(x), x], 1)), [CLIP, Op.CONCAT]),
    "cat channels from the end": (Function(lambda m, x: torch.cat((x, x), dim=-3)), [Op.CONCAT]),
    "cat features": (
        Function(lambda m, x: torch.cat([features(x), m.fc(features(x))], -1), **HEAD),
        [MEAN, FLAT, MEAN, FLAT, Op.LINEAR, Op.CONCAT],
    ),
    "channel shuffle": (Function(shuffled, conv=nn.Conv2d(C, 6, 3, padding=1)), [CONV, Op.GATHER]),
    "channel shuffle module": (nn.ChannelShuffle(2), [Op.GATHER]),
    "channel shuffle of features": (
        Function(lambda m, x: m.fc(features(x).view(-1, 2, 2).transpose(-1, -2).reshape(-1, C)), **HEAD),
        [MEAN, FLAT, Op.GATHER, Op.LINEAR],
    ),
    "channel shuffle by permute": (
        Function(lambda m, x: x.reshape(-1, 2, 1, 2, H, W).permute(0, 3, 2, 1, -2, -1).flatten(1, 2).flatten(1, 2)),
        [Op.GATHER],
    ),
    "shuffled back": (
        Function(lambda m, x: F.channel_shuffle(x, 1).view(-1, 2, 2, H, W).transpose(1, 2).transpose(2, 1)
                 .view(-1, C, H, W).relu()),
        [CLIP],
    ),
    "chunk": (
        Function(lambda m, x: (lambda a, b: torch.cat([b, m.conv(a)], 1))(*x.chunk(2, 1)), conv=nn.Conv2d(2, 3, 1)),
        [Op.GATHER, Op.GATHER, CONV, Op.CONCAT],
    ),
    "chunk unevenly": (
        Function(lambda m, x: torch.cat(m.c(x).chunk(3, dim=-3)[::-1], 1), c=nn.Conv2d(C, 7, 1)),
        [CONV, *[Op.GATHER] * 3, Op.CONCAT],
    ),
    "split": (Function(lambda m, x: torch.cat(x.split([1, 3], 1)[::-1], 1)), [Op.GATHER, Op.GATHER, Op.CONCAT]),
    "split with an empty part": (
        Function(lambda m, x: torch.cat(x.split([0, 1, 3], 1)[:0:-1], 1)), [Op.GATHER, Op.GATHER, Op.CONCAT]
    ),
    "split by size": (Function(lambda m, x: x.split(2, 1)[1].relu()), [Op.GATHER, CLIP]),
    "slice": (Function(lambda m, x: x[:, 1:-1].relu()), [Op.GATHER, CLIP]),
    "slice with steps": (Function(lambda m, x: x[:, -3::2].relu()), [Op.GATHER, CLIP]),
    "slice everything": (Function(lambda m, x: x[:, :, :].relu()), [CLIP]),
    "narrow": (Function(lambda m, x: x.narrow(1, 1, 2).relu()), [Op.GATHER, CLIP]),
    "flatten": (nn.Flatten(), [FLAT]),
    "view": (Function(lambda m, x: x.view(x.size(0), -1)), [FLAT]),
    "reshape": (Function(lambda m, x: x.reshape(x.shape[0], 2, C // 2, H, W)), [Op.RESHAPE]),
    "unflatten": (Function(lambda m, x: x.flatten(1).unflatten(1, (2, 3, -1))), [FLAT, Op.RESHAPE]),
    "squeeze": (
        Function(lambda m, x: x.mean([-1, -2], keepdim=True).squeeze(-1).squeeze(-1)),
        [MEAN, FLAT],
    ),
    "softmax": (
        Function(lambda m, x: F.softmax(m.fc(features(x)), dim=-1), **HEAD),
        [MEAN, FLAT, Op.LINEAR, Op.SOFTMAX],
    ),
    "softmax channels": (nn.Softmax(dim=1), [Op.SOFTMAX]),
    "mean keepdim": (Function(lambda m, x: x.mean((-1, 2), keepdim=True)), [MEAN]),
    "gone": (
        nn.Sequential(nn.Dropout(), nn.Identity(), nn.Dropout2d(), nn.ReLU(), nn.AlphaDropout()),
        [CLIP],
    ),
    "gone functions": (
        Function(lambda m, x: x.contiguous().clone().detach().relu().to(x.dtype).view_as(x).expand(-1, -1, -1, -1)),
        [CLIP],
    ),
    "bn after conv": (nn.Sequential(nn.Conv2d(C, 6, 3, bias=False), nn.BatchNorm2d(6)), [CONV]),
    "bn after conv with bias": (nn.Sequential(nn.Conv2d(C, 6, 3, groups=2), nn.BatchNorm2d(6, eps=0.1)), [CONV]),
    "bn without weights": (nn.Sequential(nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6, affine=False)), [CONV]),
    "bn after dropout": (nn.Sequential(nn.Conv2d(C, 6, 3), nn.Dropout(), nn.BatchNorm2d(6)), [CONV]),
    "bn twice": (nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C)), [CONV]),
    "bn after relu": (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(C)), [CLIP, CONV]),
    "bn after linear": (
        nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, 5), nn.BatchNorm1d(5)),
        [FLAT, Op.LINEAR],
    ),
    "bn of features": (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(C * H * W)), [FLAT, Op.RESHAPE, CONV, FLAT]),
    "bn where conv is read twice": (
        Function(lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)), conv=nn.Conv2d(C, 6, 3), bn=nn.BatchNorm2d(6)),
        [CONV, CONV, Op.ADD],
    ),
    "bn where conv was read before": (
        Function(lambda m, x: (lambda y: y.relu() + m.bn(y))(m.conv(x)), conv=nn.Conv2d(C, 6, 3), bn=nn.BatchNorm2d(6)),
        [CONV, CLIP, CONV, Op.ADD],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.replace(" ", "-") for case in CASES])
def test_operator(case: str) -> None:
    torch.manual_seed(len(case))
    module, expected = CASES[case]
    graph = capture(randomised(module), (C, H, W), name=case)
    assert ops_of(graph) == expected
    assert_legal(graph)
    assert_same(graph, module, (C, H, W))


def test_captured_weights_are_float32_copies() -> None:
    conv = nn.Conv2d(C, 6, 3)
    graph = capture(conv, (C, H, W), name="conv")
    before = graph.tensors["conv2d.weight"].data.copy()
    np.testing.assert_array_equal(before, conv.weight.detach().numpy())
    with torch.no_grad():
        conv.weight.zero_()
    np.testing.assert_array_equal(graph.tensors["conv2d.weight"].data, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_and_the_module_stays(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6), nn.Dropout()).to(dtype)
    graph = capture(module, (C, H, W), name="half")
    assert module[0].weight.dtype == dtype
    assert_same(graph, module.eval().float(), (C, H, W))


def test_the_training_flags_stay() -> None:
    module = nn.Sequential(nn.Conv2d(C, 6, 3), nn.BatchNorm2d(6), nn.Dropout())
    module[1].eval()
    capture(module, (C, H, W), name="flags")
    assert [part.training for part in module.modules()] == [True, True, False, True]


# ---- names -----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C)
        self.conv2 = shared or nn.Conv2d(C, C, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        y = self.conv2(y)
        y = y + x
        return F.relu(y + x)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, stride=2)
        self.stack1, self.stack2 = Residual(), Residual()
        self.branch = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, groups=C), nn.ReLU6())
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.flatten = nn.Linear(2 * C, 5)  # a layer with the name of a function

    def forward(self, x):
        x = self.stack2(self.stack1(self.stem(x)))
        x = self.pool(torch.cat([x, self.branch(x)], 1))
        return {"logits": self.flatten(F.adaptive_avg_pool2d(x, 1).flatten(1))}


def test_layers_keep_their_names() -> None:
    torch.manual_seed(3)
    module = randomised(Whole())
    graph = capture(module, (3, 20, 20), name="whole")
    assert [node.name for node in graph.nodes] == [
        "stem",
        "stack1.conv1", "stack1.act", "stack1.conv2", "stack1.add", "stack1.add:2", "stack1.relu",
        "stack2.conv1", "stack2.act", "stack2.conv2", "stack2.add", "stack2.add:2", "stack2.relu",
        "branch.0", "branch.1", "cat", "pool", "adaptive_avg_pool2d", "flatten:2", "flatten",
    ]  # fmt: skip
    assert graph.inputs == ("input",)
    assert graph.outputs == ("flatten",)
    assert [layer.name for layer in graph.layers()][-1] == "flatten"
    assert_legal(graph)
    assert_same(graph, module, (3, 20, 20))


def test_a_shared_module_gets_a_number_and_its_own_copy_of_the_weights() -> None:
    torch.manual_seed(4)
    shared = nn.Conv2d(C, C, 3, padding=1)
    module = randomised(Function(lambda m, x: m.bn(m.conv(m.act(m.conv(x)))), conv=shared, act=nn.ReLU(inplace=True),
                                 bn=nn.BatchNorm2d(C)))  # fmt: skip
    graph = capture(module, (C, H, W), name="shared")
    assert [node.name for node in graph.nodes] == ["conv", "act", "conv:2"]
    assert not np.array_equal(graph.tensors["conv.weight"].data, graph.tensors["conv:2.weight"].data)
    np.testing.assert_array_equal(graph.tensors["conv.weight"].data, shared.weight.detach().numpy())
    assert_legal(graph)
    assert_same(graph, module, (C, H, W))


def test_a_layer_called_input_keeps_its_name() -> None:
    graph = capture(nn.Sequential(OrderedDict(input=nn.Conv2d(C, 2, 1))), (C, H, W), name="input")
    assert (graph.inputs, graph.outputs) == (("image",), ("input",))


def test_the_networks_of_this_library() -> None:
    from edgecomp.pytorch.networks import resnet8

    torch.manual_seed(5)
    module = randomised(resnet8())
    graph = capture(module, (1, 32, 32), name="resnet8")
    assert [layer.name for layer in graph.layers()] == [
        "stem", "stack1.conv1", "stack1.conv2", "stack2.conv1", "stack2.conv2", "stack2.shortcut",
        "stack3.conv1", "stack3.conv2", "stack3.shortcut", "linear",
    ]  # fmt: skip
    assert_legal(graph)
    assert_same(graph, module, (1, 32, 32))


def test_batchnorm_is_not_folded_into_what_is_read_padded_as_well() -> None:
    """The padded copy was made before BatchNorm, so it must not see its scale."""

    def forward(m, x):
        y = m.conv(x)
        around = F.pad(y, (1, 1, 1, 1))
        return m.bn(y) + m.other(around)

    parts = {"conv": nn.Conv2d(C, 4, 3), "bn": nn.BatchNorm2d(4), "other": nn.Conv2d(4, 4, 3)}
    module = randomised(Function(forward, **parts))
    graph = capture(module, (C, H, W), name="net")
    assert_legal(graph)
    assert_same(graph, module, (C, H, W))
    assert ops_of(graph).count(CONV) == 3


# ---- in place, dead, shared memory -----------------------------------------------------------------------------------

IN_PLACE = {
    "old name reads the new value": lambda m, x: (lambda y: y.relu_() + y)(m.conv(x)),
    "result unused": lambda m, x: (lambda y: (F.relu_(y), y + m.conv(x))[1])(m.conv(x)),
    "read before": lambda m, x: (lambda y: (lambda z: z + y.relu_())(y + y))(m.conv(x)),
    "a clone keeps its value": lambda m, x: (lambda y: (lambda z: y.relu_() + z)(y.clone()))(m.conv(x)),
    "an alias changes too": lambda m, x: (lambda y: (lambda z: (y.relu_(), z + z)[1])(y.detach()))(m.conv(x)),
    "add_": lambda m, x: (lambda y: (y.add_(x), y + x)[1])(m.conv(x)),
    "the input itself": lambda m, x: F.relu(x, inplace=True) + x,
    "through a view of the same shape": lambda m, x: (lambda y: (y.view(y.shape).relu_(), y + x)[1])(m.conv(x)),
}


@pytest.mark.parametrize("case", IN_PLACE, ids=[case.replace(" ", "-") for case in IN_PLACE])
def test_in_place(case: str) -> None:
    torch.manual_seed(6)
    module = Function(IN_PLACE[case], conv=nn.Conv2d(C, C, 1)).eval()
    graph = capture(module, (C, H, W), name=case)
    assert_legal(graph)
    assert_same(graph, module, (C, H, W))


def test_a_view_of_what_changed_in_place_is_refused() -> None:
    module = Function(lambda m, x: (lambda y: (lambda z: (y.relu_(), m.fc(z))[1])(y.flatten(1)))(x + x),
                      fc=nn.Linear(C * H * W, 2))  # fmt: skip
    with pytest.raises(UnsupportedOp, match=r"^layer 'fc': linear reads a value that edgecomp does not follow"):
        capture(module, (C, H, W), name="view")


def test_dead_nodes_are_dropped() -> None:
    module = Function(lambda m, x: (torch.sigmoid(m.conv(x)), m.conv(x).relu_(), x + x)[2], conv=nn.Conv2d(C, C, 1))
    graph = capture(module, (C, H, W), name="dead")
    assert ops_of(graph) == [Op.ADD]
    assert set(graph.tensors) == {"input", "add"}


# ---- torchvision -----------------------------------------------------------------------------------------------------


def zoo(name: str) -> nn.Module:
    """Build torchvision's classifiers, the long ones with fewer blocks: tracing is what takes time."""
    define_missing_operators()
    import torchvision.models as models
    from torchvision.models.googlenet import BasicConv2d, Inception

    if name == "mobilenet_v2":
        module = models.MobileNetV2(num_classes=10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]])
    elif name == "densenet":
        module = models.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=10)
    elif name == "googlenet":
        module = nn.Sequential(
            BasicConv2d(3, 16, kernel_size=3, stride=2),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            Inception(16, 8, 8, 12, 4, 6, 6),
            nn.MaxPool2d(2, stride=2, ceil_mode=True),
            Inception(32, 8, 8, 12, 4, 6, 6),
        )
    elif name == "mnasnet":
        module = models.MNASNet(0.5, num_classes=10)
        # The layers that most of it repeats.
        module.layers = nn.Sequential(*module.layers[:10], *module.layers[14:])
        module.layers[10] = nn.Conv2d(24, 1280, 1, bias=False)
    elif name == "inception":
        from torchvision.models.inception import BasicConv2d as Basic
        from torchvision.models.inception import InceptionA, InceptionB

        module = nn.Sequential(Basic(3, 16, kernel_size=3, stride=2), InceptionA(16, 8), InceptionB(232))
    elif name == "resnext":
        from torchvision.models.resnet import Bottleneck

        module = models.ResNet(Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=8, num_classes=10)
    elif name == "shufflenet":
        module = models.ShuffleNetV2([2, 2, 1], [8, 16, 32, 64, 64])
    else:
        module = getattr(models, name)(weights=None, num_classes=10)
    return randomised(module)


@pytest.mark.parametrize(
    ("name", "side", "n_layers"),
    [
        ("resnet18", 64, 21),
        ("mobilenet_v2", 48, 11),
        ("squeezenet1_1", 64, 26),
        ("densenet", 48, 17),
        ("googlenet", 40, 13),
        ("mnasnet", 48, 23),
        ("inception", 40, 12),
        ("resnext", 48, 18),
        ("shufflenet", 48, 24),
    ],
)
def test_torchvision(name: str, side: int, n_layers: int) -> None:
    torch.manual_seed(7)
    module = zoo(name)
    graph = capture(module, (3, side, side), name=name)
    modules = dict(module.named_modules())
    assert len(graph.layers()) == n_layers
    assert all(layer.name in modules for layer in graph.layers())
    assert_legal(graph)
    assert_same(graph, module, (3, side, side))


def test_torchvision_alexnet_and_vgg_at_the_size_they_were_made_for() -> None:
    """With one linear layer in the place of three large ones: they are what takes time, and nothing new."""
    torch.manual_seed(9)
    define_missing_operators()
    from torchvision.models import AlexNet
    from torchvision.models.vgg import cfgs, make_layers

    module = AlexNet(num_classes=10)
    module.classifier = nn.Sequential(nn.Dropout(), nn.Linear(9216, 10), nn.ReLU(inplace=True))
    assert_same(capture(module.eval(), (3, 224, 224), name="alexnet"), module, (3, 224, 224), n=1)
    vgg = randomised(nn.Sequential(make_layers(cfgs["A"], batch_norm=True), nn.Flatten(), nn.Linear(512, 10)))
    graph = capture(vgg, (3, 32, 32), name="vgg11_bn")
    assert len(graph.layers()) == 9
    assert_legal(graph)
    assert_same(graph, vgg, (3, 32, 32))


# ---- exported programs -----------------------------------------------------------------------------------------------


def exported(module: nn.Module, batch: int = 1, **options) -> torch.export.ExportedProgram:
    return torch.export.export(module.eval(), (torch.zeros(batch, 3, 20, 20),), **options)


def test_an_exported_program_gives_the_same_graph() -> None:
    torch.manual_seed(10)
    module = randomised(Whole())
    direct = capture(module, (3, 20, 20), name="whole")
    assert capture(exported(module), (3, 20, 20), name="whole").digest() == direct.digest()
    batch = torch.export.Dim("batch", min=1)
    dynamic = exported(module, batch=2, dynamic_shapes={"x": {0: batch}})
    assert capture(dynamic, (3, 20, 20), name="whole").digest() == direct.digest()


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_a_decomposed_program_gives_the_same_layers() -> None:
    torch.manual_seed(11)
    module = randomised(Whole())
    graph = capture(exported(module).run_decompositions(), (3, 20, 20), name="whole")
    direct = capture(module, (3, 20, 20), name="whole")
    assert [n.name for n in graph.layers()] == [n.name for n in direct.layers()]
    assert ops_of(graph) == ops_of(direct)
    assert_legal(graph)
    assert_same(graph, module, (3, 20, 20))


def test_an_exported_program_of_another_shape() -> None:
    with pytest.raises(CaptureError, match=r"C,H,W = 3,21,20 \(AssertionError: Guard failed"):
        capture(exported(Whole()), (3, 21, 20), name="whole")


@pytest.mark.parametrize("part", [nn.BatchNorm2d(3), nn.Dropout()])
def test_an_exported_program_in_training_mode(part: nn.Module) -> None:
    program = torch.export.export(nn.Sequential(part).train(), (torch.zeros(1, 3, 8, 8),))
    with pytest.raises(UnsupportedOp, match=r"^layer '0'"):
        capture(program, (3, 8, 8), name="train")


def test_an_exported_program_with_two_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    program = torch.export.export(Two(), (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)))
    with pytest.raises(CaptureError, match=r"takes 2 inputs \(x, y\)"):
        capture(program, (3, 8, 8), name="two")
