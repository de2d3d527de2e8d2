"""Workers of a vLLM server that take new weights from a folder while they serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pronghorn.files.tensor_files import load_tensors

FORMAT = 2  # of the newest files that are known


class WeightFiles:
    """For `--worker-extension-cls pronghorn.vllm.weight_files.WeightFiles`; call it while the server is paused."""

    def load_weight_files(self, path: str) -> None:
        """Load the safetensors of a folder, named as in the model's checkpoint, into the model that is served.

        Raises:
            FileNotFoundError: there are none. The model is as it was.
            ValueError: one is damaged. The model is as it was.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        files = sorted(Path(path).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{path}: no safetensors; wanted a folder that trainer and server both see")
        for file in files:  # all of them before the first weight is replaced
            load_tensors(file, newest=FORMAT)
        worker: Any = self
        worker.reload_weights(weights_path=path)
        if worker.model_config.hf_text_config.tie_word_embeddings:
            for module in worker.model_runner.get_model().modules():
                # On a CPU a head is packed by itself; one that is tied is not in the checkpoint, and kept its old pack.
                if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                    module.quant_method.process_weights_after_loading(module)
