"""Find the trained network that the user names, without downloading anything and without unpickling code."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from edgecomp.errors import CaptureError
from edgecomp.pytorch.pt2 import load_pt2_archive
from edgecomp.pytorch.torchvision_ops import define_missing_operators

_FORMS = "expected torchvision:NAME, package.module:factory, or a path that ends in .pt2"
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # from DataParallel and from torch.compile
_SAFETENSORS = ".safetensors"
# Heads that help training only; torchvision builds them unless told not to.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def load_module(model: str, weights: Path | None) -> nn.Module | ExportedProgram:
    """Load a trained network, in evaluation mode, float32, on the CPU.

    Args:
        model: `torchvision:NAME`, built with as many classes as the weights have and without auxiliary heads;
            `package.module:factory`, called without arguments, the current folder importable; or the path of a `.pt2`
            archive of torch.export.
        weights: a .safetensors file or a state_dict saved by torch. Needed for torchvision; a factory may come with
            its own; a .pt2 archive always does.

    Raises:
        CaptureError: the model or the weights cannot be found or read, do not fit together, hold NaN or infinity, or
            are a pickled module.
    """
    if model.endswith(".pt2"):
        if weights is not None:
            raise CaptureError(f"{model}: a .pt2 archive holds its own weights; leave --weights {weights} out")
        return load_pt2_archive(Path(model))
    if Path(model).suffix in (".pt", ".pth", ".bin", _SAFETENSORS):
        raise CaptureError(f"model {model!r} is a file of weights; {_FORMS}, and give this file as --weights")
    source, colon, name = model.partition(":")
    if not (source and colon and name):
        raise CaptureError(f"model {model!r}; {_FORMS}")
    state = None if weights is None else read_weights(weights)
    if source != "torchvision":
        module = _from_factory(model, source, name)
    elif state is None:
        _torchvision_classifiers(name)
        raise CaptureError(f"{model}: the trained weights are missing, and nothing is downloaded; give --weights FILE")
    else:
        module, state = _from_torchvision(name, state)
    if state is not None:
        _check_fit(module, state, model=model, weights=weights)
        module.load_state_dict(state, assign=True)
    return module.cpu().float().eval()


def untrained(model: str) -> nn.Module | ExportedProgram:
    """Build a network for its shapes alone: torchvision's with random weights, any other as `load_module` gives it.

    Raises:
        CaptureError: as `load_module`.
    """
    source, _, name = model.partition(":")
    if source != "torchvision":
        return load_module(model, None)
    options = {"aux_logits": False, "init_weights": False} if name in _AUXILIARY else {}
    module: nn.Module = _torchvision_classifiers(name).get_model(name, weights=None, **options)
    return module.float().eval()


# ---- models ----------------------------------------------------------------------------------------------------------


def _from_torchvision(name: str, state: dict[str, torch.Tensor]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Build a classifier of torchvision to fit a state_dict; give what of the state_dict it uses."""
    zoo = _torchvision_classifiers(name)
    options: dict[str, Any] = {"weights": None}
    if name in _AUXILIARY:
        options |= {"aux_logits": False, "init_weights": False}
        state = {key: value for key, value in state.items() if not key.startswith(_AUXILIARY[name])}
    blank = _without_values(lambda: zoo.get_model(name, **options))
    head = [key for key, value in blank.state_dict().items() if value.ndim >= 2][-1]
    if head in state and state[head].ndim >= 2:
        options["num_classes"] = state[head].shape[0]
    return _without_values(lambda: zoo.get_model(name, **options)), state


def _torchvision_classifiers(name: str) -> Any:
    """Import torchvision's classifiers and refuse a name that none of them has."""
    define_missing_operators()
    try:
        import torchvision.models as zoo
    except ImportError as error:
        raise CaptureError(f"torchvision:{name}: no torchvision here; pip install 'edgecomp[build]'") from error
    known = zoo.list_models(module=zoo)
    if name not in known:
        raise CaptureError(f"torchvision has no classifier {name!r}; {_close(name, known)}")
    return zoo


def _without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network whose weights will all be replaced: on the meta device where its constructor bears that."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:  # the constructor looks at values
        return build()


