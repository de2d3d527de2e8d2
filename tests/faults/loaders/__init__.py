"""Every loader of files that we own: one module a method, all of which are read here."""

import pkgutil
from importlib import import_module

from tests.faults.loaders.table import LOADERS, Loader

__all__ = ["LOADERS", "Loader"]

for module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")
