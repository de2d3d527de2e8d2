"""Whether a checkpoint loads in diffusers whole, and makes pictures."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pronghorn.checkpoint import Checkpoint, Finding, failed, ok, skipped
from pronghorn.checkpoint.sizes import check_model_size
from pronghorn.checkpoint.source import AS_SOURCE, read_as_source, source_folder
from pronghorn.checkpoint.weights import stored_dtype, stored_shapes

LIBRARIES = ("diffusers", "transformers", "pronghorn")
STEPS, LEAST_EDGE = 2, 64
DROPPED = "save it again with save_pretrained: diffusers makes up what is missing and drops what is left over"


def check(
    checkpoint: Checkpoint,
    source: str | None,
    min_agreement: float,
    after_loading: Callable[[Any], Iterable[Finding]],
) -> Iterator[Finding]:
    """Load the autoencoder, model or pipeline, let it make a picture, and compare that with its source's."""
    base = None if source is None else source_folder(source)
    foreign = _foreign(checkpoint)
    if foreign:
        yield failed("components", f"{foreign}: wanted classes of {', '.join(LIBRARIES)}",
                     "remove it: loading the pipeline would import that module")  # fmt: skip
        return
    loaded, info = load_whole(checkpoint)
    yield ok("class", type(loaded).__name__)
    wrong = [f"{where or 'the model'}: {what} {names[0]!r}" for where, what, names in info if names]
    if wrong:
        yield failed("keys and shapes", "; ".join(wrong[:3]), DROPPED)
        return
    yield ok("keys and shapes", "as the configuration means")
    yield from after_loading(loaded)
    picture = answer(loaded)
    if picture is None:
        yield skipped("answers", f"{type(loaded).__name__} takes neither a prompt, a class nor an image alone",
                      "try it with an input of your own", needed=True)  # fmt: skip
        return
    if not bool(picture.isfinite().all()):
        yield failed("answers", f"{tuple(picture.shape)} with NaN or Inf", "try float32, or train or convert again")
        return
    yield ok("answers", f"finite, {tuple(picture.shape)} from {float(picture.min()):.2f} to {float(picture.max()):.2f}")
    if base is not None:
        del loaded
        with read_as_source(base):
            original = Checkpoint(base, checkpoint.ecosystem)
            if _foreign(original):
                raise ValueError(f"{_foreign(original)} would be imported")
            theirs = answer(load_whole(original)[0])
        yield _as_source(picture, theirs, min_agreement)


def load_whole(checkpoint: Checkpoint) -> tuple[Any, list[tuple[str, str, list[str]]]]:
    """A pipeline or a model in evaluation mode, and for each part the keys that are missing or left over.

    Raises:
        ValueError: the configuration names no class of diffusers; a tensor has another shape.
    """
    import diffusers

    folder, where = checkpoint.folder, "cuda" if torch.cuda.is_available() else "cpu"
    if not (folder / "model_index.json").is_file():
        model, info = _load_model(diffusers, str(checkpoint.config.get("_class_name")), folder)
        return model.to(where).eval(), [("", what, names) for what, names in info]
    parts: dict[str, Any] = {}
    found = []
    for name, (library, kind) in _components(checkpoint).items():
        if any((folder / name).glob("*.safetensors")):
            # Without a dtype diffusers takes float32 and transformers what is stored, which do not go together.
            dtype = stored_dtype(folder / name)
            parts[name], info = _load_model(_module(library), kind, folder / name, dtype=dtype)
            found += [(name, what, names) for what, names in info]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(where), found


@torch.no_grad()
def answer(loaded: Any) -> Tensor | None:
    """A picture of a fixed seed, float [..., height, width], channels first or last; None if it takes more."""
    generator = torch.Generator().manual_seed(0)
    if hasattr(loaded, "encode") and hasattr(loaded, "decode"):
        edge = max(LEAST_EDGE, 2 * _ratio(loaded))
        channels = int(loaded.config.get("in_channels", 3))
        image = (2 * torch.rand(1, channels, edge, edge, generator=generator) - 1).to(loaded.device, loaded.dtype)
        code = loaded.encode(image)
        latent = code.latent if hasattr(code, "latent") else code.latent_dist.mode()
        picture: Tensor = loaded.decode(latent).sample
        return picture.float().cpu()
    if not callable(loaded) or not hasattr(loaded, "components"):
        return None
    takes = inspect.signature(loaded.__call__).parameters
    given: dict[str, Any] = {"generator": generator, "output_type": "np", "num_inference_steps": STEPS}
    if "class_labels" in takes:
        given["class_labels"] = [0]
    elif "prompt" in takes and "image" not in takes:
        given["prompt"] = "a photograph of an astronaut riding a horse"
    else:
        return None
    made = loaded(**{name: value for name, value in given.items() if name in takes})
    return torch.as_tensor(made.images).float()


def _as_source(picture: Tensor, theirs: Tensor | None, min_agreement: float) -> Finding:
    if theirs is None or theirs.shape != picture.shape:
        got = None if theirs is None else tuple(theirs.shape)
        return failed(AS_SOURCE, f"its picture is {got}, this one {tuple(picture.shape)}", "give its own source")
    error = float((picture - theirs).norm() / theirs.norm().clamp_min(1e-30))
    detail = f"relative error {error:.6f} of the picture"
    if not 1 - error >= min_agreement:
        return failed(AS_SOURCE, f"{detail}; wanted at most {1 - min_agreement:g}", "is this another source?")
    return ok(AS_SOURCE, detail)


def _load_model(module: Any, kind: str, folder: Path, **how: Any) -> tuple[Any, list[tuple[str, list[str]]]]:
    found = getattr(module, kind, None)
    if found is None or not hasattr(found, "from_pretrained"):
        raise ValueError(f"{folder.name}: got the class {kind}, wanted one of {module.__name__}")
    _check_built(found, folder)
    model, info = found.from_pretrained(str(folder), use_safetensors=True, output_loading_info=True, **how)
    return model.eval(), [
        ("lacks", sorted(info["missing_keys"])),
        ("has no place for", sorted(info["unexpected_keys"])),
    ]


def _check_built(kind: Any, folder: Path) -> None:
    """Raise ValueError if the model, of which nothing is read here, is far larger than the weights in the folder."""
    with torch.device("meta"):
        if hasattr(kind, "load_config"):
            model = kind.from_config(kind.load_config(str(folder)))
        else:
            model = kind(kind.config_class.from_pretrained(str(folder)))
    beyond = check_model_size(model, stored_shapes(folder), packed=hasattr(model.config, "quantization_config"))
    if beyond:
        raise ValueError(f"{folder.name}: {beyond.detail}")


def _components(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    return {
        name: (str(value[0]), str(value[1]))
        for name, value in checkpoint.config.items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
    }


def _foreign(checkpoint: Checkpoint) -> str:
    """The first component of a pipeline whose module would be imported from elsewhere."""
    if not (checkpoint.folder / "model_index.json").is_file():
        return ""
    from diffusers import pipelines

    for name, (library, kind) in _components(checkpoint).items():
        if library.split(".")[0] not in LIBRARIES and not (library.isidentifier() and hasattr(pipelines, library)):
            return f"{name} is {library}.{kind}"
    return ""


def _module(library: str) -> Any:
    from diffusers import pipelines

    return getattr(pipelines, library) if hasattr(pipelines, library) else importlib.import_module(library)


def _ratio(vae: Any) -> int:
    """Pixels of an image's edge for one place of the latent's."""
    told = getattr(vae, "spatial_compression_ratio", None)
    return int(told) if told else 2 ** (len(vae.config.get("block_out_channels", [0] * 4)) - 1)
