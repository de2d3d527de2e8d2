"""vLLM's promise that a request's bits do not depend on what else is in its batch."""

from __future__ import annotations


def refuse_batch_invariance(method: str) -> None:
    """For methods whose kernels choose tiles and splits by the size of the batch.

    Raises:
        ValueError: vLLM is asked for the promise.
    """
    from vllm import envs

    if envs.VLLM_BATCH_INVARIANT:
        raise ValueError(
            f"VLLM_BATCH_INVARIANT: is set, and how {method} rounds depends on the size of the batch; unset it, or "
            f"serve without {method}"
        )
