"""The closing tables of `bench serve` and `bench load`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epdistill.cli.output import show_table

if TYPE_CHECKING:
    from epdistill.workflows.benchmark import Benched


def serving_table(done: Benched) -> None:
    """The server beside onnxruntime alone."""
    content = done.content
    serving = content["serving"]
    latency = serving["latency"]
    overhead = latency["overhead_seconds"]
    where = (
        f"client on core {serving['client_core']}"
        if serving["client_core"] is not None
        else "client on the same cores"
    )
    title = (
        f"{done.folder}: {content['models']}; {content['hardware']['cpu']}, "
        f"{serving['threads']} thread(s) of onnxruntime, {where}"
    )
    show_table(
        title,
        ["batch 1, ms", "p50 (quartiles)", "p99"],
        [
            ["onnxruntime", *_ms(latency["raw"])],
            ["server", *_ms(latency["served"])],
            ["in the server, waiting", *_ms(latency["server"]["queue"])],
            ["in the server, onnxruntime", *_ms(latency["server"]["model"])],
            ["in the server, all", *_ms(latency["server"]["total"])],
            [f"difference of p50 (at most {1e3 * latency['allowed_seconds']:.2f})",
             f"{1e3 * overhead['p50']:.3f}", ""],
            ["processor time of the client", f"{1e3 * latency['client_cpu_seconds']:.3f}", ""],
        ],
        None,
    )  # fmt: skip
    rows = []
    for row in serving["throughput"]:
        share = {key: 100 * value for key, value in row["share_client_excluded"].items()}
        rows.append(
            [
                str(row["batch_size"]),
                f"{row['raw_images_per_second']:.4g}",
                f"{row['served_images_per_second']:.4g}",
                f"{share['median']:.1f} % ({share['q25']:.1f}-{share['q75']:.1f})",
                f"{1e3 * row['client_cpu_seconds']:.3f}",
            ]
        )
    head = ["images per request", "onnxruntime, images/s", "server, images/s", "share (quartiles)",
            "client CPU, ms per request"]  # fmt: skip
    show_table("throughput", head, rows, None)


def load_table(done: Benched) -> None:
    """What came back under load."""
    found = done.content["load"]
    latency = found["latency"]
    memory = found["memory_bytes"]
    rows = [
        ["requests", str(found["requests"])],
        ["answered", str(found["answered"])],
        ["wrong answers", str(found["wrong"])],
        ["largest error, of the largest logit", f"{found['largest_error']:.1e}"],
        ["503, 504", f"{found['overloaded']['503']}, {found['overloaded']['504']}"],
        ["other 5xx", str(found["other_5xx"])],
        ["broken connections", str(found["broken"])],
        ["images per second", f"{found['images_per_second']:.4g}"],
        ["ms: p50 (quartiles)", _ms(latency)[0] if latency else ""],
        ["p99", _ms(latency)[1] if latency else ""],
        ["memory grew by, MiB", f"{memory['growth'] / 2**20:.1f}"],
    ]
    title = (
        f"{done.folder}: {done.content['models']}; {found['clients']} clients for "
        f"{found['seconds']:.0f} s"
    )
    show_table(title, ["load", "value"], rows, None)


def _ms(seconds: dict[str, Any]) -> list[str]:
    """p50 with quartiles, and p99, in milliseconds."""
    ms = {key: 1e3 * value for key, value in seconds.items()}
    return [f"{ms['median']:.3f} ({ms['q25']:.3f}-{ms['q75']:.3f})", f"{ms['p99']:.3f}"]
