"""Meeting the other processes that torchrun has started, and leaving them."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from epdistill.distributed import ALONE, CONTINUE, Team, in_touch
from epdistill.errors import LostTouchError

# A process that dies closes its sockets, which the others see at once. This is for a
# machine that vanishes without a word; rank 0 may work alone for a while.
PATIENCE = timedelta(hours=2)
# Without torchrun, rank 0 keeps the notes: so long it waits for the others to read them.
FAREWELL = 5.0
# So long the others wait for rank 0 to say what fails in all of them.
GRACE = 20.0
_present = ALONE


def wanted() -> int:
    """How many processes the launcher started, from its environment."""
    return int(os.environ.get("WORLD_SIZE") or 1) if "RANK" in os.environ else 1


def speaks() -> bool:
    """Whether this process is the one to say why the job ends."""
    if wanted() > 1 and _present.size == 1:  # what fails before they meet fails in all of them
        if os.environ["RANK"] != "0":
            # The launcher ends us as soon as rank 0 has spoken; the first to go ends all.
            time.sleep(GRACE)
        return True
    speaking = _present.first_to_fail()
    if _present.size > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _present.linger(FAREWELL)
    return speaking


def local_device(kind: str) -> str:
    """`cuda:N` for this process, if several share a machine and `kind` is `auto` or `cuda`."""
    if wanted() > 1 and kind in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    return kind


def join() -> Team:
    """Meet the other processes that the launcher started; `ALONE` if there are none.

    The environment is torchrun's: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK.
    CPU tensors travel by gloo, GPU tensors by nccl.

    Raises:
        LostTouchError: The others did not come.
    """
    global _present
    if wanted() == 1 or _present.size > 1:
        return _present
    team = Team(int(os.environ["RANK"]), wanted())
    with in_touch(team):
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    signal.signal(signal.SIGTERM, _stop)
    _present = Team(rank, size, store)
    return _present


def leave() -> None:
    """Part from the others, once all are done: who goes first would tear the rest."""
    global _present
    if _present.size > 1:
        with in_touch(_present):
            dist.barrier()
            dist.destroy_process_group()
        _present = ALONE


def _stop(number: int, frame: FrameType | None) -> None:
    raise LostTouchError(
        f"told to stop (SIGTERM): another process of the job has ended, or the scheduler wants "
        f"the machine; {CONTINUE}"
    )
