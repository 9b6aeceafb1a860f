"""Who notices a fault in the code that ties, chooses, mends and cuts? Single faults, planted one at a time.

    python -m benchmarks.coverage.mutation [--filter PATTERN]

Each fault is one expression of surgeon's source that is replaced in a copy of the package. With it, the motif
networks and ops on grids (tests/models, tests/ops) are cut at random and proved, which shows whether the proof
finds the fault; where every proof holds, the tests of its folder are run. What neither notices survives, and the
script ends with status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.lib.results import ROOT, markdown, write_result

LIMIT = 400  # seconds for the proofs, and for the tests, of one fault

# run in a copy of the package: prints "NAME: what was raised" of the first cut that fails
PROOFS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, surgeon
from surgeon.errors import BudgetError
from motifs import MOTIFS
from grid_cases import OPS, Grid
torch.set_num_threads(1)
known = set(sys.argv[1:])
cases = [(f"{layout} {op}", lambda op=op, layout=layout: Grid(layout, op, 2), (4, 6))
         for layout in ("4x8", "turned") for op in ("slice inside", "pad", "negative pad", "split and swap", "cumsum", "sort",
         "softmax", "norm", "moved outside", "max_pool", "attention", "write to a part", "glu", "flip", "kthvalue")]
cases += [(m.name, m.make, m.shape) for m in MOTIFS]
for name, make, shape in cases:
    if name in known:
        continue
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "running_var" in key:
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_()
    x = torch.randn(shape)
    try:
        plan = surgeon.inspect(model, x).plan(0.5, criterion="random", seed=0, round_to=1)
        surgeon.verify(model, plan.apply(model), plan, x)
    except Exception as error:  # whatever a planted fault leads to
        print(f"{name}: {type(error).__name__}", flush=True)
        if not known:
            continue
        sys.exit(1)
"""


@dataclasses.dataclass(frozen=True)
class Fault:
    """`old` stands once in `file` and is replaced by `new`."""

    file: str
    old: str
    new: str


FAULTS = [
    # ops: what each op does to ids
    Fault("ops/ids.py", "if left is right:", "if True:"),
    Fault("ops/ids.py", "        self.freezes.append(Freeze(ids.ravel(), reason, self.node))", "        pass"),
    Fault("ops/ids.py", "            self.balances.append(Balance(matrix, self.node))", "            pass"),
    Fault("ops/ids.py", "        self.balance(column, last)", "        pass"),
    Fault("ops/ids.py", "        self.join(track, first)\n", ""),
    Fault("ops/ids.py", "self.parts.append(Part(known, outer, inner, False, self.node))", "pass"),
    Fault("ops/ids.py", "order = np.argsort(np.argsort(first))", "order = np.arange(len(first))"),
    Fault("ops/ids.py", "for inner in dims[position + 1 :]:", "for inner in ():"),
    Fault("ops/ids.py", "        if held.size:", "        if False:"),
    Fault("ops/invariants.py", "        constraints.even(ids, dim)", "        pass"),
    Fault("ops/invariants.py", "for other in mixed if dim not in mixed else ():", "for other in ():"),
    Fault("ops/invariants.py", "        if not _fits(dim, ids, shape):", "        if False:"),
    Fault("ops/invariants.py", "    axes = acyclic(constraints, axes)", "    axes = dict(axes)"),
    Fault("ops/indexing.py", "(slice(0, start), slice(start, stop), slice(stop, None)) if", "() if"),
    Fault("ops/reduction.py", "is_read(ctx.node, 1):", "False:"),
    Fault("ops/reshape.py", "            track = constraints.merge(axes, ins, old)", "            track = axes[here[0]]"),
    Fault("ops/movement.py", "np.flip(t, tuple(i for i in dims if t.shape[i] > 1))", "t"),
    Fault("ops/movement.py", "order.index(d): t.transpose(order)", "d: t.transpose(order)"),
    # coupling: conclusions from facts
    Fault("coupling/solve.py", "        marked[k[marked[c]]] = True", "        pass"),
    Fault("coupling/solve.py", "            frozen[classes[loose]] = True\n            changed = True", "            pass"),
    Fault("coupling/solve.py", "            frozen[unread] = frozen[alone] = True", "            break"),
    Fault("coupling/solve.py", "        for side in (r, k):  # one class, two grids", "        for side in ():"),
    Fault("coupling/solve.py", "        left += [c[fk], c[fr]]", "        left += [c[fk], c[fk]]"),
    Fault("coupling/solve.py", "    common = math.lcm(own.size, rest.size)", "    common = max(own.size, rest.size)"),
    Fault("coupling/propagate.py", "            constraints.freeze_all(axes[node], f\"is the model's output",
          "            str(f\"is the model's output"),
    Fault("coupling/propagate.py", "                _read(node, axes, node in fed, constraints)", "                pass"),
    Fault("coupling/balanced_steps.py", "np.add.at(label, atom, weights[row] * count.astype(np.uint64))", "pass"),
    Fault("coupling/groups.py", "    loose = ~solution.frozen[atoms]", "    loose = np.ones(len(atoms), dtype=bool)"),
    # selection: what leaves
    Fault("selection/linked_groups.py", "choice[order[:, : steps * per].ravel()] = True",
          "choice[order[:1, : steps * per].ravel()] = True"),
    Fault("selection/linked_groups.py", "counts = np.arange(max(self.steps - self.kept, 0) + 1)",
          "counts = np.arange(self.steps + 1)"),
    Fault("selection/choose.py", "return any(self.shapes.leaves(slot, choice).all() for slot", "return any(False for slot"),
    Fault("selection/choose.py", "all(cost(choice) <= limits[kind] for", "all(True for"),
    Fault("selection/cost.py", "            for part in self._readers.pop(number, ()):", "            for part in ():"),
    Fault("selection/cost.py", "gone |= choice[part] & (part >= 0)", "gone |= choice[part]"),
    Fault("selection/knapsack.py", "        elif whole <= limit and lost(counts) < best[0]:", "        elif whole <= limit:"),
    # mend: sizes in the code
    Fault("mend/expected_sizes.py", "pads[place] = kept if width > 0 else -kept", "pads[place] = kept"),
    Fault("mend/expected_sizes.py", "    return {\"groups\": (out[1] if", "    return {\"groups\": (x[1] if"),
    Fault("mend/expected_sizes.py", "int((~head).sum(axis=dim).max(initial=0))", "position - int(head.any())"),
    Fault("mend/candidates.py", "    if len(candidates) < 2:", "    if True:"),
    Fault("mend/mend.py", "            refused.clear()", "            pass"),
    # cut: slices
    Fault("cut/slice.py", "data = data.index_select(dim, rows.to(data.device))", "data = data.narrow(dim, 0, len(rows))"),
    Fault("cut/slice.py", "if known is not index and list(known) != list(index):", "if False:"),
    Fault("cut/slice.py", "        refresh(module, path)", "        pass"),
    Fault("cut/compose.py", "[here[dim][index] for index in indices] if dim in here else indices", "indices"),
]  # fmt: skip

