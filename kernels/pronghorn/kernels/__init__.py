"""Shared kernels: one folder an operation, each with a readable reference and a Triton version."""
