"""Processes: one, or several that `accelerate launch` or `torchrun` started; through Hugging Face
accelerate.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from surgeon.errors import InputError, MissingExtraError
from surgeon.training.batches import own_share

if dist.is_available():
    # Its functions have the process group of the moment as a default argument: imported later
    # (DistributedDataParallel does it), they keep the group, and its threads, beyond `destroy_process_group`
    import torch.distributed.nn


class Processes:
    """Which process this is, on which device, and what several of them do together.

    Raises:
        MissingExtraError: accelerate is not installed.
        InputError: accelerate was set up for another number of processes.
    """

    def __init__(self) -> None:
        try:
            import accelerate
        except ImportError as error:
            raise MissingExtraError(
                "finetune needs accelerate", why=str(error), fix='pip install "surgeon-torch[train]"'
            ) from error
        self._accelerate = accelerate
        # accelerate takes several processes without a GPU for single ones, unless it is told that they are
        # meant to be on CPUs
        on_cpu = (
            accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        )
        set_up = dist.is_available() and dist.is_initialized()
        state = accelerate.PartialState(cpu=on_cpu)
        if not set_up and state.num_processes > 1:
            atexit.register(_leave)
        self.count: int = state.num_processes
        if self.count != (started := int(os.environ.get("WORLD_SIZE", "1"))):
            raise InputError(
                f"{started} processes were started, but accelerate knows of {self.count}",
                why="its state was set up before, for something else",
                fix="let finetune set it up, or call accelerate.PartialState(cpu=True) first where there are no GPUs",
            )
        self.rank: int = state.process_index
        self.is_main: bool = state.is_main_process
        self.device: torch.device = state.device

    @property
    def precision(self) -> str:
        """What `accelerate launch --mixed_precision` asked for."""
        return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model, with gradients that are averaged over processes."""
        if self.count == 1:
            return model
        places: Any = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=places)

    def sharded(self, batches: Iterable[Any]) -> Iterable[Any]:
        """This process's share of an epoch: what accelerate makes of a loader, every n-th batch of anything
        else.
        """
        if self.count == 1:
            return batches
        if not isinstance(batches, DataLoader):
            return _Share(batches, self.rank, self.count)
        shared: Iterable[Any] = self._accelerate.data_loader.prepare_data_loader(
            batches, num_processes=self.count, process_index=self.rank, put_on_device=False
        )
        return shared

    def total(self, numbers: list[float]) -> list[float]:
        """Sums over all processes."""
        if self.count == 1:
            return numbers
        found = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        summed: list[float] = self._accelerate.utils.reduce(found, "sum").tolist()
        return summed

    def of_main(self, number: float) -> float:
        """The main process's number."""
        return self.total([number if self.is_main else 0.0])[0]

    def agree(self, model: nn.Module) -> None:
        """Give all the main process's values: statistics of batch norms are of each one's own batches."""
        if self.count > 1:
            for tensor in model.state_dict().values():
                self._accelerate.utils.broadcast(tensor)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self._accelerate.PartialState().wait_for_everyone()


def _leave() -> None:
    """End the process group that was set up here: if Python shuts down first, a thread that drops its last
    tensor aborts it.

    Not after an error: the others then wait for this process, and it would wait for them.
    """
    if dist.is_initialized() and not hasattr(sys, "last_type"):
        dist.destroy_process_group()


class _Share:
    """Every n-th batch, again and again."""

    def __init__(self, batches: Iterable[Any], rank: int, processes: int) -> None:
        self._batches, self._rank, self._processes = batches, rank, processes

    def __iter__(self) -> Any:
        return own_share(self._batches, self._rank, self._processes)
