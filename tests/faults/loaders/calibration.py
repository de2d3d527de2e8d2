"""The state of a calibration: tiny files of each, and how they are read."""

import torch
from tests.faults.loaders.table import loader


@loader("calibration state", "block-00000.safetensors", "fingerprint.json")
class CalibrationBlocks:
    @staticmethod
    def write(folder):
        from pronghorn.transformers.calibration_state import BlockResult, CalibrationState

        state = CalibrationState(folder, lambda: {"weights": "abc", "bits": 4})
        state.save(0, BlockResult({"scale.0": torch.rand(8)}, {"losses": [0.5, 0.25]}), 1)

    @staticmethod
    def read(folder):
        from pronghorn.transformers.calibration_state import CalibrationState

        state = CalibrationState(folder, lambda: {"weights": "abc", "bits": 4})
        found = state.load(0, torch.device("cpu"))
        return None if found is None else (found[0].tensors, found[0].info, found[1])
