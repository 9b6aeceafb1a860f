"""The table of contents: the stages in order.

capture -> propagate -> solve -> groups -> (criteria, choose) -> plan -> rewrite, mend -> verify
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from inspect import signature as inspect_signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils._pytree
from torch import Tensor, fx, nn

from surgeon import criteria
from surgeon._quiet import uncollected
from surgeon.bands import Link, without_kept_heads
from surgeon.capture import capture
from surgeon.choose import Costs, choose
from surgeon.compare import compare
from surgeon.configs import Blueprint, config_edits, unsaid
from surgeon.cost import Choice, Shapes, nothing
from surgeon.criteria import Criterion
from surgeon.edits import Edit, apply_edit
from surgeon.errors import CaptureError, InputError
from surgeon.explain import Explanation, FrozenShare, explain, frozen_share
from surgeon.graph import Graph, nodes_inside
from surgeon.groups import FrozenGroup, Group, find_frozen, find_groups, find_links, reachable
from surgeon.labels import Track
from surgeon.latency import LatencyTable, Predictor, Stopwatch, search
from surgeon.mend import find_edits
from surgeon.plan import Plan
from surgeon.propagate import Propagation, propagate
from surgeon.request import Budget, PlanOptions, Ratio, Request
from surgeon.rewrite import shrink_module
from surgeon.sensitivity import Sensitivity, sensitivity
from surgeon.solve import Solution, solve
from surgeon.verify import Proof, verify

if TYPE_CHECKING:
    from typing_extensions import Unpack  # part of torch's own requirements


class Surgery:
    """What surgeon knows of a model: printable, and the place to make plans. Made by `inspect`.

    Attributes:
        model: the model, untouched.
        graph: its recorded run.
        groups: units that may leave, by group.
        macs, params: of the model as it is; MACs for the example inputs, batch included.
        remarks: what was assumed, and what the run did not see.
    """

    def __init__(self, model: nn.Module, graph: Graph, *further: Graph, remarks: Sequence[str] = ()) -> None:
        self.remarks = tuple(r for r in (graph.assumed, *remarks) if r)
        self.model, self.graph, self.runs = model, graph, (graph, *further)
        if self.without_values:
            self.remarks += ("the weights have no values (meta device): a plan says how many channels stay, and takes the first",)
        self.propagation: Propagation = propagate(graph, *further)
        self.solution: Solution = solve(self.propagation.ledger)
        groups, self._stuck = find_groups(self.propagation, self.solution)
        links, pinned = find_links(self.propagation, self.solution, groups)
        self.links: list[Link] = links
        pinned = reachable(pinned, links)
        self.groups: list[Group] = [g for g in groups if g.name not in pinned]
        self._pinned = [g for g in groups if g.name in pinned]
        self.shapes = Shapes(graph, self.propagation, self.solution)

    @cached_property
    def frozen(self) -> list[FrozenGroup]:
        """What may not leave, with reasons."""
        reason = "the model's code computes its size from one that is frozen"
        pinned = [FrozenGroup(g.slots, g.width, reason, None) for g in self._pinned]
        return find_frozen(self.propagation, self.solution) + self._stuck + pinned

    @cached_property
    def without_values(self) -> bool:
        """Whether weights are on the meta device: sizes can be planned, but no channel is better than another."""
        return any(self.graph.tensors[name].is_meta for name in self.graph.owned)

    @cached_property
    def blueprint(self) -> Blueprint | None:
        """What the model's config can say of its sizes; None if its class is not built from one."""
        return Blueprint.of(self.model)

    @cached_property
    def macs(self) -> int:
        return self.shapes.macs(nothing(self.solution))

    @cached_property
    def params(self) -> int:
        return self.shapes.params(nothing(self.solution))

    @cached_property
    def size(self) -> int:
        """Bytes of the parameters and stored buffers, tied ones once."""
        return self.shapes.size(nothing(self.solution))

    @cached_property
    def memory(self) -> int:
        """Bytes of the activations that are alive at once, at most, for the example inputs; see `Shapes.memory`."""
        return self.shapes.memory(nothing(self.solution))

    @cached_property
    def frozen_share(self) -> FrozenShare:
        """How many output channels of the model's weights may not leave, its own outputs apart, by reason."""
        return frozen_share(self)

    def explain(self, name: str) -> Explanation:
        """What a layer is tied to and through which ops, what of it is frozen, why, and what would unfreeze it; printable.

        Args:
            name: a module ("layer2.0.conv1"), a tensor ("layer2.0.conv1.weight") or a slot of it ("layer2.0.conv1.weight[0]").

        Raises:
            InputError: there is no such thing in the model.
        """
        return explain(self, name)

    def sensitivity(
        self,
        data: Iterable[Any] | None = None,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        ratios: Sequence[float] = (0.25, 0.5, 0.75),
        n_jobs: int | None = None,
        **options: Any,
    ) -> Sensitivity:
        """How much the outputs (or a loss) change when one group alone loses channels; see `surgeon.sensitivity`."""
        return sensitivity(self, data, loss=loss, ratios=ratios, n_jobs=n_jobs, **options)

    @uncollected()
    def plan(
        self,
        ratio: Ratio | None = None,
        *,
        macs: Budget | None = None,
        params: Budget | None = None,
        size: Budget | None = None,
        memory: Budget | None = None,
        latency: Budget | None = None,
        runtime: str = "onnxruntime",
        threads: int = 1,
        criterion: str | Criterion = "l1",
        data: Iterable[Any] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        scope: str | None = None,
        round_to: int | str = "auto",
        heads: str = "both",
        max_ratio: Ratio = 1.0,
        min_channels: int = 1,
        ignore: Iterable[nn.Module | str] = (),
        ignore_inputs: Iterable[nn.Module | str] = (),
        config_expressible: bool = False,
        seed: int = 0,
    ) -> Plan:
        """Choose what leaves; nothing is changed yet.

        Args:
            ratio: share of the channels of every group to remove, in [0, 1). Params and MACs go roughly with (1 - ratio)^2,
                because a layer loses inputs and outputs: 0.5 leaves about a quarter. Or {name pattern: ratio}, such as
                {"*": 0.5, "layer4": 0.2}: the last pattern that matches a layer counts, layers that none matches stay.
            macs, params: instead of ratio, what may stay: a share of the original (up to 1, or "50%") or a number (above 1, or
                "1.2G"). Several budgets may be given: all hold, each predicted exactly.
            size: bytes of parameters and stored buffers that may stay: a share, or a text such as "3MB".
            memory: bytes of activations alive at once, at most, for the example inputs: a share, or a text such as "20MB".
            latency: of one run on the example inputs, batch included: a share, or a text such as "8ms". Kernels are timed on this
                machine (once: see `latency.LatencyTable`), the candidate is cut and measured in turns with the original, the
                prediction is corrected, and so on until what is measured is within 3 % below the target.
            runtime, threads: what the latency is of: "onnxruntime" (fused and exported, on the CPU) or "torch" (eager).
            criterion: a name of docs/criteria.md ("l1", "l2", "bn_scale", "lamp", "fpgm", "random", ...; with data "taylor",
                "fisher", "obs", "variance", ...), an object of `surgeon.criteria`, or a callable (group, tensors) -> one score
                per unit, low leaves first. Of weights without values (on the meta device) the first channels stay.
            data: batches for criteria that look at data, read once: inputs as the model takes them, in any batch size; with a
                loss, pairs (inputs, targets).
            loss: (output, targets) -> a number, for criteria that need gradients. Without one they use the squared norm of the
                outputs, which needs no labels.
            scope: "uniform" (the same share of every group), "global" (the lowest scores of all groups), "isomorphic" (the
                lowest scores among groups of like structure; Fang et al., Isomorphic Pruning, 2024) or "knapsack" (what is worth
                least for what it costs; needs a budget). By default knapsack for a latency, else uniform.
            round_to: kept widths are multiples of this, where a group has that many channels. "auto" takes the block that kernels
                of the weights' device like (16 on CPUs with AVX-512, 8 on others and on GPUs) and halves it for narrow groups;
                "cpu", "cuda" and "npu" (32) name another target; 1 switches it off.
            heads: what attention may lose: "both" (whole heads or dims within heads, whichever meets the ratio more closely),
                "whole", "dims", or "keep" for nothing.
            max_ratio: the largest share that a group may lose, under every scope and budget; or {name pattern: share}.
            min_channels: how many channels every group keeps at least.
            ignore: modules, or names of modules or tensors, whose outputs stay.
            ignore_inputs: modules, or names of modules, whose inputs stay.
            config_expressible: remove only what the model's config can say (models of transformers), so that
                `save_pretrained` and `from_pretrained` round-trip: sizes that one number says keep the same share, whole heads
                leave, and what no number says stays.
            seed: for criterion "random".

        Raises:
            InputError: an argument is out of range, unknown, or contradicts another.
            BudgetError: nothing may leave, or a budget lies below what must stay, or no candidate reaches the latency.
            PlanError: no config says what is left (with `config_expressible`).
        """
        budgets = {"macs": macs, "params": params, "size": size, "memory": memory, "latency": latency}
        request = Request(
            ratio, **budgets, scope=scope, round_to=round_to, heads=heads, max_ratio=max_ratio, min_channels=min_channels
        )
        which = criteria.criterion("first" if self.without_values and isinstance(criterion, str) else criterion, seed)
        self._check_weights()
        groups, links = self.groups_without(ignore, ignore_inputs), self.links
        if config_expressible:
            request = dataclasses.replace(request, heads="whole" if heads == "both" else heads)
            groups, links = self._expressible(groups, request.heads)
        which = criteria.prepare(
            which, seed=seed, model=self.model, graph=self.graph, propagation=self.propagation, solution=self.solution,
            groups=groups, data=data, loss=loss,
        )  # fmt: skip
        block = request.block(next((self.graph.tensors[name].device.type for name in self.shapes.parameters), "cpu"))

        def chosen(request: Request, costs: Costs | None = None) -> Choice:
            return choose(groups, scores, self.shapes, request, links, block, costs)

        known: dict[str, Track] = {}

        def scores(group: Group) -> Track:
            if group.name not in known:
                known[group.name] = criteria.scores(which, group, self.graph.tensors)
            return known[group.name]

        said = {k: v for k, v in vars(request).items() if v is not None}
        if latency is None:
            choice = chosen(request)
        else:
            choice, said["measured"] = self._timed(request, chosen, runtime, threads, block)
        if isinstance(round_to, str):
            said["block"] = block
        said["criterion"] = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)
        if config_expressible:
            said["config_expressible"] = True
        if self.graph.named:
            said["outputs"] = list(self.graph.named)
        return self._as_plan(choice, said)

    def _timed(
        self, request: Request, chosen: Callable[[Request, Costs], Choice], runtime: str, threads: int, block: int
    ) -> tuple[Choice, dict[str, Any]]:
        """A choice whose measured latency meets the budget."""
        if self.without_values:
            raise InputError("a model on the meta device has no latency", fix="pass macs=..., or load the weights")
        device = next((self.graph.tensors[name].device for name in self.shapes.parameters), torch.device("cpu"))
        table = LatencyTable(runtime, threads, device)
        inputs = self.graph.kwargs or self.graph.args
        with tempfile.TemporaryDirectory() as folder:
            watch = Stopwatch(self.model, inputs, runtime, threads, folder)
            predict = Predictor(self.shapes, table, watch.measure()[0], block)
            limit = request.limit("latency", predict.total)
            fixed = dataclasses.replace(request, latency=f"{limit}ms")  # a share is one of what was measured
            costs: dict[str, Any] = {kind: getattr(self.shapes, kind) for kind in request.budgets if kind != "latency"}
            return search(
                lambda: chosen(fixed, {**costs, "latency": predict}),
                predict,
                lambda choice: watch.measure(self._as_plan(choice, {"quiet": True}).apply(self.model)),
                lambda full: request.limit("latency", full),
            )

    def _expressible(self, groups: list[Group], heads: str) -> tuple[list[Group], list[Link]]:
        """The groups whose sizes the config says, tied where one number says several."""
        if self.blueprint is None:
            raise InputError(
                "config_expressible needs a model whose class builds itself from its config",
                where=type(self.model).__name__,
                why="type(model)(model.config) does not give this architecture",
                fix="leave config_expressible out, and keep the small model with surgeon.save(small, folder)",
            )
        more, without = self.blueprint.restrict(without_kept_heads(groups, heads, self.links), self.graph.aliases)
        links = [*self.links, *more]
        without |= {g.name for g in self.groups} - {g.name for g in groups}
        without = reachable(without, links)
        return [g for g in groups if g.name not in without], links

    def _as_plan(self, choice: Choice, request: dict[str, Any]) -> Plan:
        return Plan(
            kept=self.shapes.kept(choice),
            hash=self.graph.hash,
            macs=self.shapes.macs(choice),
            params=self.shapes.params(choice),
            size=self.shapes.size(choice),
            memory=self.shapes.memory(choice),
            macs_before=self.macs,
            params_before=self.params,
            request=request,
            _finish=lambda plan, model: self._finish(plan, model, choice),
        )

    @uncollected()
    def _finish(self, plan: Plan, model: nn.Module | None, choice: Choice) -> tuple[nn.Module, Plan]:
        """Apply a plan whose edits are not known yet, and find them on the way."""
        small = shrink_module(self.model if model is None else model, plan.kept)
        edits = find_edits(small, self.runs, self.shapes, choice)
        if plan.kept and self.blueprint is not None:
            edits += self._configured(self.blueprint, small, plan, choice)
        object.__setattr__(plan, "edits", edits)  # the one late field of a frozen plan
        return small, plan

    def _configured(self, blueprint: Blueprint, small: nn.Module, plan: Plan, choice: Choice) -> tuple[Edit, ...]:
        """Bring the small model's config in step with its widths, if any config says them."""
        shares = {
            Fraction(len(kept), self.graph.tensors[name].shape[dim])
            for name, dims in plan.kept.items()
            for dim, kept in dims.items()
        }
        found = blueprint.express(small, self.graph, shares)
        if not isinstance(found, str):
            edits = config_edits(blueprint, small, found)
            for edit in edits:
                apply_edit(small, edit)
            if not compare(small, self.runs, self.shapes, choice):
                return edits
            for edit in reversed(edits):
                apply_edit(small, dataclasses.replace(edit, old=edit.new, new=edit.old))
            found = "the small model's code needs other numbers in it"
        if plan.request.get("config_expressible"):
            raise unsaid(found)
        if "quiet" in plan.request:
            return ()
        warnings.warn(
            f"the config of {type(small).__name__} cannot say the new widths ({found}): keep the small model with "
            "surgeon.save(small, folder), or plan with config_expressible=True",
            stacklevel=2,
        )
        return ()

    def _check_weights(self) -> None:
        for name, tensor in self.graph.tensors.items():
            if name not in self.graph.owned or not tensor.is_floating_point() or tensor.is_meta:
                continue
            if bool(torch.isfinite(tensor.detach().sum())):  # one pass; a sum that overflows is looked at again
                continue
            given = isinstance(tensor, nn.Parameter)  # buffers may well hold inf: masks do
            bad = ~torch.isfinite(tensor.detach()) if given else torch.isnan(tensor.detach())
            if bool(bad.any()) and not name.startswith("_"):
                raise InputError(
                    "the model's weights hold NaN or inf",
                    where=name,
                    why="no score and no proof can be computed from them",
                    fix="load sound weights, or repair them (see torch.nan_to_num)",
                )

    def groups_without(self, ignore: Iterable[nn.Module | str], ignore_inputs: Iterable[nn.Module | str] = ()) -> list[Group]:
        """The groups less the units that the outputs (or inputs) of ignored modules hold."""
        held = np.zeros(len(self.solution.root), dtype=bool)
        for items, tracks_of in ((ignore, self._outputs_of), (ignore_inputs, self._inputs_of)):
            for item in (items,) if isinstance(items, str | nn.Module) else items:
                for track in tracks_of(item):
                    for atoms in self.solution.atoms(track):
                        held[atoms[atoms >= 0]] = True
        if not held.any():
            return self.groups
        linked = {name for link in self.links for name in link}
        whole = {g.name for g in self.groups if held[g.lanes].any() and (len(g.lanes) > 1 or g.name in linked)}
        whole = reachable(whole, self.links)
        kept = []
        for group in self.groups:
            free = ~held[group.lanes].any(axis=0)
            if group.name in whole or not free.any():
                continue
            kept.append(group if free.all() else _restricted(group, free))
        return kept

    def _outputs_of(self, item: nn.Module | str) -> list[Track]:
        path = self._path(item, "ignore")
        if path in self.graph.tensors:
            return [ids for (name, _), ids in self.propagation.slots.items() if name == path]
        nodes = self._nodes_of(path, "ignore")
        given = {n for n in nodes if any(user.op == "output" or user not in nodes for user in n.users)}
        return self._tracks(given)

    def _inputs_of(self, item: nn.Module | str) -> list[Track]:
        nodes = self._nodes_of(self._path(item, "ignore_inputs"), "ignore_inputs")
        read = {used for node in nodes for used in node.all_input_nodes}
        return self._tracks(node for node in read if node not in nodes and node.op != "get_attr")

    def _path(self, item: nn.Module | str, argument: str) -> str:
        if isinstance(item, str):
            return item
        path: str | None = next((p for p, m in self.model.named_modules() if m is item), None)
        if path is None:
            raise InputError(f"{argument} holds a {type(item).__name__} that is not part of the model")
        return path

    def _nodes_of(self, path: str, argument: str) -> set[fx.Node]:
        found = set(nodes_inside(self.graph, path))
        if not found:
            raise InputError(
                f"{argument} names {path!r}, which is no module that ran{' and no tensor' if argument == 'ignore' else ''}",
                fix="use names as in model.named_modules() or model.named_parameters()",
            )
        return found

    def _tracks(self, nodes: Iterable[fx.Node]) -> list[Track]:
        found = []
        for node in nodes:
            axes = self.propagation.axes[node]
            found += [track for part in (axes if isinstance(axes, tuple) else (axes,)) for track in part.values()]
        return found

    def __str__(self) -> str:
        from surgeon.report import describe

        return describe(self)


