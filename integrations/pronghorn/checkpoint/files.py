"""The files of a checkpoint's folder: no code, no pickle, nothing outside of it, all of it what its name says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pronghorn.checkpoint import CONFIGS, Checkpoint, Finding, failed, ok
from pronghorn.files.json_files import parse_json

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".keras", ".msgpack"}
CODE = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".bat", ".exe", ".jar", ".whl"}
NAMES_CODE = ("auto_map", "custom_pipelines", "custom_pipeline")
CHOOSES_KERNELS = ("_implementation", "_implementation_internal")
STUBS = {
    b"version https://git-lfs": "a pointer of Git LFS in place of the file",
    b"<!doctype html": "a web page in place of the file",
    b"<html": "a web page in place of the file",
}
HUBS_RECORDS = Path(".cache/huggingface")  # of `hf download --local-dir`, whose locks are empty files
MAY_BE_EMPTY = ("merges.txt", ".gitkeep", ".gitattributes")
MAX_JSON_BYTES = 256 << 20  # the largest tokenizers have about 40 MB


def check_files(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What can be said of a folder's files without a library that would load them."""
    folder = checkpoint.folder
    files = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    names = [path.relative_to(folder).as_posix() for path in files]
    yield _result(
        "configuration", [] if any(name in names for name in CONFIGS) else [f"{folder}: no {' and no '.join(CONFIGS)}"],
        "give the folder that save_pretrained wrote", next((name for name in CONFIGS if name in names), ""),
    )  # fmt: skip
    yield _result(
        "no links out of the folder", [why for path in files if (why := _leads_out(path, folder))],
        "replace the link by a copy of the file", f"{len(files)} files",
    )  # fmt: skip
    inside = [path for path in files if not _leads_out(path, folder)]
    yield _result(
        "no pickles", [str(path.relative_to(folder)) for path in inside if path.suffix.lower() in PICKLES],
        "save the weights as safetensors (save_pretrained does), and remove the file: reading it can run code",
    )  # fmt: skip
    yield _result(
        "no code", [str(path.relative_to(folder)) for path in inside if path.suffix.lower() in CODE],
        "remove it: a checkpoint that brings its own code is loaded only by those who trust it with their machine",
    )  # fmt: skip
    yield _result(
        "whole files", [f"{path.relative_to(folder)}: {why}" for path in inside if (why := _stub(path, folder))],
        "fetch the file itself, as with `git lfs pull` or `hf download`", f"{_size(inside)} in {len(inside)} files",
    )  # fmt: skip
    yield from _check_json([path for path in inside if path.suffix == ".json" and path.is_file()], folder)


def read_json(path: Path) -> Any:
    """A JSON file of a size that some checkpoint has; see `parse_json`.

    Raises:
        ValueError: it is larger, or not what `parse_json` takes.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name}: {path.stat().st_size} bytes, wanted at most {MAX_JSON_BYTES}")
    return parse_json(path.read_bytes(), path.name)


def _check_json(files: list[Path], folder: Path) -> Iterator[Finding]:
    wrong, codes = [], []
    for path in files:
        try:
            codes += [f"{path.relative_to(folder)}: {name}" for name in _naming_code(read_json(path))]
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    yield _result(
        "JSON", wrong, "write the file again from its source; Python's json.dumps(allow_nan=False) tells where",
        f"{len(files)} files",
    )  # fmt: skip
    yield _result(
        "no configuration names code", codes,
        "remove the entry: what it names would be imported and run; Pronghorn never sets trust_remote_code",
    )  # fmt: skip


def _naming_code(content: Any) -> list[str]:
    found, waiting = [], [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found += [name for name in NAMES_CODE if value.get(name)]
            # A path there is a repository of the Hub, whose kernels are fetched and run.
            found += [name for name in value if name.endswith(CHOOSES_KERNELS) and "/" in str(value[name])]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found


def _leads_out(path: Path, folder: Path) -> str:
    """Where a link leads that leaves the folder; the Hub's cache, whose snapshots are links to its blobs, is one."""
    if not path.is_symlink():
        return ""
    target = path.resolve()
    home = folder.resolve()
    allowed = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if any(target.is_relative_to(root) for root in allowed) and target.is_file():
        return ""
    return f"{path.relative_to(folder)} -> {path.readlink()}"


def _stub(path: Path, folder: Path) -> str:
    if not path.is_file():
        return "a pipe, socket or device in place of the file"  # which may never end, or not even begin
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not start:
        may_be = path.name in MAY_BE_EMPTY or folder / HUBS_RECORDS in path.parents
        return "" if may_be else "it is empty"
    return next((what for mark, what in STUBS.items() if start.startswith(mark)), "")


def _size(files: list[Path]) -> str:
    return f"{sum(path.stat().st_size for path in files) / 2**20:.1f} MiB"


def _result(name: str, wrong: list[str], remedy: str, detail: str = "") -> Finding:
    if not wrong:
        return ok(name, detail)
    rest = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return failed(name, f"{'; '.join(wrong[:3])}{rest}", remedy)
