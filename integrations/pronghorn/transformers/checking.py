"""Whether a checkpoint loads in transformers whole, and answers as its source does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from pronghorn.checkpoint import Checkpoint, Finding, failed, ok, skipped
from pronghorn.checkpoint.sizes import check_model_size
from pronghorn.checkpoint.source import AS_SOURCE, read_as_source, source_folder
from pronghorn.checkpoint.weights import stored_shapes
from pronghorn.transformers.answers import Answers, NotFiniteError, agreement, observe, positions_of, windows

EXAMPLE = "The quick brown fox jumps over 13 lazy dogs."
ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


def check(
    checkpoint: Checkpoint,
    source: str | None,
    min_agreement: float,
    after_loading: Callable[[Any], Iterable[Finding]],
) -> Iterator[Finding]:
    """Load the checkpoint, let it answer, and compare the answers with its source's."""
    folder = checkpoint.folder
    source = source and str(source_folder(source))
    beyond = check_built(folder)
    if beyond:
        yield beyond
        return
    model, misfits = load_whole(folder)
    yield ok("architecture", f"{type(model).__name__}, {sum(p.numel() for p in model.parameters())} parameters")
    yield fitting(misfits)
    if misfits:
        return
    yield from after_loading(model)
    tokenizer = tokenizer_of_folder(folder)
    vocab_size = getattr(model.config.get_text_config(), "vocab_size", 0)
    yield check_tokenizer(tokenizer, vocab_size)
    yield _check_special_tokens(model, vocab_size)
    if not model.can_generate() or model.main_input_name != "input_ids":
        reason = f"{type(model).__name__} does not go on with a text"
        yield skipped("answers", reason, "try it with an input of your own", needed=True)
        return
    ids = windows(tokenizer, vocab_size, longest=positions_of(model.config.get_text_config().to_dict()))
    try:
        answers = observe(model, ids)
    except NotFiniteError as error:
        yield failed("answers", str(error), "load it in float32 to tell an overflow from damage, or quantize again")
        return
    yield ok("answers", f"finite, {said(tokenizer, answers.generated)} ({answers.seconds:.1f} s)")
    yield check_repeatable(model, answers)
    if source is None:
        return
    del model
    gc.collect()
    yield from _compare(answers, source, min_agreement)


def load_whole(folder: str | Path, device: str | None = None) -> tuple[Any, list[str]]:
    """The model in evaluation mode, and which of its checkpoint's tensors are missing, left over or of another shape.

    Args:
        folder: of the checkpoint, or its hub name.
        device: the GPU if there is one, by default; on "meta" only names and shapes are read.

    Raises:
        ValueError: the configuration names no class of transformers.
    """
    _, kind = _class_of(folder)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    how: dict[str, Any] = {"device_map": {"": where}} if where == "meta" else {}
    loaded: Any = kind.from_pretrained(
        folder, dtype="auto", use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True,  # to name them; the error that is raised otherwise names none
        **how,
    )  # fmt: skip
    model, info = loaded
    misfits = [f"{name}: missing" for name in sorted(info["missing_keys"])]
    misfits += [f"{name}: the model has no place for it" for name in sorted(info["unexpected_keys"])]
    misfits += [
        f"{name}: stored {tuple(stored)}, the configuration means {tuple(wanted)}"
        for name, stored, wanted in sorted(info["mismatched_keys"])
    ]
    return model.to(where).eval(), misfits


def check_built(folder: Path) -> Finding | None:
    """What is wrong if the model, of which nothing is read here, is far larger than the weights in the folder.

    Raises:
        ValueError: the configuration names no class of transformers.
    """
    config, kind = _class_of(folder)
    with torch.device("meta"):
        model = kind(config)
    return check_model_size(model, stored_shapes(folder), packed=hasattr(config, "quantization_config"))


