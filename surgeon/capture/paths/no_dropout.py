"""A mode that leaves out dropout while a model runs in training mode: it draws numbers, and ties nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from surgeon.graph.python_calls import DROPOUTS

_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
_ATTENTION = "scaled_dot_product_attention"
_PLACE = 4  # of its dropout rate


class NoDropout(TorchFunctionMode):
    """Runs torch's dropouts, and layers that hold some, as in eval mode; the rest of the model is in training
    mode.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in DROPOUTS:
            given: Tensor = args[0] if args else kwargs["input"]
            return given
        if name in _RECURRENT:  # the one float among its arguments is the rate
            args = tuple(0.0 if isinstance(item, float) else item for item in args)
        elif name == _ATTENTION:
            args = (*args[:_PLACE], *(0.0 for _ in args[_PLACE : _PLACE + 1]), *args[_PLACE + 1 :])
            kwargs = {key: 0.0 if key == "dropout_p" else value for key, value in kwargs.items()}
        elif name in ("rrelu", "rrelu_"):
            args = tuple(False if isinstance(item, bool) else item for item in args)
            kwargs = {key: False if key == "training" else value for key, value in kwargs.items()}
        return func(*args, **kwargs)
