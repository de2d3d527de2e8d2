"""A distribution that pip would have installed, made in a folder: files, metadata and entry points."""

from pathlib import Path


def fake_distribution(
    folder: Path, name: str, entry_points: dict[str, dict[str, str]], files: dict[str, str], version: str = "1.0"
) -> Path:
    """Write a distribution into `folder`; on PYTHONPATH it counts as installed."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = (
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
        for group, entries in entry_points.items()
    )
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    return folder
