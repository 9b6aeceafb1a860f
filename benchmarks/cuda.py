"""One command for a machine with a GPU: `python benchmarks/cuda.py` (see gpu.py, `--help`).

It is apart from gpu.py because torch looks for a package of the name `cuda`, and finds this folder first when
a script of it runs: to whoever imports it, this file is not there.
"""

from __future__ import annotations

if __name__ != "__main__":
    raise ModuleNotFoundError("No module named 'cuda'", name="cuda")

from gpu import main

main()
