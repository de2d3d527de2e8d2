"""Files of a folder, and where what is made of each of them goes: a file of its own, which is none of those."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path


def files_in(folder: str | Path, suffixes: Sequence[str], *, argument: str) -> list[Path]:
    """Files of a folder and of those in it, also of those that are linked there, in order.

    Args:
        folder: where to look.
        suffixes: what their names end with, in small letters.
        argument: what an error calls the folder.

    Raises:
        ValueError: the folder is none, or is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise ValueError(f"{argument}: got {folder}, which {what}; wanted a folder")
    return sorted(path for path in _walked(folder, (folder.resolve(),)) if path.suffix.lower() in suffixes)


def targets(paths: Sequence[Path], folder: Path, output: Path, *, suffix: str, flat: bool) -> dict[Path, Path]:
    """A file for what is made of each image.

    Args:
        paths: of the images.
        folder: where they lie.
        output: where the new files go.
        suffix: of the new files.
        flat: all of them in one folder, with hyphens between the names of folders; otherwise in folders as the images.

    Raises:
        ValueError: two images would have the same file, or a file would replace an image.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        name = path.relative_to(folder).with_suffix(suffix)
        found[path] = output / ("-".join(name.parts) if flat else name)
    doubled = len(paths) - len(set(found.values()))
    if doubled:
        raise ValueError(f"images: {doubled} have the name of another one with another suffix or folder")
    # By what the system calls a file, not by name: links lead to images, too.
    images = {_identity(path) for path in paths if path.exists()}
    lost = [target for target in found.values() if target.exists() and _identity(target) in images]
    if lost:
        raise ValueError(
            f"output: got {output}, where {lost[0].name} would replace an image, and {len(lost) - 1} more would; "
            "wanted another folder"
        )
    return found


def linked(paths: Sequence[Path], folder: Path, *, first: int = 0) -> None:
    """Links to images in a folder, which is made, under numbers from `first` on."""
    folder.mkdir(exist_ok=True)
    for number, path in enumerate(paths, first):
        (folder / f"{number:06d}{path.suffix}").symlink_to(path.resolve())


def _walked(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            real = path.resolve()
            if real not in above:  # a link to a folder that holds it leads round for ever
                yield from _walked(path, (*above, real))
        elif path.is_file() or path.is_symlink():  # a link to nothing is named when it is opened
            yield path


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
