"""Inference engines that LeRobot does not know, made by LeRobot's function."""

from dataclasses import dataclass

import pytest
from lerobot.rollout import context, inference
from lerobot.rollout.inference import factory

from pronghorn.lerobot.inference_engines import MARK, let_configurations_create

PLACES = [factory, inference, context]


class Engine(inference.InferenceEngine):
    def __init__(self, config, context):
        self.config, self.context = config, context

    def start(self):
        pass

    stop = reset = start

    def get_action(self, obs_frame):
        return None


@inference.InferenceEngineConfig.register_subclass("of_a_test")
@dataclass
class Config(inference.InferenceEngineConfig):
    value: int = 3

    def create_engine(self, **given):
        return Engine(self, given)


@dataclass
class Unmakeable(inference.InferenceEngineConfig):
    type = "unmakeable"


@pytest.fixture(autouse=True)
def patched():
    let_configurations_create()


@pytest.mark.parametrize("place", PLACES)
def test_a_configuration_makes_its_engine(place):
    config = Config()
    engine = place.create_inference_engine(config, fps=30, task="go")
    assert (engine.config, engine.context) == (config, {"fps": 30, "task": "go"})


@pytest.mark.parametrize("place", PLACES)
def test_lerobots_engines_are_made_as_before(place):
    class Robot:
        robot_type = "none"

    arguments = dict.fromkeys(("policy", "preprocessor", "postprocessor", "hw_features", "dataset_features", "device"))
    arguments |= {"robot_wrapper": Robot, "ordered_action_keys": [], "task": "", "fps": 30}
    made = place.create_inference_engine(inference.SyncInferenceConfig(), **arguments)
    assert isinstance(made, inference.SyncInferenceEngine)
    with pytest.raises(ValueError, match="Unmakeable"):
        place.create_inference_engine(Unmakeable(), **arguments)


def test_once_is_enough():
    before = [place.create_inference_engine for place in PLACES]
    let_configurations_create()
    assert [place.create_inference_engine for place in PLACES] == before
    assert not any(hasattr(getattr(function, MARK), MARK) for function in before)
