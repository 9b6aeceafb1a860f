"""A file is tried in a child process before it is trusted: some files end the process that runs them (kernels that
are missing for a dtype, say), and that must not be the caller's.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.errors import FileError
from surgeon.onnx.compare import Array, feeds
from surgeon.onnx.file import declared_inputs, head, read

_SCRIPT = Path(__file__).with_name("child_process_main.py")


def run_in_child(path: Path, fed: Sequence[dict[str, Array]], exact: bool = False) -> list[list[Array]]:
    """The outputs of a file in ONNX Runtime on the CPU, for each of the inputs.

    Args:
        exact: int8 products do not saturate (see `open_session`).

    Raises:
        FileError: the file cannot be loaded or run; of one that ends the process, its `where` names the first
            node at which it does.
    """
    outputs, problem, died = _tried(path, fed, exact)
    if outputs is not None:
        return outputs
    node = guilty_node(path, fed[0]) if died else ""
    where = f"{path}, node {node}" if node else str(path)
    fix = "export in fp32, or leave the node that is named as it is (ignore=[...])"
    raise FileError("ONNX Runtime cannot run the file", where=where, why=problem, fix=fix)


def try_inputs(path: Path, inputs: Sequence[Any]) -> list[list[Array]]:
    """`run_in_child` for (args, kwargs) of a model.

    Raises:
        FileError: as there.
        InputError: they do not fit the file's inputs.
    """
    declared = declared_inputs(read(path))
    return run_in_child(path, [feeds(each, declared) for each in inputs])


def _tried(
    path: Path, fed: Sequence[dict[str, Array]], exact: bool
) -> tuple[list[list[Array]] | None, str, bool]:
    """The outputs; or None, why, and whether the process died of it."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        arrays = {f"{run}/{name}": array for run, one in enumerate(fed) for name, array in one.items()}
        np.savez(inputs, **arrays)  # type: ignore[arg-type]  # the stubs take the first array for a flag
        command = [sys.executable, "-P", str(_SCRIPT), str(path), str(inputs), str(outputs), str(int(exact))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode < 0:
            return None, f"it ends the process ({_signal(-done.returncode)})", True
        if done.returncode:
            return None, head(done.stderr), False
        with np.load(outputs, allow_pickle=False) as file:
            found: list[list[Array]] = [[] for _ in fed]
            for key in file.files:
                found[int(key.partition("/")[0])].append(file[key])
        return found, "", False


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one that this system has no name for
        return f"signal {number}"


def guilty_node(path: Path, fed: dict[str, Array]) -> str:
    """The first node with which a file ends its process, as `NAME (OP)`: found by halving the file; "" if none of
    its beginnings does.
    """
    import onnx
    import onnx_ir as ir

    model = ir.from_proto(read(path, weights=True))
    model.graph.sort()  # the tools that write halves put casts at the end
    proto = ir.to_proto(model)
    nodes = list(proto.graph.node)
    if proto.ByteSize() > (1 << 30) or not nodes:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.onnx"

        def dies(count: int) -> bool:
            onnx.save(_beginning(proto, nodes[:count]), str(part))
            return _tried(part, [fed], exact=False)[2]

        low, high = 0, len(nodes)  # the first `low` run, the first `high` do not
        if not dies(high):
            return ""
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if dies(middle) else (middle, high)
    guilty = nodes[high - 1]
    return f"{guilty.name} ({guilty.op_type})"


def _beginning(proto: Any, nodes: list[Any]) -> Any:
    """These nodes of a file, with everything that none of them reads as outputs."""
    import onnx

    part = onnx.ModelProto()
    part.CopyFrom(proto)
    read_names = {name for node in nodes for name in node.input}
    ends = [name for node in nodes for name in node.output if name and name not in read_names]
    del part.graph.node[:], part.graph.output[:], part.graph.value_info[:]
    part.graph.node.extend(nodes)
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ends)
    return part
