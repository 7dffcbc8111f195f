"""Loading: every form of model and of weights, and every way in which a file can be wrong."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgecomp.errors import CaptureError
from edgecomp.pytorch.load import load_module, read_weights
from edgecomp.pytorch.networks import resnet8
from edgecomp.pytorch.torchvision_ops import define_missing_operators

RESNET8 = "edgecomp.pytorch.networks:resnet8"


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return resnet8().state_dict()


def refused(model: str, weights: Path | None) -> str:
    with pytest.raises(CaptureError) as error:
        load_module(model, weights)
    assert type(error.value) is CaptureError
    text = str(error.value)
    assert "\n" not in text
    return text


def saved(value: object, path: Path) -> Path:
    torch.save(value, path)
    return path


def assert_loaded(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = module.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        expected = value.float() if value.is_floating_point() else value
        assert own[key].dtype == expected.dtype
        assert torch.equal(own[key], expected), key
    assert not any(part.training for part in module.modules())


# ---- factories and weights -------------------------------------------------------------------------------------------

WRAPPINGS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "model": lambda s: {"model": s, "optimizer": {"lr": 0.1}},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "DataParallel": lambda s: {f"module.{key}": value for key, value in s.items()},
    "compiled, wrapped": lambda s: {"state_dict": {f"module._orig_mod.{key}": value for key, value in s.items()}},
    "without counters": lambda s: {key: value for key, value in s.items() if "num_batches" not in key},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_weights(wrapping: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    weights = saved(WRAPPINGS[wrapping](state), tmp_path / "w.pt")
    assert_loaded(load_module(RESNET8, weights), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    other = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    assert_loaded(load_module(RESNET8, saved(other, tmp_path / "w.pth")), other)
    save_file(other, tmp_path / "w.safetensors")
    assert_loaded(load_module(RESNET8, tmp_path / "w.safetensors"), other)


def test_the_old_file_format_of_torch(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_loaded(load_module(RESNET8, tmp_path / "old.pt"), state)


def test_a_factory_in_the_current_folder_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self): super().__init__(nn.Conv2d(1, 2, 3), nn.Dropout())\n"
        "def broken(): raise ValueError('no such\\nwidth')\n"
        "def number(): return 7\n"
        "def needy(width): return nn.ReLU()\n"
        "def leaves(): raise SystemExit(3)\n"
        "half = lambda: nn.Conv2d(1, 2, 3).half()\n"
    )
    (tmp_path / "bad_nets.py").write_text("import module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = list(sys.path)
    try:
        module = load_module("my_nets:Net", None)
        assert isinstance(module[0], nn.Conv2d)
        assert not module[1].training
        assert load_module("my_nets:half", None).weight.dtype == torch.float32
        assert refused("my_nets:broken", None).startswith("my_nets:broken: raised ValueError: no such width;")
        assert "gave a int, expected a torch.nn.Module" in refused("my_nets:number", None)
        assert "raised TypeError: needy() missing 1 required" in refused("my_nets:needy", None)
        assert "raised SystemExit: 3" in refused("my_nets:leaves", None)
        assert "no function or class 'brocken'; did you mean broken?" in refused("my_nets:brocken", None)
        assert "raised ModuleNotFoundError: No module named 'module_that" in refused("bad_nets:net", None)
        assert "raised ModuleNotFoundError: No module named 'absent_nets'" in refused("absent_nets:net", None)
        assert sys.path == path
    finally:
        sys.modules.pop("my_nets", None)


@pytest.mark.parametrize("model", ["resnet18", "nets:", ":net", "", "model.onnx"])
def test_a_model_that_is_none_of_the_forms(model: str) -> None:
    assert "expected torchvision:NAME, package.module:factory, or a path that ends in .pt2" in refused(model, None)


def test_weights_given_as_the_model() -> None:
    assert "give this file as --weights" in refused("runs/best.pt", None)


# ---- weights that are wrong ------------------------------------------------------------------------------------------


class Loud:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (os.putenv, ("EDGECOMP_TEST_UNPICKLED", "1"))


class Net(nn.Module):
    pass


@pytest.mark.parametrize("value", [Net(), {"state_dict": Net()}, nn.ReLU(), {"w": Loud()}])
def test_a_pickled_module_is_refused(value: object, tmp_path: Path) -> None:
    text = refused(RESNET8, saved(value, tmp_path / "module.pt"))
    assert "is a pickled module" in text
    assert text.endswith("unpickling runs code; save model.state_dict() instead")


def test_a_pickle_by_any_other_name(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps(Loud()))
    assert "unpickling runs code" in refused(RESNET8, path)
    assert os.getenv("EDGECOMP_TEST_UNPICKLED") is None


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that TorchScript is old
        torch.jit.save(torch.jit.trace(nn.ReLU(), torch.zeros(1)), tmp_path / "script.pt")
    assert "is a TorchScript archive" in refused(RESNET8, tmp_path / "script.pt")


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    assert refused(RESNET8, tmp_path / "none.pt").endswith("none.pt: no such file")
    assert "is a folder" in refused(RESNET8, tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, this is no file of torch\n", b"\x80\x02}q\x00.", bytes(1000)])
def test_a_file_of_something_else(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"odd{suffix}"
    path.write_bytes(content)
    assert refused(RESNET8, path).startswith(f"weights {path}: ")


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_a_truncated_file(keep: float, form: str, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    text = refused(RESNET8, path)
    assert "damaged, or not a file of torch.save" in text or "not a whole safetensors file" in text


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([torch.zeros(2)], "holds a list, expected a state_dict"),
        (torch.zeros(2), "holds a Tensor"),
        ({}, "holds an empty state_dict"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "'w' is torch.complex64"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "'w' is torch.float32, torch.sparse_coo"),
        ({"a": torch.zeros(2), "b.bias": torch.tensor([1.0, float("nan")])}, "'b.bias' holds NaN or infinity"),
        ({"w": torch.tensor([float("inf")], dtype=torch.float16)}, "'w' holds NaN or infinity"),
        ({"w": torch.tensor([1e300], dtype=torch.float64)}, "'w' holds NaN or infinity"),
    ],
)
def test_a_file_without_usable_weights(value: object, found: str, tmp_path: Path) -> None:
    assert found in refused(RESNET8, saved(value, tmp_path / "w.pt"))


def test_a_state_dict_of_another_model(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    other = dict(state)
    del other["stem.weight"], other["linear.bias"]
    other["fc.weight"] = torch.zeros(3, 3)
    other["stack1.conv1.weight"] = torch.zeros(16, 8, 3, 3)
    other["stem_bn.bias"] = torch.zeros(16, dtype=torch.int8)
    text = refused(RESNET8, saved(other, tmp_path / "w.pt"))
    assert text == (
        f"weights {tmp_path / 'w.pt'} do not fit {RESNET8}: 2 missing, first 'stem.weight'; "
        "1 unexpected, first 'fc.weight'; "
        "2 of another shape, first 'stem_bn.bias': torch.int8 (16,), expected (16,)"
    )


@pytest.mark.shared
def test_read_weights_takes_the_shared_models(shared: Path) -> None:
    path = shared / "models" / "alexnet_fmnist.pt"
    state = read_weights(path)
    assert {value.dtype for value in state.values()} == {torch.float32}
    module = load_module("edgecomp.pytorch.networks:alexnet_fmnist", path)
    assert_loaded(module, state)


# ---- torchvision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v2", "regnet_x_400mf"])
def test_torchvision_with_the_number_of_classes_of_the_file(name: str, tmp_path: Path) -> None:
    define_missing_operators()
    import torchvision

    torch.manual_seed(2)
    module = torchvision.models.get_model(name, weights=None, num_classes=10)
    save_file(dict(sorted(module.state_dict().items())), tmp_path / "w.safetensors")
    loaded = load_module(f"torchvision:{name}", tmp_path / "w.safetensors")
    assert_loaded(loaded, module.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), module.eval()(images))


def test_torchvision_without_auxiliary_heads(tmp_path: Path) -> None:
    define_missing_operators()
    from torchvision.models import GoogLeNet

    with torch.device("meta"):
        module = GoogLeNet(num_classes=10, init_weights=False)
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in module.state_dict().items()}
    assert any(key.startswith("aux1.") for key in state)
    loaded = load_module("torchvision:googlenet", saved(state, tmp_path / "w.pt"))
    assert loaded.aux1 is None
    assert loaded.fc.out_features == 10


def test_torchvision_with_weights_of_another_model(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    text = refused("torchvision:resnet18", saved(state, tmp_path / "w.pt"))
    assert "do not fit torchvision:resnet18: 102 missing, first 'conv1.weight'; " in text
    assert "unexpected, first 'stem.weight'" in text


def test_torchvision_needs_weights_and_a_known_name(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    assert "nothing is downloaded; give --weights FILE" in refused("torchvision:resnet18", None)
    weights = saved(state, tmp_path / "w.pt")
    assert "no classifier 'resnet81'; did you mean" in refused("torchvision:resnet81", weights)
    assert "known: alexnet" in refused("torchvision:xyzzy", weights)


def test_torchvision_imports_without_a_warning_and_the_schemas_are_defined_once() -> None:
    code = (
        "from edgecomp.pytorch.torchvision_ops import define_missing_operators as define\n"
        "define(); define()\n"
        "import torchvision, torch\n"
        "define()\n"
        "assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms\n"
        "torchvision.models.resnet18\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- .pt2 archives ---------------------------------------------------------------------------------------------------


def archive(path: Path, module: nn.Module | None = None, **options: object) -> Path:
    module = module or nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    torch.export.save(torch.export.export(module.eval(), (torch.zeros(2, 1, 8, 8),), **options), path)
    return path


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Change records of an archive and write it again as torch's writer does."""
    with zipfile.ZipFile(path) as old:
        records = {name.split("/", 1)[1]: old.read(name) for name in old.namelist()}
    change(records)
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.set_min_version(6)
    for name, content in records.items():
        if name not in (".data/version", "version", ".data/serialization_id"):
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return path


