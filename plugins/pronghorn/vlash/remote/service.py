"""The names that a policy server and its clients call things by."""

from __future__ import annotations

SERVICE, DESCRIBE, CHUNK = "pronghorn.vlash.PolicyServer", "Describe", "Chunk"
TOKEN = "authorization"  # noqa: S105 - the name of gRPC's header
LARGEST_MESSAGE = 2**26
RECONNECT_MS = (100, 1000)


def bearer(token: str) -> str:
    """What the header holds."""
    return f"Bearer {token}"


def options(largest_message: int) -> list[tuple[str, int]]:
    """Of a channel or a server of gRPC."""
    least, most = RECONNECT_MS
    return [
        ("grpc.max_receive_message_length", largest_message),
        ("grpc.max_send_message_length", largest_message),
        ("grpc.so_reuseport", 0),  # a second server on the same port is an error
        ("grpc.initial_reconnect_backoff_ms", least),
        ("grpc.min_reconnect_backoff_ms", least),
        ("grpc.max_reconnect_backoff_ms", most),
    ]
