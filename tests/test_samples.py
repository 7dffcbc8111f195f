"""The bundled sample is what its record says, and the networks fit the trained weights they are meant for."""

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from edgecomp import samples
from edgecomp.errors import DataError, UsageError
from edgecomp.pytorch import networks
from edgecomp.samples import sample_files, train

FOLDER = Path(samples.__file__).parent


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    with np.load(sample_files().images, allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    model = networks.resnet8()
    model.load_state_dict(load_file(sample_files().weights), strict=True)
    return model.eval()


def test_stays_under_three_megabytes():
    sizes = {p.name: p.stat().st_size for p in FOLDER.iterdir() if p.is_file()}
    assert set(sizes) >= {
        "resnet8_fmnist.safetensors",
        "images.npz",
        "sample.json",
        "README.md",
        "LICENSE.fashion-mnist",
    }
    assert sum(sizes.values()) < 3_000_000, sizes


def test_images_have_the_shapes_that_the_docstring_gives(images):
    shapes = {name: (array.shape, array.dtype.name) for name, array in images.items()}
    assert shapes == {
        "calib_x": ((512, 28, 28), "uint8"),
        "calib_y": ((512,), "uint8"),
        "test_x": ((2000, 28, 28), "uint8"),
        "test_y": ((2000,), "uint8"),
    }


def test_classes_are_balanced_and_mixed(images):
    assert np.bincount(images["test_y"]).tolist() == [200] * 10
    assert sorted(np.bincount(images["calib_y"]).tolist()) == [51] * 8 + [52] * 2
    for labels in (images["calib_y"], images["test_y"]):  # any first hundred images are a fair sample of all classes
        assert np.bincount(labels[:100], minlength=10).min() >= 2


def test_no_image_twice(images):
    everything = np.concatenate([images["calib_x"], images["test_x"]])
    assert len(np.unique(everything.reshape(len(everything), -1), axis=0)) == len(everything)


@pytest.mark.parametrize(("name", "part"), [("bundled_test", "test"), ("bundled_calibration", "calib")])
def test_recorded_accuracy_is_measured_again(name, part, images, network):
    """Written out in numpy from the record alone, not through the code that trained: pixels / 255, pad, normalise."""
    record = sample_files().record
    pre = record["preprocessing"]
    padded = np.pad(images[f"{part}_x"] / 255, ((0, 0), (pre["pad"],) * 2, (pre["pad"],) * 2))
    x = ((padded - pre["mean"][0]) / pre["std"][0]).astype(np.float32)[:, None]
    assert x.shape[1:] == tuple(record["input_shape"])
    with torch.inference_mode():
        found = torch.cat([network(part_x) for part_x in torch.from_numpy(x).split(250)]).argmax(1).numpy()
    correct = int((found == images[f"{part}_y"]).sum())
    assert record["accuracy"][name]["n"] == len(x)
    assert abs(correct - record["accuracy"][name]["correct"]) <= 1


def test_recorded_accuracy_is_good_enough():
    accuracy = sample_files().record["accuracy"]
    assert accuracy["test"]["n"] == 10_000
    assert accuracy["test"]["correct"] >= 9_100
    assert accuracy["bundled_test"]["correct"] / 2_000 >= 0.91


def test_weights_are_float32_and_about_78_thousand(network):
    count = sum(p.numel() for p in network.parameters())
    assert count == sample_files().record["parameters"]
    assert 70_000 < count < 85_000
    with safe_open(sample_files().weights, framework="np") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  no iterator there
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("num_batches_tracked")} == {"F32"}