def _restricted(group: Group, free: Track) -> Group:
    """The group with only some of its units (single lane)."""
    number = np.full(group.units, -1, dtype=np.int64)
    number[free] = np.arange(int(free.sum()))
    members = []
    for member in group.members:
        stays = number[member.unit] >= 0
        if stays.any():
            members.append(dataclasses.replace(member, index=member.index[stays], unit=number[member.unit[stays]]))
    return dataclasses.replace(group, lanes=group.lanes[:, free], strata=group.strata[:, free], members=tuple(members))


@uncollected()
def inspect(model: nn.Module, example_inputs: Any = None, *, outputs: Sequence[str] | None = None) -> Surgery:
    """Run the model once and find out what can leave.

    Args:
        model: any module; it comes back as it was, its training mode included.
        example_inputs: a tensor, a tuple (positional) or a dict (keywords). Left out: found from the model; what was assumed
            is in `surgery.graph.assumed` and in its print-out.
        outputs: names of the outputs that must stay as they are, such as ["logits"]; all by default. Other outputs (hidden states
            that nobody reads) may lose channels, and the proof does not compare them.

    Raises:
        InputError: no output has one of the names.
        CaptureError: the model does not run, or does something that cannot be recorded.
    """
    graph = capture(model, example_inputs, outputs=outputs)
    further, remarks = _training_run(model, graph)
    return Surgery(model, graph, *further, remarks=remarks)


