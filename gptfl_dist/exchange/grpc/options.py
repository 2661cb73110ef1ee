"""What both ends of a gRPC line set alike: how much may be under way, and how a dead line is found."""

from __future__ import annotations

WIDEST = 2 << 20
"""Bytes under way in a stream at most: they fill a line of 300 Mbit/s over 50 ms."""

_SHORTEST_ANSWER, _LONGEST_ANSWER = 5.0, 20.0  # seconds that the other side has, by the keepalive


def line_options(keepalive: float, window: int) -> list[tuple[str, int]]:
    """Channel options: `window` is the bytes that may be under way in a stream.

    A line that is silent for `keepalive` seconds is pinged, and closed if no answer comes in time. gRPC's own measuring
    lets the bytes under way grow far beyond what a line needs where a receiver is slow; they are memory, and what a cut
    sends twice.
    """
    answer = int(1000 * min(keepalive + _SHORTEST_ANSWER, _LONGEST_ANSWER))
    return [
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", window),
        ("grpc.keepalive_time_ms", int(1000 * keepalive)),
        ("grpc.keepalive_timeout_ms", answer),
        ("grpc.http2.ping_timeout_ms", answer),  # which alone closes a line: gRPC 1.85 does not heed the one above
    ]
