"""Models by name, for the command line: `file.py:factory`, `torchvision/NAME`, `timm/NAME`,
`transformers/TYPE`, or a bare name.

Nothing is downloaded and nothing is unpickled: weights are random, or come from a safetensors file.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect as python_inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.errors import InputError, MissingExtraError
from surgeon.graph.messages import raised


def build(name: str) -> nn.Module:
    """The model that MODEL names.

    Raises:
        InputError: there is no such model, or making it fails.
        MissingExtraError: its package is not installed.
    """
    kind, slash, rest = name.partition("/")
    if ":" in name or name.endswith(".py"):
        return _from_file(name)
    if slash and kind in _ZOO:
        return _ZOO[kind](rest)
    if slash:
        raise InputError(
            f"unknown model {name!r}",
            fix=f"use file.py:factory or one of {', '.join(f'{k}/NAME' for k in _ZOO)}",
        )
    if (
        importlib.util.find_spec("torchvision") is None
        or name not in _package("torchvision.models").list_models()
    ):
        return _timm(name)
    return _torchvision(name)


def _from_file(name: str) -> nn.Module:
    path, _, factory = name.rpartition(":")
    if not path or not factory or not os.path.isfile(path):
        missing = f"there is no file {path!r}" if path and factory else "the name of the factory is missing"
        raise InputError(f"cannot load {name!r}: {missing}", fix="use path/to/file.py:factory")
    file = Path(path).resolve()
    spec = importlib.util.spec_from_file_location(f"_surgeon_model_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file", fix="use path/to/file.py:factory")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and the like look their module up
    sys.path.insert(0, str(file.parent))  # the file may import its neighbours, as it may when it is run
    try:
        spec.loader.exec_module(module)
        made = getattr(module, factory)()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's own code: anything may come out of it, `sys.exit` too
        raise InputError(
            "the model cannot be made",
            where=name,
            why=raised(error),
            fix="the factory is called without arguments and returns the module",
        ) from error
    finally:
        sys.path.remove(str(file.parent))
    if not isinstance(made, nn.Module):
        raise InputError(
            f"{name} gave a {type(made).__name__}, not a torch.nn.Module",
            fix="let the factory return the module",
        )
    return made


def _package(name: str) -> Any:
    """An optional package.

    Raises:
        MissingExtraError: it is not installed.
        InputError: it is installed but does not fit the installed torch.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise _import_problem(name.partition(".")[0], error) from error


def _import_problem(package: str, error: BaseException) -> Exception:
    """The error to raise for one that came out of an import."""
    cause: BaseException | None = error
    while cause is not None:
        if "torchvision::" in str(cause):
            return InputError(
                f"{package} cannot be imported",
                why=f"torchvision was built for another torch than {torch.__version__} ({cause})",
                fix="install both from one index, for example: pip install --force-reinstall torch torchvision "
                "--index-url https://download.pytorch.org/whl/cpu",
            )
        cause = cause.__cause__ or cause.__context__
    return MissingExtraError(
        f"{package} cannot be imported", why=str(error), fix='pip install "surgeon-torch[zoo]"'
    )


def _torchvision(name: str) -> nn.Module:
    models = _package("torchvision.models")
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    backbone = (
        {"weights_backbone": None}
        if "weights_backbone" in python_inspect.signature(builder).parameters
        else {}
    )
    made: nn.Module = builder(weights=None, **backbone)
    return made


def _timm(name: str) -> nn.Module:
    timm = _package("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    made: nn.Module = timm.create_model(name, pretrained=False)
    return made


def _transformers(name: str) -> nn.Module:
    os.environ["HF_HUB_OFFLINE"] = (
        "1"  # read when the package is imported; a default configuration needs no file
    )
    transformers = _package("transformers")
    if name not in transformers.CONFIG_MAPPING:
        raise _unknown("transformers", name, list(transformers.CONFIG_MAPPING.keys()))
    try:
        made: nn.Module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name))
    except (ImportError, RuntimeError) as error:
        raise _import_problem("transformers", error) from error
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise InputError(
            f"transformers/{name} has no model for its default configuration", why=str(error)[:400]
        ) from error
    return made


def _unknown(package: str, name: str, known: list[str]) -> InputError:
    near = " or ".join(difflib.get_close_matches(name, known, n=3))
    return InputError(
        f"{package} has no model {name!r}",
        fix=f"did you mean {near}?" if near else "see the package's list of models",
    )


_ZOO: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}
