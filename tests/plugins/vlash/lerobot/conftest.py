"""LeRobot has an environment of its own; elsewhere there is nothing to test here."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest

# LeRobot's requirements hold a package called tests, so what tests share is not imported from there.
sys.path.insert(0, str(Path(__file__).parent))
collect_ignore_glob = [] if importlib.util.find_spec("lerobot") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def plugin():
    """Loaded as LeRobot's programs do, before anything else here imports it."""
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The folder of a data set."""
    import tiny_lerobot

    root = tmp_path_factory.mktemp("data") / "tiny"
    tiny_lerobot.dataset(root)
    return root


@pytest.fixture(scope="session")
def meta(data):
    """The data set's metadata."""
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    return LeRobotDatasetMetadata("tiny/local", root=data)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The folder of a tokenizer."""
    import tiny_lerobot

    return tiny_lerobot.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tiny_pi(monkeypatch):
    """LeRobot builds pi0 and pi0.5 small."""
    import tiny_lerobot

    tiny_lerobot.shrink_pi(monkeypatch)


@pytest.fixture
def samples(data):
    """Gives a batch of the data set for a configuration."""
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    def load(config, rows=(0, 7, 19, 38)):
        steps = {"action": [step / 10 for step in config.action_delta_indices]}
        if config.observation_delta_indices is not None:
            seen = [step / 10 for step in config.observation_delta_indices]
            steps.update({"observation.image": seen, "observation.state": seen})
        loaded = LeRobotDataset("tiny/local", root=data, delta_timestamps=steps)
        return torch.utils.data.default_collate([loaded[row] for row in rows])

    return load


@pytest.fixture(scope="session")
def command():
    """Runs one of LeRobot's programs in this process, which has imported it already."""

    def run(main, *arguments):
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
            main()

    return run


@pytest.fixture(scope="session")
def train(command, data):
    """Trains by lerobot-train; gives the checkpoint's folder."""

    def run(output, *arguments, steps=3):
        from lerobot.scripts import lerobot_train

        command(
            lerobot_train.main, "--policy.type=vlash", "--policy.device=cpu", "--policy.push_to_hub=false",
            "--dataset.repo_id=tiny/local", f"--dataset.root={data}", f"--output_dir={output}", f"--steps={steps}",
            "--batch_size=4", "--num_workers=0", "--log_freq=1", "--env_eval_freq=0", *arguments,
        )  # fmt: skip
        return output / "checkpoints" / "last" / "pretrained_model"

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, train):
    """An ACT inside of VLASH, from lerobot-train."""
    import json

    import tiny_lerobot

    options = json.dumps(tiny_lerobot.ACT)
    return train(
        tmp_path_factory.mktemp("trained") / "out", "--policy.base=act", f"--policy.base_config={options}",
        "--policy.chunk_size=16", "--policy.n_action_steps=8", "--policy.max_delay_steps=3",
    )  # fmt: skip
