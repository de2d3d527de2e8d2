"""`pronghorn new`: a small method with all its rooms, which works, to be filled with another one."""

from __future__ import annotations

import builtins
import importlib.util
import keyword
import re
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from pronghorn.cli import own_commands
from pronghorn.methods import ECOSYSTEMS, installed_methods

TORCH = "torch"  # what is imported by itself, and ships to no ecosystem
REGISTERED = ("transformers", "vllm", "lerobot")  # where a method is found by name; others import what they use
TOY, TITLE = "toyscale", "Toyscale"  # what templates call the method
SUFFIX = ".in"


def write_method(name: str, ecosystem: str, into: Path) -> list[Path]:
    """Write a method, into a clone of Pronghorn or as a distribution of its own in `into/pronghorn-NAME`.

    Args:
        name: of the method and its package, `pronghorn.NAME`: small letters and digits, single underscores between.
        ecosystem: one of `ECOSYSTEMS`, or "torch".
        into: a clone, or any folder.

    Returns:
        The files that were written, and the two that were edited where it is a clone.

    Raises:
        ValueError: the name or ecosystem cannot be, or the clone's own files have another shape than was expected.
        FileExistsError: one of the files is there.
    """
    _check(name, ecosystem)
    clone = is_clone(into)
    contents = dict(_clone_files(name, ecosystem) if clone else _distribution_files(name, ecosystem))
    folder = into if clone else into / f"pronghorn-{name}"
    taken = [folder / path for path in contents if (folder / path).exists()]
    if taken:
        raise FileExistsError(f"{taken[0]} exists; choose another name, or remove it")
    edited = _edits(folder, name, ecosystem) if clone else {}
    for path, content in {**contents, **edited}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    return [folder / path for path in (*contents, *edited)]


def is_clone(folder: Path) -> bool:
    """Whether a folder is a clone of Pronghorn."""
    project = folder / "pyproject.toml"
    if not (folder / "plugins" / "pronghorn").is_dir() or not project.is_file():
        return False
    return bool(tomllib.loads(project.read_text()).get("project", {}).get("name") == "pronghorn")


def _check(name: str, ecosystem: str) -> None:
    if ecosystem not in (*ECOSYSTEMS, TORCH):
        raise ValueError(f"ecosystem: got {ecosystem!r}, accepted are {', '.join((*ECOSYSTEMS, TORCH))}")
    if not re.fullmatch(r"[a-z](_?[a-z0-9])*", name):
        raise ValueError(
            f"name: got {name!r}, wanted small letters and digits, with single underscores between, such as {TOY!r}"
        )
    if name in own_commands():
        raise ValueError(f"name: got {name!r}, but that is a command of Pronghorn's own; choose another")
    if keyword.iskeyword(name) or hasattr(builtins, name):
        raise ValueError(f"name: got {name!r}, but that is Python's own; choose another")
    library = importlib.util.find_spec(name)
    if library is not None and library.origin is not None:  # any folder has a spec, but without an origin
        raise ValueError(
            f"name: got {name!r}, but that is a library, which benchmarks/{name}.py would hide from others"
        )
    if name in installed_methods() or importlib.util.find_spec(f"pronghorn.{name}") is not None:
        raise ValueError(f"name: got {name!r}, but pronghorn.{name} exists")


def _rooms(name: str, ecosystem: str) -> Iterator[tuple[str, str]]:
    for room in ("__init__", "config", "layers", "contract", "cli", *([] if ecosystem == TORCH else [ecosystem])):
        yield f"{room}.py", _filled("rooms", f"{room}.py", name)


