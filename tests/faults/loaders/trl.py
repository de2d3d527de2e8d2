"""Rollouts, snapshots and weights of the TRL integration: tiny files of each, and how they are read."""

from pathlib import Path
from types import SimpleNamespace

import torch
from tests.faults.loaders.table import loader, tensors


@loader("trl waiting rollouts", "waiting.safetensors")
class TrlWaiting:
    @staticmethod
    def write(folder):
        from pronghorn.trl.async_rollouts import GroupBuffer
        from pronghorn.trl.rollouts import Rollout

        buffer = GroupBuffer()
        for number in range(2):
            ids = torch.arange(3) + number
            known = {"sampled": torch.ones(3, dtype=torch.bool), "sampler_log_probs": -torch.rand(3)}
            rollout = Rollout(
                ids, ids, **known, reward=0.5, advantage=0.1, group=number, policy_version=2, policy_version_end=2
            )
            buffer.add(rollout, 1)
        buffer.save(folder / "waiting.safetensors")

    @staticmethod
    def read(folder):
        from dataclasses import astuple

        from pronghorn.trl.async_rollouts import GroupBuffer

        buffer = GroupBuffer()
        buffer.load(folder / "waiting.safetensors")
        return [[astuple(rollout) for rollout in group] for group in buffer.waiting]


@loader("trl lagged sampler", "lagged_sampler.safetensors", "lagged_sampler.json")
class TrlLagged:
    @staticmethod
    def write(folder):
        from pronghorn.trl.lagged_sampler import LaggedSampler

        sampler, model = LaggedSampler(2), torch.nn.Linear(3, 2)
        for version in range(2):
            sampler._keep(model, version)
        sampler.save(folder)

    @staticmethod
    def read(folder):
        from pronghorn.trl.lagged_sampler import LaggedSampler

        sampler = LaggedSampler(2)
        sampler.load(folder, torch.nn.Linear(3, 2))
        return list(sampler._snapshots)


@loader("trl weight transfer", "model-00000.safetensors", vllm=True)
class TrlWeights:
    @staticmethod
    def write(folder):
        from pronghorn.trl.file_weight_transfer import _save

        _save(iter(tensors(torch.nn.Linear(3, 2)).items()), folder)

    @staticmethod
    def read(folder):
        from safetensors.torch import load_file

        from pronghorn.vllm.weight_files import WeightFiles

        class Worker(WeightFiles):
            model_config = SimpleNamespace(hf_text_config=SimpleNamespace(tie_word_embeddings=False))

            def reload_weights(self, weights_path):
                self.found = [load_file(path) for path in sorted(Path(weights_path).glob("*.safetensors"))]

        worker = Worker()
        worker.load_weight_files(str(folder))
        return worker.found