def edit(record: str, old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    def change(records: dict[str, bytes]) -> None:
        text = records[record].decode()
        assert old in text
        records[record] = text.replace(old, new).encode()
        json.loads(records[record])

    return change


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_pt2_archive(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).eval()
    program = load_module(str(archive(tmp_path / "net.pt2", module)), None)
    assert isinstance(program, torch.export.ExportedProgram)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(program.module()(images), module(images))


def test_a_pt2_archive_with_a_dynamic_batch(tmp_path: Path) -> None:
    from edgecomp.pytorch.capture import capture

    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    dynamic = ({0: torch.export.Dim("batch")},)
    path = archive(tmp_path / "net.pt2", module, dynamic_shapes=dynamic)
    graph = capture(load_module(str(path), None), (1, 8, 8), name="net")
    assert graph.digest() == capture(module, (1, 8, 8), name="net").digest()


def test_rewriting_an_archive_changes_nothing(tmp_path: Path) -> None:
    """The refusals below are due to what they change, not to how the test writes."""
    assert load_module(str(rewritten(archive(tmp_path / "net.pt2"), lambda records: None)), None) is not None


MODEL, WEIGHTS, SAMPLES = "models/model.json", "data/weights/model_weights_config.json", "data/sample_inputs/model.pt"
EVIL = "__import__('os').putenv('EDGECOMP_TEST_UNPICKLED','1')"

HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], None], str]] = {
    "pickled sample inputs": (lambda r: r.update({SAMPLES: pickled(((Loud(),), {}))}), "sample inputs"),
    "pickled weight": (edit(WEIGHTS, '"use_pickle": false', '"use_pickle": true'), "as a pickle"),
    "weight elsewhere": (edit(WEIGHTS, '"weight_0"', '"../weight_0"'), "as a pickle"),
    "old weights": (lambda r: r.update({"data/weights/model.pt": pickled(Loud())}), "'data/weights/model.pt'"),
    "old constants": (lambda r: r.update({"data/constants/model.pt": pickled(Loud())}), "'data/constants/model.pt'"),
    "object": (lambda r: r.update({"data/constants/opaque_obj_0": pickle.dumps(Loud())}), "'data/constants/opaque"),
    "library": (lambda r: r.update({"data/aotinductor/model/m.so": b"\x7fELF"}), "'data/aotinductor/model/m.so'"),
    "second program": (lambda r: r.update({"models/other.json": r[MODEL]}), "'models/other.json'"),
    "expression": (edit(MODEL, '"sizes": [{"as_int": 2}', '"sizes": [{"as_expr": {"expr_str": "' + EVIL + '"}}'),
                   "as expr_str"),
    "name": (edit(MODEL, '"conv2d"', f'"y = {EVIL}; z"'), "as name"),
    "argument name": (edit(MODEL, '"forward_arg_names": ["input"]', f'"forward_arg_names": ["x={EVIL}"]'),
                      "as forward_arg_names"),
    "keyword name": (edit(MODEL, r'\"context\": \"[]\"', r'\"context\": \"[\\\"x=exit()\\\"]\"'), "are named"),
    "type of inputs": (edit(MODEL, "builtins.tuple", "antigravity.tuple"), "are nested in 'antigravity.tuple'"),
    "guards": (edit(MODEL, '"guards_code": []', f'"guards_code": ["{EVIL}"]'), "Python source"),
    "operator": (edit(MODEL, "torch.ops.aten.conv2d.default", "torch.hub.load"), "'torch.hub.load' as target"),
    "operator on files": (edit(MODEL, "aten.conv2d.default", "aten.from_file.default"), "as target"),
    "custom object": (edit(MODEL, '{"as_tensor": {"name": "input"}}', '{"as_custom_obj": {"name": "input"}}'),
                      "uses as_custom_obj"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_pt2_archive_that_could_run_code(case: str, tmp_path: Path) -> None:
    change, found = HOSTILE[case]
    text = refused(str(rewritten(archive(tmp_path / "net.pt2"), change)), None)
    assert found in text
    assert "loading that could run code" in text


def test_a_pt2_archive_that_is_damaged_or_none(tmp_path: Path) -> None:
    path = archive(tmp_path / "net.pt2")
    content = path.read_bytes()
    for damaged in (b"", b"no archive", content[:100], content[: len(content) // 2], content[:-10]):
        path.write_bytes(damaged)
        assert "not a .pt2 archive that torch" in refused(str(path), None)
    path.write_bytes(pickled({"a": torch.zeros(1)}))
    assert "not a .pt2 archive that torch" in refused(str(path), None)
    assert "cannot be read (No such file" in refused(str(tmp_path / "none.pt2"), None)


def test_a_pt2_archive_beside_weights(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    weights = saved(state, tmp_path / "w.pt")
    assert "holds its own weights" in refused(str(archive(tmp_path / "net.pt2")), weights)
