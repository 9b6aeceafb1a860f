"""ONNX files on disk: read one or say what is wrong with it, what it takes on disk, open it in ONNX Runtime,
put it in place.

Whatever is given (nothing, a folder, an empty, truncated or foreign file, a file whose weights are missing)
gives a `FileError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from surgeon.errors import FileError
from surgeon.files import draft_folder, locked, put, regular_target, unwritable

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
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        why = "it is truncated or something else: " + head(str(error))
        raise FileError("this is not an ONNX file", where=str(path), why=why, fix=_WRITE_ANEW) from error
    if not proto.opset_import or not proto.graph.output:
        raise FileError(
            "this is not an ONNX file", where=str(path), why="it holds no graph with outputs", fix=_WRITE_ANEW
        )
    for file, needed in _external(proto, str(path)).items():
        found = (path.parent / file).stat().st_size if os.path.isfile(path.parent / file) else -1
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
    if os.path.isdir(path):
        problem = "this is a folder, not an ONNX file"
    elif not os.path.isfile(path):
        problem = "there is no such file"
    elif not path.stat().st_size:
        problem = "the file is empty"
    if problem:
        raise FileError(
            problem,
            where=str(path),
            fix="pass the path of an ONNX file, as surgeon.export(model, path) writes one",
        )


def _external(proto: Any, where: str = "") -> dict[str, int]:
    """External file name -> bytes that it has to have.

    Raises:
        FileError: a tensor's data lie elsewhere than beside the file, or are not described by numbers.
    """
    needed: dict[str, int] = {}
    for tensor in _tensors(proto.graph):
        if tensor.data_location == _EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            name, offset, length = (
                entry.get("location", ""),
                entry.get("offset", "0"),
                entry.get("length", "0"),
            )
            if (
                not name
                or name in (".", "..")
                or Path(name).name != name
                or not (offset + length).isdecimal()
            ):
                raise FileError(
                    "this ONNX file names no file of weights beside it", where=where,
                    why=f"tensor {tensor.name[:80]!r}: location {name[:80]!r}, offset {offset[:30]}, length {length[:30]}",
                    fix=_WRITE_ANEW,
                )  # fmt: skip
            needed[name] = max(int(offset) + int(length), needed.get(name, 0))
    return needed


def _tensors(graph: Any) -> Iterator[Any]:
    """Every tensor that a graph holds: initializers, attributes, and those of the graphs in it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def save(proto: Any, path: Path) -> None:
    """Write a file; weights that protobuf cannot hold lie in `<path>.data` beside it."""
    import onnx

    large = proto.ByteSize() > INLINE_LIMIT
    onnx.save(proto, str(path), save_as_external_data=large, location=f"{path.name}.data")


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


class DeclaredInput(NamedTuple):
    """An input as ONNX Runtime's sessions say it: type is `tensor(float)` and the like."""

    name: str
    type: str


_TYPES = {"FLOAT": "float", "DOUBLE": "double"}


def declared_inputs(proto: Any) -> list[DeclaredInput]:
    """The inputs that a file wants, without running it."""
    import onnx

    given = {tensor.name for tensor in proto.graph.initializer}
    found = []
    for item in proto.graph.input:
        kind = onnx.TensorProto.DataType.Name(item.type.tensor_type.elem_type)
        if item.name not in given:
            found.append(DeclaredInput(item.name, f"tensor({_TYPES.get(kind, kind.lower())})"))
    return found


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
    """A path in a hidden folder beside `target`; its file takes the place of `target` if all went well, else
    nothing stays behind.

    External weights get names that their contents say (`<name>.<digest>.data`) and are there before the file that
    names them: whatever happens meanwhile, `target` and its weights are the earlier ones or the new ones. Then the
    earlier weights go.

    Raises:
        FileError: `target` is no regular file or cannot be written.
    """
    place = regular_target(target)
    with draft_folder(place.parent) as folder:
        draft = folder / place.name
        try:
            yield draft
            names = name_by_content(draft)
        except OSError as problem:
            raise unwritable(target, problem) from problem
        with locked(place.parent):
            for name in names:
                put(folder / name, place.parent / name)
            put(draft, place)
            _remove_weights(place, names)


def is_weights_of(name: str, file: str) -> bool:
    """Whether a name is one of external weights of an ONNX file of this name."""
    own = name.startswith(f"{file}.") and _DIGEST.fullmatch(name, len(file))
    return name == f"{file}.data" or bool(own)


_DIGEST = re.compile(r"\.[0-9a-f]{16}\.data$")


def name_by_content(draft: Path) -> list[str]:
    """Rename a draft's external weights (those that are not named so yet), and say so in the file; their names.

    Raises:
        FileError: the draft is no whole ONNX file.
    """
    proto = read(draft)
    names = {
        name: name if _DIGEST.search(name) else f"{draft.name}.{_digest_of(draft.parent / name)}.data"
        for name in _external(proto, str(draft))
    }
    if all(old == new for old, new in names.items()):
        return list(names)
    for tensor in _tensors(proto.graph):
        for item in tensor.external_data:
            if item.key == "location":
                item.value = names[item.value]
    for old, new in names.items():
        os.rename(draft.parent / old, draft.parent / new)
    draft.write_bytes(proto.SerializeToString())
    return list(names.values())


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _remove_weights(place: Path, named: Sequence[str]) -> None:
    """Remove external weights of this file's name that it does not name (any more)."""
    for file in [*place.parent.iterdir()]:
        if is_weights_of(file.name, place.name) and file.name not in named:
            with contextlib.suppress(OSError):  # another's, or gone already
                file.unlink()


def head(text: str) -> str:
    """The first lines of a long message, as one."""
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][:4])[:500]