def _from_factory(model: str, source: str, name: str) -> nn.Module:
    """Import a function or class and call it; the current folder is importable meanwhile."""
    sys.path.insert(0, os.getcwd())
    define_missing_operators()  # a factory may well import torchvision
    try:
        library = importlib.import_module(source)
        factory = getattr(library, name, None)
        if not callable(factory):
            public = [key for key, value in vars(library).items() if callable(value) and not key.startswith("_")]
            raise CaptureError(f"{model}: module {source!r} has no function or class {name!r}; {_close(name, public)}")
        module = factory()
    except CaptureError:
        raise
    except (Exception, SystemExit) as error:  # whatever a stranger's code raises
        message = " ".join(str(error).split())
        advice = "expected a factory that needs no argument"
        if isinstance(error, ModuleNotFoundError):
            advice = f"expected a module in {os.getcwd()} or installed"
        raise CaptureError(f"{model}: raised {type(error).__name__}: {message}; {advice}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(module, nn.Module):
        raise CaptureError(f"{model}: gave a {type(module).__name__}, expected a torch.nn.Module")
    return module


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known)[:8])} ..."


# ---- weights ---------------------------------------------------------------------------------------------------------


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state_dict: half precision becomes float32, common wrappers and prefixes are taken off.

    Raises:
        CaptureError: the file cannot be read, holds something else, or a tensor in it holds NaN or infinity.
    """
    if path.is_dir():
        raise CaptureError(f"weights {path}: is a folder, expected a .safetensors file or a saved state_dict")
    if not path.exists():
        raise CaptureError(f"weights {path}: no such file")
    stored = _read_safetensors(path) if path.suffix == _SAFETENSORS else _read_torch(path)
    state = _unwrapped(path, stored)
    for key, value in state.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_complex():
            raise CaptureError(f"weights {path}: {key!r} is {value.dtype}, {value.layout}; expected plain numbers")
        if value.is_floating_point():
            state[key] = value.float()
            if not torch.isfinite(state[key]).all():
                raise CaptureError(f"weights {path}: {key!r} holds NaN or infinity; expected finite numbers")
    return state


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CaptureError(f"weights {path}: not a whole safetensors file ({_first_line(error)})") from error


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'torch.load' received a zip file that looks like a TorchScript")
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises all kinds on a damaged file
        text = str(error)
        if "TorchScript" in text:
            raise CaptureError(
                f"weights {path}: is a TorchScript archive, which brings code along; save model.state_dict() instead"
            ) from error
        found = re.search(r"GLOBAL ([\w.]+)", text)
        if found is not None or _is_bare_pickle(path):
            held = f" ({found[1]})" if found is not None else ""
            raise CaptureError(
                f"weights {path}: is a pickled module or other Python object{held}: "
                "unpickling runs code; save model.state_dict() instead"
            ) from error
        raise CaptureError(
            f"weights {path}: damaged, or not a file of torch.save ({type(error).__name__}); "
            "expected a saved state_dict"
        ) from error


def _is_bare_pickle(path: Path) -> bool:
    """Tell a file of pickle.dump, protocol 3 or later, from torch's own, which starts with protocol 2 or is a zip."""
    try:
        with path.open("rb") as file:
            return file.read(2) in (b"\x80\x03", b"\x80\x04", b"\x80\x05")
    except OSError:
        return False


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _unwrapped(path: Path, stored: object) -> dict[str, torch.Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(stored, Mapping) and isinstance(stored.get(wrapper), Mapping):
            stored = stored[wrapper]
    if not isinstance(stored, Mapping) or not stored:
        kind = "an empty state_dict" if isinstance(stored, Mapping) else f"a {type(stored).__name__}"
        raise CaptureError(f"weights {path}: holds {kind}, expected a state_dict: tensors by name")
    state: dict[str, torch.Tensor] = {}
    for key, value in stored.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"weights {path}: {key!r} is a {type(value).__name__}, expected a state_dict: tensors by name"
            )
        state[key] = value
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _check_fit(module: nn.Module, state: Mapping[str, torch.Tensor], *, model: str, weights: Path | None) -> None:
    own = module.state_dict()
    # Only training reads the counters, and older files lack them.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and _kind(state[key]) != _kind(own[key])]
    named = ((missing, "missing"), (unexpected, "unexpected"))
    found = [f"{len(keys)} {what}, first {keys[0]!r}" for keys, what in named if keys]
    if wrong:
        key = wrong[0]
        found.append(f"{len(wrong)} of another shape, first {key!r}: {_said(state[key])}, expected {_said(own[key])}")
    if found:
        raise CaptureError(f"weights {weights} do not fit {model}: {'; '.join(found)}")


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, bool]:
    return tensor.shape, tensor.is_floating_point()


def _said(tensor: torch.Tensor) -> str:
    return f"{'' if tensor.is_floating_point() else str(tensor.dtype) + ' '}{tuple(tensor.shape)}"
