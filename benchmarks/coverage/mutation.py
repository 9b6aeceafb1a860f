"""Who notices a fault in the code that ties, chooses, mends and cuts? Single faults, planted one at a time.

    python -m benchmarks.coverage.mutation [--filter PATTERN]

Each fault is one expression of surgeon's source that is replaced in a copy of the package. With it, the motif
networks and ops on grids (tests/models, tests/ops) are cut at random and proved, which shows whether the proof
finds the fault; where every proof holds, the tests of its folder are run. What neither notices survives, and the
script ends with status 1. Rows are kept in benchmarks/.cache/mutation.json, so that a run that was stopped goes on;
a fault is planted again if its file has changed since, or if nothing noticed it.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import hashlib
import importlib
import itertools
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.lib.results import ROOT, keep, kept, markdown, write_result

LIMIT = 1800  # seconds for the proofs, and for the tests, of one fault: many times what they take without one
LAYOUTS = ("4x8", "turned")
OPS = (
    "slice inside", "pad", "negative pad", "split and swap", "cumsum", "sort", "softmax", "norm", "moved outside", "max_pool",
    "attention", "write to a part", "glu", "flip", "kthvalue",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fault:
    """`old` stands once in `file` and is replaced by `new`."""

    file: str
    old: str
    new: str


FAULTS = [
    # ops: what each op does to ids
    Fault("ops/ids/facts.py", "if left is right:", "if True:"),
    Fault("ops/ids/facts.py", "        self.freezes.append(Freeze(ids.ravel(), reason, self.node))", "        pass"),
    Fault("ops/ids/facts.py", "            self.balances.append(Balance(matrix, self.node))", "            pass"),
    Fault("ops/ids/constraints.py", "        self.balance(column, last)", "        pass"),
    Fault("ops/ids/facts.py", "        self.join(dim_ids, first)\n", ""),
    Fault("ops/ids/constraints.py", "self.parts.append(Part(known, outer, inner, False, self.node))", "pass"),
    Fault("ops/ids/constraints.py", "known = cells[index.ravel()]", "known = cells[index.ravel()[::-1]]"),
    Fault("ops/ids/constraints.py", "for inner in dims[position + 1 :]:", "for inner in ():"),
    Fault("ops/ids/facts.py", "        if held.size:", "        if False:"),
    Fault("ops/invariants.py", "        constraints.even(ids, dim)", "        pass"),
    Fault("ops/invariants.py", "for other in mixed if dim not in mixed else ():", "for other in ():"),
    Fault("ops/invariants.py", "        if not _fits(dim, ids, shape):", "        if False:"),
    Fault("ops/invariants.py", "    axes = acyclic(constraints, axes)", "    axes = dict(axes)"),
    Fault("ops/families/moves/slicing.py", "(slice(0, start), slice(start, stop), slice(stop, None)) if", "() if"),
    Fault("ops/families/reduction.py", "is_read(ctx.node, 1):", "False:"),
    Fault("ops/families/moves/reshape.py", "dim_ids = constraints.merge(axes, ins, old)", "dim_ids = axes[here[0]]"),
    Fault("ops/families/moves/movement.py", "np.flip(t, tuple(i for i in dims if t.shape[i] > 1))", "t"),
    Fault("ops/families/moves/reshape.py", "order.index(d): t.transpose(order)", "d: t.transpose(order)"),
    # coupling: conclusions from facts
    Fault("coupling/grids.py", "        marked[k[marked[c]]] = True", "        pass"),
    Fault("coupling/solve.py", "            frozen[classes[loose]] = True\n            changed = True", "            pass"),
    Fault("coupling/solve.py", "            frozen[unread] = frozen[alone] = True", "            break"),
    Fault("coupling/grids.py", "        for side in (r, k):  # one class, two grids", "        for side in ():"),
    Fault("coupling/grids.py", "        left += [c[fk], c[fr]]", "        left += [c[fk], c[fk]]"),
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
    Fault("selection/planner.py", "return any(self.shapes.leaves(slot, choice).all() for slot", "return any(False for slot"),
    Fault("selection/budgets.py", "all(cost(choice) <= limits[kind] for", "all(True for"),
    Fault("selection/cost.py", "            for part in self._readers.pop(number, ()):", "            for part in ():"),
    Fault("selection/cost.py", "gone |= choice[part] & (part >= 0)", "gone |= choice[part]"),
    Fault("selection/knapsack.py", "        elif whole <= limit and lost(counts) < best[0]:", "        elif whole <= limit:"),
    # mend: sizes in the code
    Fault("mend/checking/expected_sizes.py", "pads[place] = kept if width > 0 else -kept", "pads[place] = kept"),
    Fault("mend/checking/expected_sizes.py", "    return {\"groups\": (out[1] if", "    return {\"groups\": (x[1] if"),
    Fault("mend/checking/expected_sizes.py", "int((~head).sum(axis=dim).max(initial=0))", "position - int(head.any())"),
    Fault("mend/candidates.py", "    if len(candidates) < 2:", "    if True:"),
    Fault("mend/mend.py", "            refused.bar(blamed, wrong)", "            pass"),
    # cut: slices
    Fault("cut/slice.py", "data = data.index_select(dim, rows.to(data.device))", "data = data.narrow(dim, 0, len(rows))"),
    Fault("cut/slice.py", "if known is not index and list(known) != list(index):", "if False:"),
    Fault("cut/slice.py", "        refresh(module, path)", "        pass"),
    Fault("cut/compose.py", "[here[dim][index] for index in indices] if dim in here else indices", "indices"),
]  # fmt: skip

TESTS = {
    "ops": ["tests/ops/test_invariants.py", "tests/coupling/test_solve.py", "tests/ops/test_ops.py"],
    "ops/families": ["tests/ops/test_invariants.py", "tests/ops/test_ops.py", "tests/ops/test_grids.py"],
    "coupling": ["tests/coupling", "tests/ops/test_ops.py"],
    "selection": ["tests/selection", "tests/api/test_surgery.py"],
    "mend": ["tests/mend", "tests/end_to_end/test_unusual_code.py", "tests/end_to_end/test_code_patterns.py"],
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


def first_failure(known: Collection[str]) -> Iterator[str]:
    """ "NAME: what was raised" of each cut that fails, but for those that fail without a fault."""
    warnings.simplefilter("ignore")
    surgeon, motifs, grids = map(importlib.import_module, ("surgeon", "motifs", "grid_cases"))
    cases = [
        (f"{layout} {op}", partial(grids.Grid, layout, op, 2), (4, 6)) for layout in LAYOUTS for op in OPS
    ]
    cases += [(motif.name, motif.make, motif.shape) for motif in motifs.MOTIFS]
    for name, make, shape in cases:
        if name in known:
            continue
        torch.manual_seed(0)
        model, x = make().eval(), torch.randn(shape)
        try:
            plan = surgeon.inspect(model, x).plan(0.5, criterion="random", seed=0, round_to=1)
            surgeon.verify(model, plan.apply(model), plan, x)
        except Exception as error:  # noqa: BLE001  # whatever a planted fault leads to
            yield f"{name}: {type(error).__name__}"


def cuts(known: Collection[str], every: bool) -> None:
    """Write the first cut that fails, or every one."""
    found = list(first_failure(known) if every else itertools.islice(first_failure(known), 1))
    Path("found").write_text("\n".join(found))


def tests(paths: Sequence[str]) -> None:
    """Write the first test that fails."""
    noticed: list[str] = []

    class Watch:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                noticed.append(report.nodeid)

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed:
                noticed.append(report.nodeid)

    pytest.main(["-x", "-q", "-p", "no:cacheprovider", *paths], plugins=[Watch()])
    Path("found").write_text("\n".join(noticed))


def apart(folder: Path, work: Callable[[], None]) -> str:
    """What work writes into `found`, in a fork whose surgeon is the copy; torch is loaded once, in the parent."""

    def inside() -> None:
        os.chdir(folder)
        sys.path[:0] = [str(folder), *(str(folder / "tests" / name) for name in ("models", "ops"))]
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        work()

    (folder / "found").write_text("the import fails")
    process = multiprocessing.get_context("fork").Process(target=inside)
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        return "it does not end"
    return (folder / "found").read_text()


def key_of(fault: Fault) -> str:
    """The fault in the present text of its file."""
    source = hashlib.sha256((ROOT / "surgeon" / fault.file).read_bytes()).hexdigest()[:12]
    return f"{fault.file} {source}: {fault.old.strip()} -> {fault.new.strip()}"


def tests_of(fault: Fault) -> list[str]:
    """The tests of the folder that a fault is in, the nearest one that has some."""
    return TESTS[max((folder for folder in TESTS if fault.file.startswith(f"{folder}/")), key=len)]


def caught_by(folder: Path, fault: Fault, known: Collection[str]) -> str:
    """The first thing that notices a fault; "" if nothing does."""
    found = apart(folder, partial(cuts, known, False))
    if found:
        return f"a cut: {found}"
    found = apart(folder, partial(tests, tests_of(fault)))
    shutil.copy(ROOT / "surgeon" / fault.file, folder / "surgeon" / fault.file)
    if found and apart(folder, partial(tests, found.splitlines())):
        raise RuntimeError(f"{found} fails without a fault as well")
    return found


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
    done = kept("mutation")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        known = [line.split(": ")[0] for line in apart(folder, partial(cuts, (), True)).splitlines()]
        for fault in chosen:
            if done.get(key_of(fault), {}).get("found"):
                continue
            start = time.perf_counter()
            plant(folder, fault)
            found = caught_by(folder, fault, known)
            shutil.copy(ROOT / "surgeon" / fault.file, folder / "surgeon" / fault.file)
            done = keep("mutation", {key_of(fault): {"found": found, "seconds": time.perf_counter() - start}})
            print(f"{fault.file} | {fault.old.strip()} | {found}", flush=True)
    rows = []
    for fault in chosen:
        row = done[key_of(fault)]
        rows.append([fault.file, f"`{fault.old.strip().splitlines()[0]}`", f"`{fault.new.strip() or '(nothing)'}`",
                     row["found"] or "**nothing**", f"{row['seconds']:.0f}"])  # fmt: skip
    caught = sum(row[3] != "**nothing**" for row in rows)
    notes = [f"{caught} of {len(rows)} planted faults were noticed."]
    if known:
        notes.append(f"Not asked, as they fail on this CPU without a fault: {', '.join(known)}.")
    table = markdown(["file", "source", "instead", "noticed by", "seconds"], rows)
    if args.filter == "*":
        write_result("mutation", "Planted faults, and what notices them", table, notes)
    sys.exit(0 if caught == len(rows) else 1)


if __name__ == "__main__":
    main()
