"""The machine that computes chunks."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType

try:
    import grpc
except ModuleNotFoundError as error:
    raise ImportError("a policy server needs gRPC: pip install grpcio") from error
import torch
from torch import Tensor

from pronghorn.vlash.chunks import ChunkRequest, Policy
from pronghorn.vlash.remote.container import MessageError, VersionError
from pronghorn.vlash.remote.messages import Description, pack_chunk, unpack_request
from pronghorn.vlash.remote.service import CHUNK, DESCRIBE, LARGEST_MESSAGE, SERVICE, TOKEN, bearer, options

logger = logging.getLogger(__name__)

CALLS = 8  # that are read at a time; the policy computes one after the other


class PolicyServer:
    """Serves a policy to robots; each request holds all that its chunk depends on.

        with PolicyServer(policy, description, token=secret) as server:
            server.wait()

    What is sent is not encrypted: robots on other machines come through a tunnel, like that of `ssh -L`, or a network
    of their own.

    Args:
        policy: gives chunks; called in one thread.
        description: what it is.
        host: the address that it listens on.
        port: where it listens; 0 takes a free one.
        token: that a client has to know.
        largest_message: bytes that a request may have.

    Raises:
        ValueError: it is to listen to other machines without a token.
        RuntimeError: the port is taken.
    """

    def __init__(
        self,
        policy: Policy,
        description: Description,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        largest_message: int = LARGEST_MESSAGE,
    ) -> None:
        if token is None and not _is_this_machine(host):
            raise ValueError(f"token: got None with host={host!r}, wanted one where other machines may call")
        self._policy, self._description, self._token = policy, description, token
        self._thread = ThreadPoolExecutor(1, "vlash-policy")
        self._server = grpc.server(
            ThreadPoolExecutor(CALLS, "vlash-call"), options=options(largest_message), maximum_concurrent_rpcs=2 * CALLS
        )
        handlers = {
            DESCRIBE: grpc.unary_unary_rpc_method_handler(self._describe),
            CHUNK: grpc.unary_unary_rpc_method_handler(self._chunk),
        }
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
        self.port: int = self._server.add_insecure_port(f"{host}:{port}")
        self.address = f"{host}:{self.port}"

    def start(self) -> PolicyServer:
        """Begin to answer."""
        self._server.start()
        return self

    def wait(self) -> None:
        """Until it is stopped."""
        self._server.wait_for_termination()

    def stop(self) -> None:
        """Answer no more; calls that wait are told."""
        self._server.stop(grace=None).wait()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> PolicyServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _describe(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        self._check_token(context)
        return self._description.pack()

    def _chunk(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        self._check_token(context)
        try:
            request = unpack_request(data)
            self._check_fits(request)
        except VersionError as error:
            return context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except MessageError as error:
            return context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        start = time.monotonic()
        asked = self._thread.submit(self._compute, request)
        # Whoever does not wait any more is not computed for, if that has not begun.
        context.add_callback(asked.cancel)
        wait([asked], context.time_remaining())
        if asked.cancel() or not asked.done():
            return context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the chunk is not there yet")
        try:
            return pack_chunk(asked.result(), time.monotonic() - start, self._description.digest)
        except Exception as error:
            logger.exception("The policy failed.")
            return context.abort(grpc.StatusCode.INTERNAL, f"the policy failed: {error!r}")

    def _compute(self, request: ChunkRequest) -> Tensor:
        with torch.no_grad():
            return self._policy(request)

    def _check_token(self, context: grpc.ServicerContext) -> None:
        if self._token is None:
            return
        given = dict(context.invocation_metadata()).get(TOKEN, "")
        if not hmac.compare_digest(str(given).encode(), bearer(self._token).encode()):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "token: wrong or missing")

    def _check_fits(self, request: ChunkRequest) -> None:
        description = self._description
        if request.state.shape[-1] != description.state_dim:
            raise MessageError(f"state: got {list(request.state.shape)}, wanted [..., {description.state_dim}]")
        leftover = request.leftover
        if leftover is not None and leftover.shape[-1] != description.action_dim:
            raise MessageError(f"leftover: got {list(leftover.shape)}, wanted [..., steps, {description.action_dim}]")
        missing = [name for name in description.inputs if name not in request.observation.content]
        if missing:
            raise MessageError(f"content: {', '.join(missing)} missing")


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
