"""pi0.5's prompt without the state, for a model that sees the state elsewhere."""

from __future__ import annotations

from typing import Any

from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import ComplementaryDataProcessorStep, PolicyProcessorPipeline, ProcessorStepRegistry

from pronghorn.vlash.pi.preprocessing import prompt


@ProcessorStepRegistry.register(name="vlash_prompt_without_state")
class PromptWithoutState(ComplementaryDataProcessorStep):
    """Makes a prompt of the task alone."""

    def complementary_data(self, complementary_data: dict[str, Any]) -> dict[str, Any]:
        """The data with prompts in place of tasks.

        Raises:
            ValueError: there is no task.
        """
        if complementary_data.get("task") is None:
            raise ValueError("task: got None, which pi0.5 needs")
        return {**complementary_data, "task": [prompt(task) for task in complementary_data["task"]]}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        """The features as they are."""
        return features


def leave_state_out(pipeline: PolicyProcessorPipeline) -> None:
    """Have pi0.5's processors make prompts of the task alone."""
    pipeline.steps = [
        PromptWithoutState() if isinstance(step, Pi05PrepareStateTokenizerProcessorStep) else step
        for step in pipeline.steps
    ]