TESTS = {
    "ops": ["tests/ops/test_invariants.py", "tests/ops/test_ops.py"],
    "coupling": ["tests/coupling", "tests/ops/test_ops.py"],
    "selection": ["tests/selection", "tests/api/test_surgery.py"],
    "mend": ["tests/mend", "tests/end_to_end/test_code_patterns.py"],
    "cut": ["tests/cut", "tests/api/test_surgery.py"],
}


def plant(folder: Path, fault: Fault) -> None:
    """Put a fault into a copy of the package; the fault before it is gone.

    Raises:
        ValueError: what it replaces does not stand there once.
    """
    path = folder / "surgeon" / fault.file
    source = (ROOT / "surgeon" / fault.file).read_text()
    if source.count(fault.old) != 1:
        raise ValueError(f"{fault.file}: {fault.old!r} stands there {source.count(fault.old)} times")
    path.write_text(source.replace(fault.old, fault.new))


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy, with what its tests share on the path."""
    shared = [folder, *(folder / "tests" / name for name in ("models", "ops"))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, shared)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT
    )


def caught_by(folder: Path, fault: Fault, known: Iterable[str]) -> str:
    """The first thing that notices a fault; "" if nothing does."""
    try:
        proofs = run(folder, "-c", PROOFS, *known)
    except subprocess.TimeoutExpired:
        return "a run that does not end"
    if proofs.returncode:
        last = (proofs.stdout or proofs.stderr).strip().splitlines()[-1]
        return f"a cut of {last}" if proofs.stdout else f"the import: {last}"
    try:
        tests = run(
            folder, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS[fault.file.split("/")[0]]
        )
    except subprocess.TimeoutExpired:
        return "tests that do not end"
    failed = [line for line in tests.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0].split(" ", 1)[1] if failed else ""


def copied(folder: Path) -> None:
    for name in ("surgeon", "tests", "benchmarks", "docs", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".cache"))
    for path in (*ROOT.glob("*.toml"), *ROOT.glob("*.md")):
        shutil.copy(path, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--filter", default="*", help="files of the package, as a pattern")
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if fnmatch.fnmatch(fault.file, args.filter)]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        sound = run(folder, "-c", PROOFS).stdout.splitlines()
        known = [line.split(": ")[0] for line in sound] or ["nothing"]
        for fault in chosen:
            start = time.perf_counter()
            plant(folder, fault)
            found = caught_by(folder, fault, known)
            shutil.copy(ROOT / "surgeon" / fault.file, folder / "surgeon" / fault.file)
            rows.append([fault.file, f"`{fault.old.strip().splitlines()[0]}`", f"`{fault.new.strip() or '(nothing)'}`",
                         found or "**nothing**", f"{time.perf_counter() - start:.0f}"])  # fmt: skip
            print(" | ".join(rows[-1]), flush=True)
    caught = sum(row[3] != "**nothing**" for row in rows)
    notes = [f"{caught} of {len(rows)} planted faults were noticed."]
    if known != ["nothing"]:
        notes.append(f"Not asked, as they fail on this CPU without a fault: {', '.join(known)}.")
    table = markdown(["file", "source", "instead", "noticed by", "seconds"], rows)
    if args.filter == "*":
        write_result("mutation", "Planted faults, and what notices them", table, notes)
    sys.exit(0 if caught == len(rows) else 1)


if __name__ == "__main__":
    main()