def test_the_network_has_the_layers_of_mlperf_tiny(network):
    layers = {
        name: (tuple(m.weight.shape), getattr(m, "stride", None))
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    }
    assert layers == {
        "stem": ((16, 1, 3, 3), (1, 1)),
        "stack1.conv1": ((16, 16, 3, 3), (1, 1)),
        "stack1.conv2": ((16, 16, 3, 3), (1, 1)),
        "stack2.conv1": ((32, 16, 3, 3), (2, 2)),
        "stack2.conv2": ((32, 32, 3, 3), (1, 1)),
        "stack2.shortcut": ((32, 16, 1, 1), (2, 2)),
        "stack3.conv1": ((64, 32, 3, 3), (2, 2)),
        "stack3.conv2": ((64, 64, 3, 3), (1, 1)),
        "stack3.shortcut": ((64, 32, 1, 1), (2, 2)),
        "linear": ((10, 64), None),
    }
    assert networks.resnet8(3, 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_finding_the_files_imports_neither_torch_nor_the_script():
    code = (
        "import sys; from edgecomp.samples import sample_files; sample_files(); "
        "assert not {'torch', 'safetensors', 'edgecomp.samples.train'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_HERE", tmp_path)
    with pytest.raises(DataError, match=r"sample\.json: missing"):
        sample_files()
    (tmp_path / "sample.json").write_text((FOLDER / "sample.json").read_text())
    with pytest.raises(DataError, match=r"resnet8_fmnist\.safetensors: missing"):
        sample_files()


@pytest.mark.shared
@pytest.mark.parametrize("name", ["alexnet_fmnist", "vgg16_bn_fmnist", "vgg16_bn_cifar"])
def test_networks_take_the_trained_weights_strictly(name, shared):
    state = torch.load(shared / "models" / f"{name}.pt", weights_only=True)
    with torch.device("meta"):  # the names and shapes count here, not the values
        model = getattr(networks, name)()
    model.load_state_dict(state, strict=True, assign=True)
    model.float().eval()
    channels = 3 if name.endswith("cifar") else 1
    assert model(torch.zeros(1, channels, 32, 32)).shape == (1, 10)


@pytest.mark.shared
def test_bundled_images_are_drawn_from_the_right_halves(images, shared):
    """Calibration: of the 5,000 training images that were held out. Test: of the test images."""
    raw = shared / "data" / "FashionMNIST" / "raw"
    for part, file, first in (("calib", "train", 55_000), ("test", "t10k", 0)):
        pixels = gzip.decompress((raw / f"{file}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((raw / f"{file}-labels-idx1-ubyte.gz").read_bytes())[8:]
        known = {(pixels[784 * i : 784 * (i + 1)], labels[i]) for i in range(first, len(labels))}
        drawn = {(x.tobytes(), int(y)) for x, y in zip(images[f"{part}_x"], images[f"{part}_y"], strict=True)}
        assert drawn <= known


def test_draws_are_balanced_and_depend_on_the_seed_alone():
    labels = np.repeat(np.arange(4, dtype=np.uint8), [9, 5, 7, 6])
    drawn = train.draw_balanced(labels, 18, np.random.default_rng(1))
    assert len(set(drawn.tolist())) == 18
    assert sorted(np.bincount(labels[drawn]).tolist()) == [4, 4, 5, 5]
    assert drawn.tolist() == train.draw_balanced(labels, 18, np.random.default_rng(1)).tolist()
    assert drawn.tolist() != train.draw_balanced(labels, 18, np.random.default_rng(2)).tolist()


def test_npz_has_no_clock_in_it(tmp_path, images):
    train.write_npz(tmp_path / "images.npz", images)
    with zipfile.ZipFile(tmp_path / "images.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(tmp_path / "images.npz") as archive:
        assert all(np.array_equal(archive[name], array) for name, array in images.items())


def test_augmentation_only_shifts_and_mirrors():
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[10:14, 10] = torch.arange(1, 5, dtype=torch.uint8)
    seen = set()
    for result in train.augment(image.repeat(300, 1, 1), torch.Generator().manual_seed(0)):
        rows, columns = np.nonzero(result.numpy())
        assert result[rows, columns].tolist() == [1, 2, 3, 4]
        assert rows.tolist() == list(range(rows[0], rows[0] + 4))
        seen.add((int(rows[0]), int(columns[0])))
    shifted, mirrored = range(8, 13), range(15, 20)  # column 10, or 27 - 10, by up to 2 pixels
    assert seen == {(row, column) for row in shifted for column in (*shifted, *mirrored)}


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"not gzip",
        b"\x1f\x8b\x08",
        gzip.compress(b"\0\0\x08\x01\0\0\0\x04abcd", mtime=0)[:10] + b"\xff" * 20,
        gzip.compress(b"\0\0\x08\x03\0\0", mtime=0),
        gzip.compress(b"\0\0\x08\x01\0\0\0\x05abcd", mtime=0),
    ],
    ids=["missing", "not gzip", "cut", "damaged", "images", "too short"],
)
def test_damaged_data_is_one_line(tmp_path, content):
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz: [^\n]*$"):
        train.read_idx(path, 1)


def test_the_script_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(UsageError, match="--epochs 0"):
        train.make(tmp_path, tmp_path, epochs=0, seed=0)
    with pytest.raises(UsageError, match="not a directory"):
        train.make(tmp_path, tmp_path / "out", epochs=1, seed=0)
    with pytest.raises(DataError, match="train-images"):
        train.make(tmp_path, tmp_path, epochs=1, seed=0)


def test_the_record_is_json_for_people():
    text = (FOLDER / "sample.json").read_text(encoding="utf-8")
    record = json.loads(text)
    assert text == json.dumps(record, indent=2) + "\n"
    assert len(record["classes"]) == 10
    assert record["command"].startswith("python -m edgecomp.samples.train --data ROOT --epochs ")
