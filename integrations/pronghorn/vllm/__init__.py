"""vLLM: the entry point that it calls in every one of its processes."""

from __future__ import annotations

import logging

from pronghorn.vllm.versions import SUPPORTED

logger = logging.getLogger(__name__)


def register() -> None:
    """Register all installed methods with vLLM. Never raises: that would end vLLM's start for every plugin."""
    try:
        import vllm
        from packaging.specifiers import SpecifierSet

        from pronghorn.methods import register_all

        if not SpecifierSet(SUPPORTED["vllm"]).contains(vllm.__version__, prereleases=True):
            logger.warning("pronghorn is tested with vllm %s, found %s", SUPPORTED["vllm"], vllm.__version__)
        register_all("vllm")
    except Exception:
        logger.exception("pronghorn is not available in vllm")
