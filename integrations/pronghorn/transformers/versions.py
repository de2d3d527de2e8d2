"""Versions of transformers that this integration is tested with."""

SUPPORTED = {"transformers": ">=5.16,<5.20"}
