"""Versions of vLLM that this integration is tested with."""

SUPPORTED = {"vllm": ">=0.25,<0.34"}
