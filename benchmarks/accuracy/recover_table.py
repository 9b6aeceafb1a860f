"""The tables of benchmarks/accuracy/recover.py, from the cells of the cache."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.accuracy.recover_cells import METHODS, REDUCTIONS, Cells, Job
from benchmarks.accuracy.recover_models import LENGTH
from benchmarks.accuracy.recover_sentences import AMONG, TOKENS
from benchmarks.accuracy.recover_tasks import HELD_OUT, SAMPLES, TASKS, TEXTS
from benchmarks.lib.cifar_data import MODELS
from benchmarks.lib.results import markdown, write_result


class Tables:
    """The tables of all cells in the cache."""

    def __init__(self, cells: Cells, recipes: Mapping[str, str]) -> None:
        self.cells, self.recipes = cells, recipes
        self.seeds = sorted({int(key.split()[2]) for key in cells})

    def values(
        self,
        model: str,
        reduction: float,
        tool: str,
        place: int,
        epochs: int = 0,
        recipe: str = "",
        what: str = "value",
    ) -> list[Any]:
        """One for each seed that was run."""
        found = []
        for seed in self.seeds:
            key = Job(model, reduction, seed, tool, epochs, recipe, place).keys[METHODS[tool][place]]
            if self.cells.get(key, {}).get(what) is not None:
                found.append(self.cells[key][what])
        return found

    def score(self, model: str, *which: Any) -> str:
        """Mean ± standard deviation (seeds)."""
        found = self.values(model, *which)
        if not found:
            return "-"
        scale, digits = (100, 1) if TASKS[model].sign > 0 else (1, 3)
        spread = f" ± {scale * statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
        return f"{scale * statistics.mean(found):.{digits}f}{spread} ({len(found)})"

    def base(self, model: str, what: str = "value") -> Any:
        return (self.values(model, 1.0, "base", 0, what=what) or [None])[0]

    def rows(self, models: Mapping[str, Any]) -> Iterator[list[str]]:
        """Before fine-tuning."""
        for model in models:
            for reduction in REDUCTIONS[model]:
                which = [
                    (tool, place)
                    for tool in ("torch-pruning", "surgeon")
                    for place in range(len(METHODS[tool]))
                ]
                scores = [self.score(model, reduction, *one) for one in which]
                if all(score == "-" for score in scores):
                    continue
                macs = [
                    self.values(model, reduction, *one, what="macs")
                    for one in (("torch-pruning", 0), ("surgeon", 0))
                ]
                left = [
                    f"{statistics.mean(some) / self.base(model, 'macs'):.1%}" if some else "-"
                    for some in macs
                ]
                base = self.base(model)
                said = f"{base:.2%}" if TASKS[model].sign > 0 else f"{base:.3f}"
                hows = [self.values(model, reduction, "torch-pruning", place, what="how") for place in (0, 1)]
                chosen = "; ".join(" / ".join(dict.fromkeys(some)) for some in hows if some)
                yield [
                    f"{model}, {TASKS[model].metric}",
                    f"{reduction:g}x",
                    said,
                    *scores,
                    *left,
                    chosen or "-",
                ]

    def trained_rows(self) -> Iterator[list[str]]:
        ends = tuple(f" of {recipe}" for recipe in self.recipes)
        epochs = sorted({int(key.split(" of ")[0].split()[-1]) for key in self.cells if key.endswith(ends)})
        for model in MODELS:
            for reduction, count in itertools.product(REDUCTIONS[model], epochs):
                for recipe, said in self.recipes.items():
                    which = [
                        (reduction, tool, place) for tool in ("torch-pruning", "surgeon") for place in (0, 1)
                    ]
                    scores = [self.score(model, *one, count, recipe) for one in [(1.0, "base", 1), *which]]
                    if any(score != "-" for score in scores[1:]):
                        yield [
                            f"{model}, top-1",
                            f"{reduction:g}x",
                            str(count),
                            said,
                            f"{self.base(model):.2%}",
                            *scores,
                        ]

    def starts_apart(self, epochs: int, recipe: str) -> list[float]:
        """How far training ends from the model as cut and from the recovered one, of each network, reduction
        and seed.
        """
        found = []
        for model in MODELS:
            for reduction, seed in itertools.product(REDUCTIONS[model], self.seeds):
                jobs = [Job(model, reduction, seed, "surgeon", epochs, recipe, place) for place in (0, 1)]
                keys = [job.keys[METHODS["surgeon"][job.start]] for job in jobs]
                if all(key in self.cells for key in keys):
                    found.append(abs(self.cells[keys[0]]["value"] - self.cells[keys[1]]["value"]))
        return found


HEADER = ["network, metric", "fewer MACs", "base", *METHODS["torch-pruning"], *METHODS["surgeon"]]
HEADER += ["MACs left, torch-pruning", "MACs left, surgeon", "torch-pruning's best, as cut; + BN"]
TRAINED = [
    "network, metric",
    "fewer MACs",
    "epochs",
    "learns from",
    "base",
    "base, trained on",
    *METHODS["torch-pruning"][:2],
    *METHODS["surgeon"][:2],
]


def write(cells: Cells, recipes: Mapping[str, str], training: str) -> None:
    """benchmarks/results/recover.md.

    Args:
        recipes: of the fine-tuning whose cells are shown: key -> what it is called. training: what to know
            about it.
    """
    tables = Tables(cells, recipes)
    rest = {name: task for name, task in TASKS.items() if name not in MODELS}
    parts = [
        ("Before fine-tuning: convolutions and batch norm", HEADER, list(tables.rows(MODELS))),
        ("Fine-tuned", TRAINED, list(tables.trained_rows())),
        ("Before fine-tuning: LayerNorm and attention", HEADER, list(tables.rows(rest))),
    ]
    apart = [
        difference
        for recipe in recipes
        for epochs in (1, 3)
        for difference in tables.starts_apart(epochs, recipe)
    ]
    starts = (
        f"Fine-tuned from surgeon's model as cut and from the recovered one, of the same seed ({len(apart)} pairs): at most "
        f"{max(apart, default=0):.2%} apart, {statistics.median(apart or [0]):.2%} in the median."
    )
    text = "\n\n".join(f"## {title}\n\n{markdown(header, rows)}" for title, header, rows in parts if rows)
    write_result(
        "recover",
        "Accuracy kept without training, and won back with little",
        text,
        [*NOTES, starts, training] if parts[1][2] else NOTES,
    )


NOTES = [
    (
        "Mean over seeds ± standard deviation (number of seeds); a dash is a cell that was not run, or has no batch norm to "
        "re-estimate. A seed draws the calibration samples; test data was looked at only when a cell was done."
    ),
    (
        f"ResNets: adapted weights, {SAMPLES:,} training images to calibrate by, the 10,000 test images (lossy JPEG, quality "
        f"about 75). vit: trained here, the same images. text: trained here on Python's documentation, {TEXTS} texts of {LENGTH} "
        "bytes to calibrate by, every tenth module to test; lower is better. sentences: all-MiniLM-L6-v2 as published, "
        f"{TEXTS} texts of {TOKENS} tokens to calibrate by; how often a docstring's summary is nearest to its own second "
        f"paragraph among those of {AMONG} docstrings; half of the modules are to test."
    ),
    (
        "surgeon: plan(macs=1/x, criterion='kfac', scope='knapsack', round_to=1), then recover; no labels. distilled: then "
        "gradient steps on the same samples, about 25 to a step, 10 epochs, towards the base's outputs and residual stream, "
        "without labels: recover(steps=['distill']); the same for torch-pruning's ResNets, with the plan of what it left."
    ),
    (
        "torch-pruning: L1, L2, BN scale and Taylor (with the labels of the calibration samples), uniform and global, with the "
        "residual stream and without, the ratio of each searched until its MACs are at most the target; the best on "
        f"{HELD_OUT:,} other training samples ({TEXTS} texts) is shown, chosen anew for each column and seed."
    ),
    (
        "torch-pruning takes the zero-padding in the ResNets' shortcuts for an element-wise op: channel j of one stage leaves "
        "with channel j of the next, though it is added to another. What it cuts so runs, but adds channels to wrong ones, so "
        "there it cuts inner channels."
    ),
    (
        "Fine-tuned on blocks for one epoch, or at 2.1x for three: surgeon's models start from recoveries in which all rows of a "
        "layer weighed alike, made before those in the tables above and below; the others start from these."
    ),
    "MACs: of products and convolutions, counted by torch's FlopCounterMode for both tools.",
]