def _training_run(model: nn.Module, graph: Graph) -> tuple[list[Graph], list[str]]:
    """A run in training mode, for models of which some layers (auxiliary classifiers, say) only run there.

    Those layers read channels that may leave, so they must be cut along. If the training run fails on the inputs (it may need
    targets) the layers that it would have shown keep their size; the print-out of the surgery lists them as unused.
    """
    seen = {str(node.target) for node in graph.fx.nodes if node.op == "get_attr"}
    unused = [name for name, _ in model.named_parameters() if name not in seen]
    if not unused or any(tensor.is_meta for tensor in graph.tensors.values()):
        return [], []
    said = f"{len(unused)} parameters are not used by this run and keep their size, {unused[0]} for one"
    try:
        run = capture(model, _doubled((graph.args, graph.kwargs)), training=True)
    except CaptureError as error:
        return [], [f"{said}; in training mode the model does not run on these inputs ({error.what})"]
    if any(str(n.target) in unused for n in run.fx.nodes if n.op == "get_attr"):
        return [run], []
    return [], [said]


def _doubled(inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Any:
    """The inputs with twice the batch: batch norms in training mode refuse a batch of one."""
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, inputs)
    return kwargs if kwargs else args


def shrink(
    model: nn.Module,
    ratio: Ratio | None = None,
    *,
    example_inputs: Any = None,
    outputs: Sequence[str] | None = None,
    verify: bool = True,
    **options: Unpack[PlanOptions],
) -> nn.Module:
    """A smaller, proven copy of a model, of the same class; the original is untouched.

    `surgeon.shrink(model, 0.5)` removes half of the channels of every group.

    Args:
        ratio: see `Surgery.plan`.
        example_inputs, outputs: see `inspect`.
        verify: prove the surgery in float64 (about two forward passes). On unless switched off.
        options: what else `Surgery.plan` takes: budgets (macs=0.5, params="3M"), criterion, scope, round_to, ignore, ...

    Raises:
        InputError, CaptureError, BudgetError, MendError: see `inspect`, `Surgery.plan` and `Plan.apply`.
        ProofError: the small model does not compute what the plan says; this would be a bug in surgeon.
    """
    check_options(ratio, options)  # refuse bad arguments before the model runs
    surgery = inspect(model, example_inputs, outputs=outputs)
    if surgery.graph.assumed:
        warnings.warn(surgery.graph.assumed, stacklevel=2)
    plan = surgery.plan(ratio, **options)
    small = plan.apply(model)
    if verify:
        prove(model, small, plan, surgery.graph)
    return small


def check_options(ratio: Ratio | None, options: Mapping[str, Any]) -> None:
    """Refuse what `Surgery.plan` would refuse without looking at a model.

    Raises:
        InputError: see there; TypeError: it has no such argument.
    """
    known = inspect_signature(Surgery.plan).parameters
    for name in options:
        if name not in known:
            raise TypeError(f"surgeon has no option {name!r}; Surgery.plan takes {', '.join(list(known)[1:])}")
    fields = {field.name for field in dataclasses.fields(Request)}
    Request(ratio, **{name: value for name, value in options.items() if name in fields})
    criteria.criterion(options.get("criterion", "l1"), options.get("seed", 0))


def prove(model: nn.Module, small: nn.Module, plan: Plan, graph: Graph) -> Proof:
    """`verify` with the graph at hand."""
    return verify(model, small, plan, graph=graph)


__all__ = ["Surgery", "inspect", "prove", "shrink"]
