"""What a library holds that a plugin could change: what its modules and classes name, and what its registries hold.

No list of registries is kept here, which would know only some: every module of the library that is loaded is looked
through, to a depth of three: a module's registry, an object's dict, and what that holds.
"""

import sys
from types import ModuleType

DEPTH = 3
GONE = object()


def state(library):
    """Everything by its place, such as ("transformers.quantizers.auto", "AUTO_QUANTIZER_MAPPING", "awq")."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == library and module is not None:
            for attribute, value in list(vars(module).items()):
                _look(found, (name, attribute), value, DEPTH - 1)
    return found


def changes(before, after):
    """The places of what is another object than it was, is new or is gone; that a module was imported is no change."""
    loaded = {place[0] for place in before}
    places = [place for place in {**before, **after} if place[0] in loaded]
    return [place for place in places if before.get(place, GONE) is not after.get(place, GONE)]


def _look(found, place, value, depth):
    if isinstance(value, ModuleType):
        return
    found[place] = value
    if depth:
        for key, part in _parts(place, value):
            _look(found, (*place, key), part, depth - 1)


def _parts(place, value):
    if isinstance(value, dict):
        return [(str(key), part) for key, part in list(dict.items(value))]
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if isinstance(value, (set, frozenset)):
        return [(str(part), part) for part in list(value)]
    if isinstance(value, type):
        return list(vars(value).items()) if value.__module__ == place[0] else []  # once, where it is at home
    library, kind = place[0].partition(".")[0], type(value).__module__
    return list(getattr(value, "__dict__", {}).items()) if kind.partition(".")[0] == library else []
