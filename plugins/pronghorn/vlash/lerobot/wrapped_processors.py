"""The processors of a wrapped policy: what turns a robot's observation into the policy's input, and its output back."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lerobot.configs import NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import (
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    TokenizerProcessorStep,
)

from pronghorn.vlash.lerobot.authors_checkpoint import own_statistics

NORMALIZER, UNNORMALIZER, TOKENIZER, DEVICE = (
    "normalizer_processor", "unnormalizer_processor", "tokenizer_processor", "device_processor",
)  # fmt: skip


class Processors(NamedTuple):
    """Before the wrapped policy, and after it."""

    before: PolicyProcessorPipeline
    after: PolicyProcessorPipeline

    def save(self, folder: Path) -> None:
        """Write both, to be read by `load_processors`."""
        self.before.save_pretrained(folder)
        self.after.save_pretrained(folder)


def make_processors(config: PreTrainedConfig, stats: dict[str, Any] | None, tokenizer: str | None) -> Processors:
    """A policy's own processors, new.

    Args:
        config: of the policy.
        stats: of the data set.
        tokenizer: a folder or repository, in place of the policy's own.

    Raises:
        ValueError: there is a tokenizer for a policy that reads no text.
    """
    with _tokenizer(config, tokenizer):
        return Processors(*make_pre_post_processors(config, dataset_stats=stats))


def load_processors(
    path: str | Path, config: PreTrainedConfig, stats: dict[str, Any] | None, tokenizer: str | None
) -> Processors:
    """A policy's own processors, as they were saved.

    Args:
        path: a folder, or a repository of the Hub; where it has none, as checkpoints of VLASH's authors, they are new,
            with the statistics among its weights.
        config: of the policy; its device, features and kinds of normalisation are those that count.
        stats: of the data set; where None those that were saved.
        tokenizer: a folder or repository, in place of the policy's own.

    Raises:
        ValueError: there are no statistics of something that is to be normalised, or there is a tokenizer for a policy
            that reads no text.
    """
    own = own_statistics(path)
    if own is not None:
        made = make_processors(config, own if stats is None else stats, tokenizer)
        _check_all_statistics(made, {**config.input_features, **config.output_features}, path)
        return made
    normalization: dict[str, Any] = {"norm_map": config.normalization_mapping}
    if stats is not None:
        normalization["stats"] = stats
    features = {**config.input_features, **config.output_features}
    before: dict[str, Any] = {
        DEVICE: {"device": config.device},
        NORMALIZER: {**normalization, "features": features},
    }
    after = {UNNORMALIZER: {**normalization, "features": dict(config.output_features)}}
    if tokenizer is not None:
        _check_reads_text(config)
        before[TOKENIZER] = {"tokenizer_name": tokenizer}
    processors = Processors(
        *make_pre_post_processors(
            config, pretrained_path=str(path), preprocessor_overrides=before, postprocessor_overrides=after
        )
    )
    _check_all_statistics(processors, features, path)
    return processors


def _check_all_statistics(processors: Processors, features: dict[str, PolicyFeature], path: str | Path) -> None:
    for step in processors.before.steps:
        if isinstance(step, NormalizerProcessorStep):
            _check_statistics(step, features, path)


def _check_statistics(step: NormalizerProcessorStep, features: dict[str, PolicyFeature], path: str | Path) -> None:
    missing = [
        name
        for name, feature in features.items()
        if step.norm_map.get(feature.type, NormalizationMode.IDENTITY) != NormalizationMode.IDENTITY
        and name not in (step.stats or {})
    ]
    if missing:
        # LeRobot would pass such values on as they are.
        raise ValueError(
            f"{path}: no statistics to normalise {', '.join(missing)} with, only of {', '.join(step.stats or {})}"
        )


@contextmanager
def _tokenizer(config: PreTrainedConfig, tokenizer: str | None) -> Iterator[None]:
    """Have LeRobot build a policy's processors with another tokenizer, for which it has no option."""
    if tokenizer is None:
        yield
        return
    module = _check_reads_text(config)

    def step(tokenizer_name: str, **options: Any) -> TokenizerProcessorStep:
        return TokenizerProcessorStep(tokenizer_name=tokenizer, **options)

    module.TokenizerProcessorStep = step
    try:
        yield
    finally:
        module.TokenizerProcessorStep = TokenizerProcessorStep


def _check_reads_text(config: PreTrainedConfig) -> Any:
    module = importlib.import_module(type(config).__module__.replace("configuration_", "processor_"))
    if not hasattr(module, "TokenizerProcessorStep"):
        raise ValueError(f"tokenizer: got one for {config.type!r}, which reads no text")
    return module
