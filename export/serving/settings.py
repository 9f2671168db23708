"""Everything that bounds a server, as one object."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from epdistill.errors import ExportError


@dataclass(frozen=True)
class Limits:
    """What a server accepts and how long it takes over it.

    Attributes:
        batch: Most images in one request, and in one batch of merged requests.
        delay: Seconds that a request may wait for others to share its batch.
        queue: Most images waiting for one model; above, 503.
        deadline: Seconds from a request's first byte of body to its answer; above, 504
            (408 where the client did not finish sending).
        requests: Most requests open at once; above, 503.
        body_bytes: Largest body of one request; above, 413.
        json_bytes: Largest JSON part of one (parsing takes several times its size); above, 413.
        held_bytes: Most bytes of all bodies held at once; above, 503.
        header_bytes: Largest header of a request; above, 400.
        header_seconds: A connection that takes longer to send a header is closed.
        idle_seconds: An open connection without a request is closed; longer than load
            balancers and clients keep theirs (60 s mostly), or they write to a closed one.
        linger: Seconds after SIGTERM during which requests are still taken, so that
            clients and load balancers learn of the end from the answers.

    Raises:
        ExportError: A limit is not a positive number (`delay` and `linger` may be 0).
    """

    batch: int = 64
    delay: float = 0.002
    queue: int = 1024
    deadline: float = 10.0
    requests: int = 512
    body_bytes: int = 64 << 20
    json_bytes: int = 16 << 20
    held_bytes: int = 512 << 20
    header_bytes: int = 16 << 10
    header_seconds: float = 10.0
    idle_seconds: int = 75
    linger: float = 1.0

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            may_be_zero = entry.name in ("delay", "linger")
            if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
                raise ExportError(
                    f"received the limit {entry.name} = {value}; expected a number "
                    f"{'of at least' if may_be_zero else 'above'} 0"
                )


def limits_from(
    *,
    batch: int,
    delay_ms: float,
    queue: int,
    deadline: float,
    body_mib: int,
    linger: float | None = None,
) -> Limits:
    """The limits that people set, in their units; the others follow or keep their defaults."""
    size = body_mib << 20
    return Limits(
        batch=batch,
        delay=delay_ms / 1e3,
        queue=max(queue, batch),
        deadline=deadline,
        body_bytes=size,
        held_bytes=max(Limits.held_bytes, size),
        linger=Limits.linger if linger is None else linger,
    )
