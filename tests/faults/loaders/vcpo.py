"""VCPO's records and states: tiny files of each, and how they are read."""

from types import SimpleNamespace
from typing import Any

from tests.faults.loaders.table import loader


@loader("vcpo records", "vcpo_steps.jsonl", "vcpo_stats.jsonl", warns={"*.jsonl": "is not whole"})
class VcpoRecords:
    @staticmethod
    def write(folder):
        from tests.plugins.vcpo.test_records import write

        write(folder, [1, 2, 3], size=2)

    @staticmethod
    def read(folder):
        from pronghorn.vcpo.records import read_run

        run = read_run(folder)
        return {name: column.tolist() for table in (run.steps, run.trajectories) for name, column in table.items()}


@loader("vcpo trainer's state", "vcpo_state.json")
class VcpoState:
    @staticmethod
    def write(folder):
        from pronghorn.vcpo.trl.learner import save_state

        scaling: Any = SimpleNamespace(reference=_reference())
        scaling.reference.update(0.625, 0)
        save_state(folder, _config(), scaling, generations=17)

    @staticmethod
    def read(folder):
        from pronghorn.vcpo.trl.learner import load_state

        scaling: Any = SimpleNamespace(reference=_reference())
        state = load_state(folder, _config(), scaling, generations=int)
        return state["generations"], scaling.reference.value


def _config() -> Any:
    return SimpleNamespace(lag=2, force_resume=False)


def _reference():
    from pronghorn.vcpo import VCPOSettings
    from pronghorn.vcpo.ess import ReferenceESS

    return ReferenceESS(VCPOSettings())


@loader("vcpo rollouts' state", "rollout_state.json")
class VcpoRolloutState:
    @staticmethod
    def write(folder):
        from pronghorn.files.json_files import save_json

        state = {"prompt_index": 3, "beyond": [5, 6], "trained": 2, "dropped": 1, "model_version": 4}
        save_json(folder / "rollout_state.json", state, format=2)

    @staticmethod
    def read(folder):
        from pronghorn.vcpo.trl.learner import load_rollout_state

        return load_rollout_state(folder / "rollout_state.json")
