"""vLLM: the entry point that it calls in every one of its processes."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Register all installed methods with vLLM. Never raises: that would end vLLM's start for every plugin."""
    try:
        from pronghorn.methods import register_all
        from pronghorn.versions import obstacle

        reason = obstacle("vllm")
        if reason:
            logger.warning("%s", reason)
        register_all("vllm")
    except Exception:
        logger.exception("pronghorn is not available in vllm")
