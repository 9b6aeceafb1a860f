"""ONNX files on disk: read one or say what is wrong with it, what it takes on disk, open it in ONNX Runtime,
put it in place.

Whatever is given (nothing, a folder, an empty, truncated or foreign file, a file whose weights are missing)
gives a `FileError`.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from surgeon.errors import FileError

_WRITE_ANEW = "write it anew with surgeon.export(model, path)"
SCOPES = "pkg.torch.onnx.name_scopes"  # a node's modules, the outermost first, then its own name
INLINE_LIMIT = int(0.9 * (1 << 31))  # bytes; protobuf refuses files of more than 2 GB
_EXTERNAL = 1  # TensorProto.EXTERNAL


def read(path: str | os.PathLike[str], weights: bool = False) -> Any:
    """The `onnx.ModelProto` of a file, after a look at whether all of it is there.

    Args:
        weights: load external weights as well; else they stay where they are.

    Raises:
        FileError: it is missing, a folder, empty, truncated or no ONNX file, or its external weights are
            missing or too short.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = Path(path)
    _check_there(path)
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        why = "it is truncated or something else: " + head(str(error))
        raise FileError("this is not an ONNX file", where=str(path), why=why, fix=_WRITE_ANEW) from error
    if not proto.opset_import or not proto.graph.output:
        raise FileError(
            "this is not an ONNX file", where=str(path), why="it holds no graph with outputs", fix=_WRITE_ANEW
        )
    for file, needed in _external(proto).items():
        found = (path.parent / file).stat().st_size if (path.parent / file).is_file() else -1
        if found < needed:
            state = "is missing" if found < 0 else f"has {found:,} of {needed:,} bytes"
            fix = "copy it next to the ONNX file, as surgeon.export wrote it"
            raise FileError(
                "the weights of this ONNX file are not there", where=str(path), why=f"{file} {state}", fix=fix
            )
    if weights:
        onnx.load_external_data_for_model(proto, str(path.parent))
    return proto


def _check_there(path: Path) -> None:
    problem = None
    if path.is_dir():
        problem = "this is a folder, not an ONNX file"
    elif not path.is_file():
        problem = "there is no such file"
    elif not path.stat().st_size:
        problem = "the file is empty"
    if problem:
        raise FileError(
            problem,
            where=str(path),
            fix="pass the path of an ONNX file, as surgeon.export(model, path) writes one",
        )


def _external(proto: Any) -> dict[str, int]:
    """External file name -> bytes that it has to have."""
    needed: dict[str, int] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == _EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
            needed[entry["location"]] = max(end, needed.get(entry["location"], 0))
    return needed


def size_on_disk(path: Path, proto: Any = None) -> int:
    """Bytes of a file and its external weights."""
    external = _external(read(path) if proto is None else proto)
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in external)


def params_of(proto: Any) -> int:
    """Elements of the floating-point initializers, scalars left out: they are constants of the code."""
    import onnx

    kinds = (
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.DOUBLE,
    )
    return sum(
        math.prod(item.dims) for item in proto.graph.initializer if item.data_type in kinds and item.dims
    )


def opset_of(proto: Any) -> int:
    """Version of the default operator set."""
    return int(next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")))


def open_session(
    path: str | os.PathLike[str], threads: int = 0, providers: Sequence[Any] = ("CPUExecutionProvider",), profile: str = "",
    optimized: str = "", exact: bool = False,
) -> Any:  # fmt: skip
    """An `onnxruntime.InferenceSession` with all optimisations.

    Args:
        threads: intra-op threads; 0: ONNX Runtime's choice.
        profile: prefix of a profile to write; "": none.
        optimized: where to write the graph that really runs; "": nowhere.
        exact: int8 products do not saturate, on CPUs where they otherwise do; it is slower there.

    Raises:
        Exception: ONNX Runtime's own, which share no class.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # errors come as exceptions
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # idle threads must not slow what runs next
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(str(path), options, providers=list(providers))


@contextlib.contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """A path in a temporary folder beside `target`; its files take their places if all went well, else
    nothing stays behind.

    Raises:
        FileError: `target` is a folder or cannot be written.
    """
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as drafts:
            yield Path(drafts) / target.name
            for file in sorted(
                Path(drafts).iterdir(), reverse=True
            ):  # the weights before the file that names them
                os.replace(file, target.parent / file.name)
    except OSError as problem:
        fix = "choose a path that can be written"
        raise FileError("cannot write the file", where=str(target), why=str(problem), fix=fix) from problem
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not there, or not empty: it holds the result
                folder.rmdir()


def head(text: str) -> str:
    """The first lines of a long message, as one."""
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][:4])[:500]
