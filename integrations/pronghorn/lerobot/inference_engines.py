"""LeRobot makes a rollout's inference engine in one function, which knows its own; here it learns to make others."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# The function is imported by name, so each of these has it for itself.
MODULES = (
    "lerobot.rollout.inference.factory", "lerobot.rollout.inference", "lerobot.rollout.context", "lerobot.rollout",
)  # fmt: skip
FUNCTION, METHOD, MARK = "create_inference_engine", "create_engine", "_pronghorn_original"


def let_configurations_create() -> None:
    """Have LeRobot make an engine by its configuration's own method `create_engine`, where it has one.

    A plugin registers a subclass of LeRobot's `InferenceEngineConfig`, whose name is then a value of
    `--inference.type`, with a method `create_engine(**context)`: the arguments are those of LeRobot's
    `create_inference_engine` save the configuration, the result is an `InferenceEngine`. Engines of LeRobot are made as
    before. Doing this again changes nothing.

    Raises:
        ImportError, AttributeError: LeRobot has the function no more where it had it.
    """
    for name in MODULES:
        module = importlib.import_module(name)
        current = getattr(module, FUNCTION)
        if not hasattr(current, MARK):
            setattr(module, FUNCTION, _asks_configurations(current))


def _asks_configurations(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_inference_engine(config: Any, **context: Any) -> Any:
        create = getattr(config, METHOD, None)
        if create is None:
            return original(config, **context)
        logger.info("Creating inference engine: %s", config.type)
        return create(**context)

    setattr(create_inference_engine, MARK, original)
    return create_inference_engine
