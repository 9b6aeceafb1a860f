"""capture(model, example inputs) -> Graph: run the model once and record every ATen op of that run.

The run happens in eval mode without gradients under a dispatch mode, on the caller's own tensors, so whatever
runs can be recorded: Python control flow, dict outputs, custom output classes. The recorded graph is always
pure: an in-place op is recorded as its functional form, and a write through a view becomes a write to the
base (`slice_scatter` and kin) from which the other views are read again. The model leaves as it came:
training flags, RNG state, gradients, buffers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from surgeon.capture.hollow.mode import NeedsValuesError, hollow
from surgeon.capture.inputs import find_inputs, input_name, normalize
from surgeon.capture.meta_run import real_indices
from surgeon.capture.model_state import copies, drawn_since, python_draws, quiet_run
from surgeon.capture.paths.own_state import OwnState
from surgeon.capture.paths.training_reads import TrainingReads
from surgeon.capture.recording.recorder import Recorder
from surgeon.capture.sizes.dependencies import SizeMode
from surgeon.capture.sizes.tracing import looking_inside_functional
from surgeon.errors import CaptureError, SurgeonError
from surgeon.graph.graph import Decision, Graph
from surgeon.graph.messages import raised
from surgeon.graph.module_tree import modules_of, named_modules
from surgeon.graph.tensors import tensor_leaves


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    training: bool = False,
    answers: Mapping[str, bool] | None = None,
    outputs: Sequence[str] | None = None,
    real: bool = False,
) -> Graph:
    """Run `model` once and record it.

    Args:
        model: any module that runs; it is put into eval mode for the run and back.
        example_inputs: a tensor, a tuple (positional) or a dict (keywords). None: found from the model (see
            `inputs`).
        training: run in training mode instead, to see branches that only training uses.
        answers: what the model's code is told of global modes (see `global_modes`).
        outputs: names of the outputs that count, all by default; what is below a name counts with it. Others
            are no outputs of the graph: their channels may leave, and nothing compares them.
        real: compute every number. Otherwise those that nothing reads are left out (see `HollowRun`), and the
            graph has no results.

    Raises:
        InputError: no output has one of the names, or the model has lazy layers that did not run.
        CaptureError: the model does not run on the inputs, or does something that cannot be recorded.
    """
    assumed = ""
    if example_inputs is None:
        example_inputs, assumed = find_inputs(model)
    given = real_indices(normalize(example_inputs))
    if not real:
        try:
            return _recorded(model, given, assumed, training, answers, outputs, real=False)
        except (NeedsValuesError, CaptureError):  # it reads numbers, or fails because there are none
            pass
    return _recorded(model, given, assumed, training, answers, outputs, real=True)


def _recorded(
    model: nn.Module,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    assumed: str,
    training: bool,
    answers: Mapping[str, bool] | None,
    outputs: Sequence[str] | None,
    real: bool,
) -> Graph:
    args, kwargs = inputs
    recorder = Recorder(model)
    asked: list[Decision] = []
    with quiet_run(model, 0, training, answers, asked, above=recorder):
        try:
            with recorder.watching():
                given = copies((args, kwargs))
                leaves = list(tensor_leaves(given))
                for path, tensor in leaves:
                    recorder.values.placeholder(path, tensor)
                empty = None if real else hollow(recorder, model, [tensor for _, tensor in leaves])
                modules = modules_of(model)
                mode, state = TrainingReads(modules), OwnState(modules)
                sizes = SizeMode(recorder.values.node_of, recorder.values.assign, recorder.product, empty)
                with (
                    mode,
                    looking_inside_functional(),
                    recorder,
                    sizes,
                ):
                    before = python_draws()
                    output = model(*given[0], **given[1])
                    asked += [
                        Decision("value", f"a number drawn by {name}", "one of many", None)
                        for name in drawn_since(before)
                    ]
            if empty is not None and empty.asked:
                raise NeedsValuesError
            asked += state.note(recorder.values.node_of)
            graph = recorder.finish(output, args, kwargs, assumed, outputs, sizes.reads)
            decisions = (*graph.decisions, *dict.fromkeys(asked))
            paths = {module: path for path, module in named_modules(model)}
            scaling = frozenset(paths[module] for module in mode.scaling() if module in paths)
            told = tuple((answers or {}).items())
            return dataclasses.replace(
                graph,
                training=training,
                answers=told,
                decisions=decisions,
                rates=tuple(sizes.rates),
                by_mode=mode.any,
                scaling=scaling,
                results=graph.results if empty is None else None,
            )
        except SurgeonError:
            raise
        except Exception as error:  # the model's own code: all of it is reported
            shapes = ", ".join(
                f"{input_name(model, path)} {tuple(t.shape)} {t.dtype}"
                for path, t in tensor_leaves((args, kwargs))
            )
            raise CaptureError(
                f"the model does not run on the example inputs: {raised(error)}",
                where=recorder.place(),
                why=f"inputs were: {shapes or 'no tensors'}" + (f" ({assumed})" if assumed else ""),
                fix="pass example_inputs=... with which model(...) runs in eval mode",
            ) from error