def _class_of(folder: str | Path) -> tuple[Any, Any]:
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    names = list(config.architectures or [])
    kinds = [getattr(transformers, name, None) for name in names]
    kind = next((k for k in kinds if isinstance(k, type) and issubclass(k, transformers.PreTrainedModel)), None)
    if kind is None:
        raise ValueError(f"architectures: got {names}, wanted a class of transformers {transformers.__version__}")
    return config, kind


def fitting(misfits: list[str]) -> Finding:
    """The finding of what `load_whole` says."""
    if not misfits:
        return ok("keys and shapes", "as the configuration means")
    rest = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    detail = f"{'; '.join(misfits[:3])}{rest}; a library would make them up, cut or drop them"
    return failed("keys and shapes", detail, "save the whole model again, or take the configuration that belongs to it")


def tokenizer_of_folder(folder: Path) -> Any:
    """The tokenizer in a folder, None where there is none; one that is damaged raises what transformers raises."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(folder)


def check_tokenizer(tokenizer: Any, vocab_size: int) -> Finding:
    """That ids of text are within the model's vocabulary."""
    if tokenizer is None:
        return skipped("tokenizer", "there is none in the folder", "save it there: tokenizer.save_pretrained")
    ids = tokenizer(EXAMPLE)["input_ids"]
    if not ids:
        return failed("tokenizer", f"{EXAMPLE!r} has no tokens", "save the source's tokenizer into the folder")
    if max(ids) >= vocab_size or len(tokenizer) > vocab_size:
        return failed("tokenizer", f"it has {len(tokenizer)} ids, the model's vocabulary {vocab_size}",
                      "save the tokenizer that belongs to the model")  # fmt: skip
    return ok("tokenizer", f"{len(tokenizer)} ids for a vocabulary of {vocab_size}")


def said(tokenizer: Any, ids: list[int]) -> str:
    """What a model said, in short."""
    if tokenizer is None:
        return f"generated ids {ids[:8]}"
    return f"says {tokenizer.decode(ids)[:60]!r}"


def check_repeatable(model: Any, answers: Answers) -> Finding:
    """That the same question has the same answer."""
    again = observe(model, answers.ids[:1])
    if again.generated != answers.generated:
        return failed("the same again", f"{again.generated[:8]} after {answers.generated[:8]}",
                      "look for a layer with state or dropout")  # fmt: skip
    return ok("the same again", f"{len(again.generated)} tokens")


def judged(top1: float, kl: float, tokens: int, min_agreement: float) -> Finding:
    """The finding of a comparison with the source."""
    detail = f"top-1 agreement {top1:.4f}, KL {kl:.5f} nats a token, over {tokens} tokens"
    if not top1 >= min_agreement or not kl < float("inf"):
        remedy = "quantize with more bits, smaller groups or more calibration text; or is this another source?"
        return failed(AS_SOURCE, f"{detail}; wanted an agreement of {min_agreement}", remedy)
    return ok(AS_SOURCE, detail)


def _check_special_tokens(model: Any, vocab_size: int) -> Finding:
    given = getattr(model, "generation_config", None) or model.config
    for role in ROLES:
        value = getattr(given, role, None)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not 0 <= int(token) < vocab_size:
                return failed("special tokens", f"{role}: got {token}, wanted an id below {vocab_size}",
                              "mend generation_config.json and config.json")  # fmt: skip
    return ok("special tokens", "within the vocabulary")


def _compare(answers: Answers, source: str, min_agreement: float) -> Iterator[Finding]:
    with read_as_source(source):
        theirs, misfits = load_whole(source)
        if misfits:
            raise ValueError(misfits[0])
        found = agreement(observe(theirs, answers.ids), answers)
    yield judged(found.top1, found.kl, found.tokens, min_agreement)
    if found.layers:
        worst = max(found.layers, key=lambda name: found.layers[name])
        yield ok("layer by layer", f"largest relative error {found.layers[worst]:.4f}, of {worst}")
