"""Run an ONNX file in this process, which its caller can lose: `python -P child_process_main.py MODEL INPUTS OUTPUTS EXACT`.

INPUTS is a .npz of `RUN/NAME` arrays, OUTPUTS becomes one of `RUN/NUMBER`. Imports nothing of surgeon (nor torch).
"""

from __future__ import annotations

import sys

import numpy as np


def main(model: str, inputs: str, outputs: str, exact: str) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", exact)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    runs: dict[str, dict[str, np.ndarray]] = {}
    with np.load(inputs, allow_pickle=False) as file:
        for key in file.files:
            run, _, name = key.partition("/")
            runs.setdefault(run, {})[name] = file[key]
    made = {
        f"{run}/{number}": np.asarray(array)
        for run, fed in runs.items()
        for number, array in enumerate(session.run(None, fed))
    }
    np.savez(outputs, **made)  # type: ignore[arg-type]  # the stubs take the first array for a flag


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:  # noqa: BLE001  # the caller reports whatever it was
        sys.exit(f"{type(error).__name__}: {error}")
