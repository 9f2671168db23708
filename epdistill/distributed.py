"""Several processes that learn or measure as one: plain `torch.distributed`, no wrapper.

`torchrun --nproc-per-node N -m epdistill ...` starts N processes; `launch.join` makes
them a `Team`. Each takes its rows (`Shard`) of the same global batch, and what is averaged
over the batch is averaged over the team. EP assigns gradients by hand, so the hooks
of DistributedDataParallel never see them: `average_gradients` is called between the
gradient and the optimiser's step, by every task alike. In a single process
everything here does nothing and costs nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from epdistill.errors import LostTouchError, RecipeError

CONTINUE = "the last checkpoint is kept: start the same command with --resume to continue"
Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Rows `start` to `stop` of a global batch of `count`."""

    start: int
    stop: int
    count: int

    @property
    def rows(self) -> slice:
        """What to index a global batch with."""
        return slice(self.start, self.stop)

    @property
    def size(self) -> int:
        """The number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Team:
    """The processes of one job, seen from one of them.

    All methods but `shard` are collective: every process must call them, in the same order.

    Attributes:
        rank: From 0; rank 0 alone writes files and speaks.
        size: How many processes there are.
        store: Where they leave notes; None in a single process.
    """

    rank: int = 0
    size: int = 1
    store: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def shard(self, count: int) -> Shard:
        """This process's contiguous rows of a batch; sizes differ by one at most.

        Raises:
            RecipeError: A process would get none.
        """
        if count < self.size:
            raise RecipeError(
                f"a batch of {count} for {self.size} processes; expected at least one image for "
                "each: start fewer processes, or raise batch_size"
            )
        edges = [count * rank // self.size for rank in (self.rank, self.rank + 1)]
        return Shard(edges[0], edges[1], count)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the team, shaped like `tensor`, detached; the same on every rank."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """The element-wise maximum over the team, likewise."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor.detach()
        found = tensor.detach().clone(memory_format=torch.contiguous_format)
        with in_touch(self):
            dist.all_reduce(found, operation)
        return found

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.max(torch.tensor(int(flag)))) if self.size > 1 else flag

    def mean(self, values: Mapping[str, float], weight: float) -> dict[str, float]:
        """Means over the team, each process counting `weight` times; 0 where nobody counts."""
        if self.size == 1:
            return dict(values)
        numbers = [*(weight * value for value in values.values()), weight]
        *sums, total = self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
        return {name: one / (total or 1.0) for name, one in zip(values, sums, strict=True)}

    def gather(self, rows: Tensor, shard: Shard) -> Tensor:
        """The global batch (count, ...) of which every process has its shard (n, ...)."""
        if self.size == 1:
            return rows
        whole = rows.new_zeros((shard.count, *rows.shape[1:]))
        whole[shard.rows] = rows
        return self.sum(whole)  # the others add zeros: not a bit is lost

    def average_gradients(self, parameters: Iterable[nn.Parameter], weight: float) -> None:
        """Replace every `.grad`, the mean over this process's images, by that over the team's.

        A parameter that got a gradient in one process gets it in all.

        Args:
            parameters: In the same order in every process.
            weight: How many images this process's means are over; 0 does not count.
        """
        if self.size == 1:
            return
        ours = list(parameters)
        for dtype in dict.fromkeys(one.dtype for one in ours):
            group = [one for one in ours if one.dtype == dtype]
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            has = [float(p.grad is not None) for p in group]
            tail = found[0].new_tensor([*has, weight])
            flat = torch.cat([*(weight * gradient.reshape(-1) for gradient in found), tail])
            summed = self.sum(flat)
            parts = torch.split(summed, [*(p.numel() for p in group), len(group), 1])
            total = parts[-1].clamp_min(torch.finfo(dtype).tiny)
            for parameter, part, someone in zip(group, parts, parts[-2].tolist(), strict=False):
                if someone:
                    parameter.grad = (part / total).view_as(parameter)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process rank 0's running statistics of plain BatchNorm layers.

        Done after every step, so that no checkpoint depends on who writes it or when.
        """
        buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and not isinstance(module, nn.SyncBatchNorm)
            for buffer in module.buffers()
            if buffer.is_floating_point()  # the count of batches is the same everywhere
        ]
        if self.size == 1 or not buffers:
            return
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        with in_touch(self):
            dist.broadcast(flat, 0)
        for buffer, part in zip(
            buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True
        ):
            buffer.copy_(part.view_as(buffer))

    def tell(self, content: bytes) -> bytes:
        """Rank 0's bytes; what the others pass is ignored."""
        if self.size == 1:
            return content
        length = torch.tensor(len(content))
        with in_touch(self):
            dist.broadcast(length, 0)
            data = torch.zeros(int(length), dtype=torch.uint8)
            if self.first and content:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            dist.broadcast(data, 0)
        return data.numpy().tobytes()

    def share_out(self, items: Sequence[Item], work: Callable[[Item], Any]) -> list[Any]:
        """`work` of every item, each done by one process; the results, JSON values, in order."""
        if self.size == 1:
            return [work(item) for item in items]
        mine = json.dumps([work(item) for item in items[self.rank :: self.size]]).encode()
        sizes = [torch.tensor(0) for _ in range(self.size)]
        with in_touch(self):
            dist.all_gather(sizes, torch.tensor(len(mine)))
            longest = max(int(size) for size in sizes)
            padded = torch.frombuffer(bytearray(mine.ljust(longest)), dtype=torch.uint8)
            texts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(texts, padded)
        parts = [json.loads(text.numpy().tobytes()) for text in texts]
        return [parts[i % self.size][i // self.size] for i in range(len(items))]

    def first_to_fail(self) -> bool:
        """Whether no other process has said yet why the job ends; not collective."""
        if self.store is None:
            return True
        try:
            return bool(self.store.add("failed", 1) == 1)
        except (RuntimeError, OSError):  # whoever kept the store is gone, and may have been killed
            return True

    def linger(self, seconds: float) -> None:
        """Rank 0, before it ends: wait until all have asked who is the first to fail."""
        end = time.monotonic() + seconds
        while self.first and time.monotonic() < end and self.store.add("failed", 0) < self.size:
            time.sleep(0.05)


ALONE = Team()


def synchronised(model: nn.Module, team: Team, device: torch.device) -> nn.Module:
    """The model, on GPUs with BatchNorm layers that measure the team's whole batch.

    Parameters stay the same objects, names in the state stay the same. On CPUs torch has no
    such layer: each process normalises by its own rows, and rank 0's running statistics
    are everybody's (`Team.share_buffers`).
    """
    if team.size == 1 or device.type != "cuda":
        return model
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return converted


@contextmanager
def in_touch(team: Team) -> Iterator[None]:
    """Say in one line that another process has gone."""
    try:
        yield
    except RuntimeError as error:
        raise LostTouchError(
            f"process {team.rank} of {team.size} lost touch with another one, which failed, was "
            f"killed, or is out of reach; {CONTINUE}"
        ) from error