def _clone_files(name: str, ecosystem: str) -> Iterator[tuple[str, str]]:
    for room, content in _rooms(name, ecosystem):
        yield f"plugins/pronghorn/{name}/{room}", content
    tests = f"tests/plugins/{name}"
    yield f"{tests}/test_{name}.py", _filled("tests", f"{TOY}.py", name)
    if ecosystem != TORCH:
        # LeRobot's tests run in an environment of their own, by folder.
        room = f"lerobot/test_{name}_lerobot" if ecosystem == "lerobot" else f"test_{ecosystem}"
        yield f"{tests}/{room}.py", _filled("tests", f"{ecosystem}.py", name)
    yield f"docs/methods/{name}.md", _filled("", "page.md", name)
    yield f"benchmarks/{name}.py", _filled("", "benchmark.py", name)


def _distribution_files(name: str, ecosystem: str) -> Iterator[tuple[str, str]]:
    project = _filled("", "pyproject.toml", name)
    if ecosystem == TORCH:
        project = project.replace("pronghorn[ecosystem]", "pronghorn")
    if ecosystem not in REGISTERED:
        project = re.sub(r'\[project.entry-points."pronghorn.ecosystem"\]\n.*\n\n', "", project)
    yield "pyproject.toml", re.sub(r"(?<=[\[.])ecosystem\b", ecosystem, project)
    for room, content in _rooms(name, ecosystem):
        yield f"src/pronghorn/{name}/{room}", content
    yield f"tests/test_{name}.py", _filled("tests", f"{TOY}.py", name)
    if ecosystem != TORCH:
        yield f"tests/test_{ecosystem}.py", _filled("tests", f"{ecosystem}.py", name)
    yield "README.md", _filled("", "page.md", name)
    benchmark = _filled("", "benchmark.py", name)
    # Of a clone's harness, the part that is installed.
    yield f"benchmarks/{name}.py", re.sub(r"from harness( import .*\n)\n", r"\nfrom pronghorn.measurement\1", benchmark)


def _filled(folder: str, template: str, name: str) -> str:
    root: Traversable = files("pronghorn.cli") / "template"
    text = (root / folder / f"{template}{SUFFIX}" if folder else root / f"{template}{SUFFIX}").read_text()
    return text.replace(TOY, name).replace(TITLE, title(name))


def title(name: str) -> str:
    """A method's name as classes begin with it: `my_method` is MyMethod."""
    return "".join(part.capitalize() for part in name.split("_"))


def _edits(clone: Path, name: str, ecosystem: str) -> dict[str, str]:
    """The two files that know of methods: entry points and the direction of imports, and the docs' navigation."""
    project = (clone / "pyproject.toml").read_text()
    rooms = {"cli": "cli:app", "contract": "contract:contract"}
    if ecosystem in REGISTERED:
        rooms[ecosystem] = f"{ecosystem}:register"
    for group, room in rooms.items():
        header = f'[project.entry-points."pronghorn.{group}"]\n'
        project = _inserted(project, re.escape(header) + r"(?:\w+ = .*\n)+", f'{name} = "pronghorn.{name}.{room}"\n')
    imports = r"(?:forbidden_modules|ancestors) = \[(?:[^\]\n]|\n)*pronghorn\.[a-z0-9_]+\"(?=,?\n?\])"
    project, count = re.subn(
        imports, lambda found: f'{found[0]}, "pronghorn.{name}"' if _lists_methods(found[0]) else found[0], project
    )
    if not count:
        raise ValueError("pyproject.toml: the lists of import-linter were not found")
    navigation = (clone / "mkdocs.yml").read_text()
    pages = r"(?: +- .*: methods/.*\.md\n)+"
    return {
        "pyproject.toml": project,
        "mkdocs.yml": _inserted(navigation, pages, f"      - {title(name)}: methods/{name}.md\n"),
    }


def _lists_methods(modules: str) -> bool:
    return any(f'"pronghorn.{method}"' in modules for method in installed_methods())


def _inserted(text: str, after: str, line: str) -> str:
    found = re.search(after, text)
    if found is None:
        raise ValueError(f"no place was found for {line.strip()!r}: the file has another shape than was expected")
    return text[: found.end()] + line + text[found.end() :]
