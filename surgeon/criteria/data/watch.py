"""Watch: a mode that holds a run on other data against the recorded one, op by op, and shows the operands of
chosen ops.

The batch may have any size. What it may not do is take another path through the model's code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from surgeon.capture.aligned_run import AlignedRun, alike, same
from surgeon.errors import InputError
from surgeon.graph.arguments import Arguments
from surgeon.graph.graph import Call, Graph
from surgeon.ops.table import Trait, info, product

Later = Callable[[], None]  # called when the next op runs: autograd knows the result by then
See = Callable[[Mapping[str, Any], Any], Later | None]  # (arguments by name, result) of an op


class Watch(AlignedRun):
    """Calls each of `see[node]` with (arguments, out), the real tensors of each op in `see`; `label` names the
    batch in messages.
    """

    def __init__(
        self, model: nn.Module, graph: Graph, see: Mapping[fx.Node, Sequence[See]], label: str
    ) -> None:
        super().__init__(model, graph)
        self.see, self.label = see, label
        self.pending: list[Later] = []

    def op(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """Run one op of the live run and hand its operands and result to those that observe its recorded node."""
        call = self._match(func)
        self._catch_up()
        out = func(*args, **kwargs) if out is None else out
        self._show(call, Arguments(func, args, kwargs), out)
        return out

    def _show(self, call: Call, args: Mapping[str, Any], out: Any) -> None:
        for see in self.see.get(call.node, ()):
            later = see(args, out)
            if later is not None:
                self.pending.append(later)
        self.at += 1

    def _catch_up(self) -> None:
        for later in self.pending:
            later()
        self.pending.clear()

    @property
    def attention_is_next(self) -> bool:
        """Whether the next product of the recorded run is an attention in one op."""
        traits = (info(call.node).traits for call in self.calls[self.at :])
        return next((Trait.ATTENTION in found for found in traits if Trait.SCORES in found), False)

    def attended(self, operands: Sequence[Tensor], out: Any) -> None:
        """Pass by the attention that was recorded as one op.

        Args:
            operands: queries, keys and values.
        """
        while Trait.ATTENTION not in info(self.calls[self.at].node).traits:
            self.at += 1
        declared = product(self.calls[self.at].node)
        assert declared is not None
        args = dict(zip((operand.name for operand in declared.operands), operands, strict=True))
        self._catch_up()
        self._show(self.calls[self.at], args, (out,))

    def _match(self, func: Any) -> Call:
        if self.at < len(self.calls):
            call = self.calls[self.at]
            if same(call, func):
                return call
        raise self.strayed(f"it ran {alike(func)} here")

    def finish(self) -> None:
        """Raise if the run was shorter than the recorded one."""
        self._catch_up()
        if self.at < len(self.calls):
            raise self.strayed("it ended here")

    def strayed(self, why: str) -> InputError:
        """The error of a batch whose run does not follow the recorded one."""
        return InputError(
            f"{self.label} takes another path through the model's code than the example inputs",
            where=self.place(),
            why=why,
            fix="pass batches of which the code does the same as with the example inputs (perhaps of their batch size), or a "
            "criterion that does not look at activations, such as 'taylor' or 'l1'",
        )


class OneOp(TorchFunctionMode):
    """Attention whose mask takes a gradient has no fused kernel and becomes many ops: the watch is told of
    the one it was.
    """

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        learnt = isinstance(mask, Tensor) and mask.requires_grad
        if func is not F.scaled_dot_product_attention or not learnt or not self.watch.attention_is_next:
            return func(*args, **kwargs)
        with _disable_current_modes():
            out = func(*args, **kwargs)
            named = [kwargs[name] for name in ("query", "key", "value") if name in kwargs]
            self.watch.attended([*args[:3], *named], out)
        return out
