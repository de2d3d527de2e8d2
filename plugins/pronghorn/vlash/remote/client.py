"""The robot's side: a policy that computes on another machine."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Any

try:
    import grpc
except ModuleNotFoundError as error:
    raise ImportError("a remote policy needs gRPC: pip install grpcio") from error
from torch import Tensor

from pronghorn.vlash.chunks import ChunkRequest
from pronghorn.vlash.config import SYNC, VLASHSettings
from pronghorn.vlash.remote.container import MessageError
from pronghorn.vlash.remote.messages import Description, pack_request, unpack_chunk
from pronghorn.vlash.remote.service import CHUNK, DESCRIBE, LARGEST_MESSAGE, SERVICE, TOKEN, bearer, options
from pronghorn.vlash.watchdog import PolicyError


class RemotePolicy:
    """Asks a policy server for chunks, as a `Policy`; everything else stays on this machine.

        with RemotePolicy("127.0.0.1:50061") as policy:
            with AsyncRunner(policy, policy.settings(inference_overlap_steps="auto")) as runner:
                control_loop(runner, observe, act, fps=30, steps=900)

    The content of observations is a mapping of names to tensors, arrays, texts or lists of texts. When the server is
    gone, or wrong, every call raises; when it is there again, and serves the same, a call works again.

    Args:
        address: host:port.
        token: that the server wants.
        timeout_s: seconds until a chunk that has not come is given up.
        jpeg_quality: send uint8 [..., height, width, 3] as JPEG of that quality, 1 to 95; None sends them as they are.
        largest_message: bytes that an answer may have.

    Raises:
        ValueError: `timeout_s` is not positive, or `jpeg_quality` out of range.
        PolicyError: there is no server, it wants another token, or it speaks another version.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        timeout_s: float = 5.0,
        jpeg_quality: int | None = None,
        largest_message: int = LARGEST_MESSAGE,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: got {timeout_s}, wanted a positive number of seconds")
        if jpeg_quality is not None and not 1 <= jpeg_quality <= 95:
            raise ValueError(f"jpeg_quality: got {jpeg_quality}, wanted 1 to 95, or None")
        self.address, self._timeout, self._quality = address, timeout_s, jpeg_quality
        self._metadata = [] if token is None else [(TOKEN, bearer(token))]
        self._channel = grpc.insecure_channel(address, options=options(largest_message))
        self._describe = self._channel.unary_unary(f"/{SERVICE}/{DESCRIBE}")
        self._chunk = self._channel.unary_unary(f"/{SERVICE}/{CHUNK}")
        self._in_touch = False
        self.seconds: float | None = None
        try:
            self.description = Description.unpack(self._call(self._describe, b""))
        except (PolicyError, MessageError) as error:
            self.close()
            raise PolicyError(f"{address}: no policy server that can be used, {error}") from error

    def settings(self, **changes: Any) -> VLASHSettings:
        """What the served policy was made to be run with, changed.

        Raises:
            ValueError, TypeError: as of `VLASHSettings`; or the mode is one that the server does not compute for.
        """
        chosen = replace(self.description.settings, **changes)
        served = self.description.settings.async_mode
        if chosen.async_mode not in (served, SYNC):
            raise ValueError(
                f"async_mode: got {chosen.async_mode!r}, but the server computes for {served!r}; serve with --mode"
            )
        return chosen

    def __call__(self, request: ChunkRequest) -> Tensor:
        """The chunk that is asked for; `seconds` then says how long the server took.

        Args:
            request: of [..., state_dim]; what the server's `description.inputs` names is in its observation's content.

        Returns:
            [..., chunk_size, action_dim], of the state's dtype and on its device.

        Raises:
            PolicyError: none came in time, the server refused or failed, or it is another one now.
            MessageError: the request cannot be sent.
        """
        answer = self._call(self._chunk, pack_request(request, self._quality))
        try:
            chunk, self.seconds, digest = unpack_chunk(answer)
        except MessageError as error:
            raise PolicyError(f"{self.address}: {error}") from error
        if digest != self.description.digest:
            raise PolicyError(f"{self.address}: it serves another policy than at first; make a new RemotePolicy")
        sizes = [self.description.settings.chunk_size, self.description.action_dim]
        if list(chunk.shape) != [*request.state.shape[:-1], *sizes]:
            raise PolicyError(
                f"{self.address}: got a chunk of {list(chunk.shape)}, wanted [..., {sizes[0]}, {sizes[1]}]"
            )
        return chunk.to(request.state)

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, message: bytes) -> bytes:
        try:
            # A server that is gone is noticed at once, one that is not there yet is waited for.
            answer: bytes = method(
                message, timeout=self._timeout, metadata=self._metadata, wait_for_ready=not self._in_touch
            )
        except grpc.RpcError as error:
            self._in_touch = False
            late = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            reason = f"no answer within {self._timeout} s" if late else f"{error.code().name}, {error.details()}"
            raise PolicyError(f"{self.address}: {reason}") from error
        self._in_touch = True
        return answer
