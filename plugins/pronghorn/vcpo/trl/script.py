"""Training from the command line: TRL's parser, its arguments for models and data, and VCPO's trainers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_dataset, get_peft_config

from pronghorn.trl.in_process_worker import InProcessWorker
from pronghorn.vcpo.trl.async_config import AsyncVCPOConfig
from pronghorn.vcpo.trl.async_trainer import AsyncVCPOTrainer
from pronghorn.vcpo.trl.config import VCPOConfig
from pronghorn.vcpo.trl.trainer import VCPOTrainer

START = "start"


LEARNER, SERVER, IN_PROCESS = "learner", "server", "in_process"


@dataclass
class VCPOScriptArguments(ScriptArguments):
    """What the script itself needs.

    Attributes:
        sampler: "learner" is `VCPOTrainer`, which samples and learns in turn; "server" is `AsyncVCPOTrainer` with a
            vLLM server, and "in_process" the same with a thread and a second copy of the model.
        reward_funcs: functions as `GRPOTrainer` takes them, each by `package.module.function` or `file.py:function`.
        from_scratch: begin with random weights of the architecture that `model_name_or_path` describes.
        resume: go on from the last checkpoint in `output_dir`, if there is one.
    """

    # TRL asks for a data set's name, which `datasets` in a file of settings makes needless.
    dataset_name: str | None = field(default=None, metadata={"help": "Data set of the hub or a local path."})
    sampler: str = field(default=LEARNER, metadata={"help": f"{LEARNER}, {SERVER} or {IN_PROCESS}."})
    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Rewards: package.module.function or file.py:function."}
    )
    from_scratch: bool = field(default=False, metadata={"help": "Begin with random weights."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})


@dataclass
class AsyncModelConfig(ModelConfig):
    """`ModelConfig` without what an asynchronous trainer's configuration has itself."""

    dtype: str | None = field(default=None, init=False)
    attn_implementation: str | None = field(default=None, init=False)


def main(arguments: list[str] | None = None) -> VCPOTrainer | AsyncVCPOTrainer:
    """Train as the command line says, and save the model.

    Args:
        arguments: of the command line; None takes those of the process.

    Raises:
        ValueError: there is no reward function, no data, or no such sampler.
    """
    # Which configuration the others are read into depends on the sampler.
    first = TrlParser((VCPOScriptArguments,)).parse_args_and_config(
        arguments, return_remaining_strings=True, fail_with_unknown_args=False
    )[0]
    if first.sampler not in (LEARNER, SERVER, IN_PROCESS):
        raise ValueError(f"sampler: got {first.sampler!r}, accepted are {LEARNER}, {SERVER}, {IN_PROCESS}")
    kind = VCPOConfig if first.sampler == LEARNER else AsyncVCPOConfig
    about_model = ModelConfig if first.sampler == LEARNER else AsyncModelConfig
    parser = TrlParser((VCPOScriptArguments, kind, about_model, DatasetMixtureConfig))
    script, config, model, data = parser.parse_args_and_config(arguments)
    if not script.reward_funcs:
        raise ValueError("reward_funcs: got none, wanted functions as package.module.function or file.py:function")
    path = model.model_name_or_path
    if script.from_scratch:
        path = _random_weights(path, Path(config.output_dir) / START, config.seed)
    chosen = {"revision": model.model_revision}
    if script.sampler == LEARNER:
        chosen |= {"attn_implementation": model.attn_implementation, "dtype": model.dtype}
    config.model_init_kwargs = {**chosen, **(config.model_init_kwargs or {})}
    named: dict[str, Any] = {
        "model": path, "reward_funcs": [load_function(name) for name in script.reward_funcs], "args": config,
        "train_dataset": _rows(script, data), "processing_class": AutoTokenizer.from_pretrained(path),
        "peft_config": get_peft_config(model),
    }  # fmt: skip
    if script.sampler == IN_PROCESS:
        named["rollout_worker"] = named["weight_transfer"] = _worker(path, named, config)
    trainer = VCPOTrainer(**named) if script.sampler == LEARNER else AsyncVCPOTrainer(**named)
    there = any(Path(config.output_dir).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=script.resume and there)
    trainer.save_model(config.output_dir)
    return trainer


def _worker(path: str, named: dict[str, Any], config: AsyncVCPOConfig) -> InProcessWorker:
    return InProcessWorker(
        AutoModelForCausalLM.from_pretrained(path, dtype=config.dtype), named["processing_class"],
        named["train_dataset"], named["reward_funcs"], num_generations=config.num_generations,
        max_completion_length=config.max_completion_length, temperature=config.temperature, seed=config.seed,
        queue_maxsize=config.queue_maxsize,
    )  # fmt: skip


def _random_weights(path: str, folder: Path, seed: int) -> str:
    set_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return str(folder)


def load_function(path: str) -> Callable[..., Any]:
    """A function by its import path, `package.module.function`, or by its file, `folder/file.py:function`.

    Raises:
        ValueError: there is none.
        ImportError, OSError: its module or file cannot be read.
    """
    file, colon, name = path.rpartition(":")
    module: Any = None
    if colon:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        if spec is None or spec.loader is None:
            raise ValueError(f"reward_funcs: got {path!r}, wanted a file that ends with .py before the colon")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif "." in path:
        package, _, name = path.rpartition(".")
        module = importlib.import_module(package)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward_funcs: got {path!r}, wanted package.module.function or file.py:function")
    found: Callable[..., Any] = function
    return found


def _rows(script: VCPOScriptArguments, data: DatasetMixtureConfig) -> Any:
    if data.datasets:
        return get_dataset(data)[script.dataset_train_split]
    if script.dataset_name is None:
        raise ValueError("datasets: got none, and no dataset_name; wanted one of both")
    from datasets import load_dataset

    return load_dataset(script.dataset_name, name=script.dataset_config)[script.dataset_train_split]
