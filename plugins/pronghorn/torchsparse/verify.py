"""Replays what the official implementation computed: maps, layers, backbones, functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pronghorn.torchsparse.config import ConvConfig

MAPS, LAYERS, NETWORK = "kernel_maps_", "layers_", "sparseres"
"""How the names of files begin, by what they hold."""
