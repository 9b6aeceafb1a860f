"""The options of a plan: the one list of them, with their types, defaults and meaning.

`Surgery.plan`, `shrink`, `iterate`, `Surgery.sensitivity` and the command line take these. This module imports nothing
heavy, so that the command line can print its help at once.
"""

import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, TypeVar

from surgeon.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from surgeon.criteria.combine import Criterion

Ratio = float | Mapping[str, float]
Budget = float | str
BUDGETS = ("macs", "params", "size", "memory", "latency")
RUNTIMES = ("onnxruntime", "torch")
SCOPES = ("uniform", "global", "isomorphic", "knapsack")
HEADS = {  # what may not leave
    "both": (),
    "whole": ("head dims",),
    "dims": ("heads",),
    "keep": ("heads", "head dims"),
}
TARGETS = {
    "cpu": 0,
    "cuda": 8,
    "npu": 32,
}  # the block that kernels like; of CPUs it hangs on the instruction set


@dataclasses.dataclass(frozen=True)
class Option:
    """What an option is if it is left out, and what it means; the first sentence stands in the shell's help."""

    default: Any
    help: str


# fmt: off
class PlanOptions(TypedDict, total=False):
    """The options of a plan; see `Option` for what each holds."""

    macs: Annotated[Budget | None, Option(None, """
        MACs that may stay, instead of a ratio: a share of the original (up to 1, or "50%") or a number (above 1, or
        "1.2G"). Several budgets may be given: all hold, each predicted exactly.""")]
    params: Annotated[Budget | None, Option(None, """
        Parameters that may stay: as macs.""")]
    size: Annotated[Budget | None, Option(None, """
        Bytes of parameters and stored buffers that may stay: a share, or a text such as "3MB" (10^6) or "3MiB" (2^20).""")]
    memory: Annotated[Budget | None, Option(None, """
        Bytes of activations alive at once, at most: a share, or a text such as "20MB". For the example inputs.""")]
    latency: Annotated[Budget | None, Option(None, """
        Milliseconds of one run on the example inputs, batch included: a share, or a text such as "8ms". Kernels are
        timed on this machine (once: see `latency.LatencyTable`), the candidate is cut and measured in turns with the
        original, the prediction is corrected, and so on until what is measured is within 3 % below the target.""")]
    runtime: Annotated[str, Option("onnxruntime", """
        What the latency is of: "onnxruntime" (fused and exported, on the CPU) or "torch" (eager).""")]
    threads: Annotated[int, Option(1, """
        Threads of the runtime that the latency is of.""")]
    criterion: Annotated["str | Criterion", Option("l1", """
        What ranks channels: a name of docs/criteria.md (l1, l2, bn_scale, lamp, fpgm, random, ...; with data taylor,
        fisher, obs, variance, kfac, ...). Or an object of `surgeon.criteria`, or a callable (group, tensors) -> one
        score per unit, low leaves first. Of weights without values (on the meta device) the first channels stay.""")]
    data: Annotated[Iterable[Any] | None, Option(None, """
        Batches for criteria that look at data, read once: inputs as the model takes them, in any batch size; with a
        loss, pairs (inputs, targets).""")]
    loss: Annotated[Callable[[Any, Any], Any] | None, Option(None, """
        (output, targets) -> a number, for criteria that need gradients. Without one they use the squared norm of the
        outputs, which needs no labels.""")]
    scope: Annotated[str | None, Option(None, """
        Where channels leave: uniform, global, isomorphic or knapsack [default: knapsack for budgets, uniform for a
        ratio]. "uniform" takes the same share of every group, "global" the lowest scores of all groups, "isomorphic"
        the lowest scores among groups of like structure (Fang et al., Isomorphic Pruning, 2024), "knapsack" what is
        worth least for what it costs (it needs a budget).""")]
    round_to: Annotated[int | str, Option("auto", """
        Kept widths are multiples of this: a number, auto, cpu, cuda or npu. "auto" takes the block that kernels of the
        weights' device like (16 on CPUs with AVX-512, 8 on others and on GPUs); "cpu", "cuda" and "npu" (32) name
        another target. A named block is halved for groups that do not hold two, and where a group would otherwise
        stay further than 10 points from the ratio. 1 switches it off.""")]
    heads: Annotated[str, Option("both", """
        What attention may lose: both, whole, dims or keep. "both" takes whole heads or dims within heads, whichever
        meets the ratio more closely; "keep" takes neither.""")]
    max_ratio: Annotated[Ratio, Option(1.0, """
        The largest share that a group may lose, under every scope and budget; or {name pattern: share}.""")]
    min_channels: Annotated[int, Option(1, """
        How many channels every group keeps at least.""")]
    ignore: Annotated["Iterable[nn.Module | str]", Option((), """
        Modules, or names of modules or tensors, whose outputs stay.""")]
    ignore_inputs: Annotated["Iterable[nn.Module | str]", Option((), """
        Modules, or names of modules, whose inputs stay.""")]
    config_expressible: Annotated[bool, Option(False, """
        Remove only what the model's config can say (models of transformers), so that `save_pretrained` and
        `from_pretrained` round-trip. Sizes that one number says keep the same share, whole heads leave, and what no
        number says stays.""")]
    seed: Annotated[int, Option(0, """
        Of criterion "random".""")]
# fmt: on

OPTIONS: Mapping[str, Option] = {
    name: hint.__metadata__[0] for name, hint in PlanOptions.__annotations__.items()
}

_MEANT = {
    **dict.fromkeys(("flops", "ops", "target_macs", "target_flops", "max_flops"), "macs"),
    **dict.fromkeys(("pruning_ratio", "sparsity", "amount", "prune_ratio", "ch_sparsity", "ratios"), "ratio"),
    **dict.fromkeys(("pruning_ratio_dict", "ratio_dict"), "ratio={name pattern: ratio}"),
    **dict.fromkeys(("ignored_layers", "exclude", "skip"), "ignore"),
    **dict.fromkeys(("global_pruning", "isomorphic"), "scope"),
    **dict.fromkeys(("importance", "method"), "criterion"),
    **dict.fromkeys(("max_pruning_ratio", "max_sparsity"), "max_ratio"),
    **dict.fromkeys(("parameters", "target_params"), "params"),
    **dict.fromkeys(("inputs", "dummy_input", "example_input", "input"), "example_inputs"),
}
"""Names of the same things elsewhere."""


def check_names(given: Iterable[str], more: Iterable[str] = ()) -> None:
    """Refuse options that do not exist, and say which were meant.

    Args:
        more: other names that the called function takes.

    Raises:
        InputError: a name is unknown.
    """
    known = ["ratio", *OPTIONS, *more]
    for name in given:
        if name in known:
            continue
        meant = _MEANT.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), "")
        raise InputError(
            f"there is no option {name!r}" + (f": did you mean {meant}?" if meant else ""),
            fix=f"use one of {', '.join(known)}",
        )


_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes_options(function: _Function) -> _Function:
    """Give a function that takes `**options: Unpack[PlanOptions]` their names, defaults and meanings, for `help`."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=PlanOptions.__annotations__[name].__origin__,
        )
        for name, option in OPTIONS.items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]  # for help() alone
    meanings = "\n".join(_paragraph(name, option) for name, option in OPTIONS.items())
    function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{meanings}\n"
    return function


def _paragraph(name: str, option: Option) -> str:
    text = " ".join(option.help.split())
    return textwrap.fill(f"{name}: {text}", 110, initial_indent="    ", subsequent_indent="        ")
