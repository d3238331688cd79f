"""Runs at every interpreter start and makes stock nnU-Net find our classes.

nnU-Net asks one function for nearly every class it takes by name: ``recursive_find_python_class(folder, class_name,
current_module, ...)``. `install` waits for the module that holds it and puts our registry in front. Until nnU-Net is
imported this costs one entry on ``sys.meta_path``; the standard library is all it needs. Whatever goes wrong on our
side is told in one line on stderr and leaves nnU-Net as it is. ``NNSSL_EXT_DISABLE=1`` switches everything off.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # `typing` itself would cost every interpreter start several milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

LOOKUP_MODULE = "nnunetv2.utilities.find_class_by_name"
LOOKUP = "recursive_find_python_class"
PARAMETERS = ("folder", "class_name", "current_module")  # what nnU-Net 2.8.1's function takes first
FINGERPRINT = "DatasetFingerprintExtractor"  # what stock planning asks for first
DISABLE = "NNSSL_EXT_DISABLE"


def install() -> None:
    """Hook nnU-Net's lookup now if it is loaded (a running notebook), else when it is imported. Twice does no harm."""
    if disabled() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    if LOOKUP_MODULE in sys.modules:
        stock = _hook(sys.modules[LOOKUP_MODULE])
        if stock is not None:
            _rebind(stock, getattr(sys.modules[LOOKUP_MODULE], LOOKUP))


def disabled() -> bool:
    """Whether the off-switch is set."""
    return os.environ.get(DISABLE, "0") not in ("", "0")


class _Finder:
    """Finds `LOOKUP_MODULE` with the other finders and hooks the module once it has executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != LOOKUP_MODULE:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find and not isinstance(finder, _Finder) else None
            if spec is not None:
                _hook_after_execution(spec.loader)
                return spec
        return None


def _hook_after_execution(loader: Any) -> None:
    try:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _hook(module)

        loader.exec_module = exec_module
    except AttributeError as error:
        _tell(f"cannot hook {LOOKUP_MODULE} ({error!r})")


def _hook(module: ModuleType) -> Callable[..., Any] | None:
    """Put our registry in front of the module's lookup function; returns the stock function, None if left alone."""
    import functools

    try:
        stock = getattr(module, LOOKUP)
        found = stock.__code__.co_varnames[: len(PARAMETERS)]
        if found != PARAMETERS:
            raise TypeError(f"{LOOKUP} takes {found}, not {PARAMETERS}")
    except (AttributeError, TypeError) as error:
        _tell(f"this nnU-Net has another class lookup ({error!r}); run nnssl_doctor")
        return None

    @functools.wraps(stock)
    def lookup(folder: str, class_name: str, current_module: str | None, *rest: Any, **options: Any) -> Any:
        ours = _registry().get((current_module, class_name))
        if ours is not None:
            import importlib

            module_name, attribute = ours.split(":")
            return getattr(importlib.import_module(module_name), attribute)  # its own error is the user's answer
        if class_name == FINGERPRINT and any(word.startswith("nnsslPlanner") for word in sys.argv):
            _refuse_image_only()
        found = stock(folder, class_name, current_module, *rest, **options)
        if found is None:
            _suggest(current_module, class_name)
        return found

    setattr(module, LOOKUP, lookup)
    return stock


def _rebind(stock: Callable[..., Any], lookup: Callable[..., Any]) -> None:
    """Replace the copies of `stock` that loaded nnU-Net modules imported by name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("nnunetv2.") and getattr(module, LOOKUP, None) is stock:
            setattr(module, LOOKUP, lookup)


def _registry() -> dict[tuple[str | None, str], str]:
    try:
        from nnssl_ext.nnunet_plugin.registry import registry

        return registry()
    except Exception as error:  # noqa: BLE001 - a defect of ours, whatever it is, must not stop stock nnU-Net
        _tell(f"its registry is broken ({error!r})")
        return {}


def _refuse_image_only() -> None:
    """Say what to do about a dataset without labels, which nnU-Net's fingerprint would answer with a reader's traceback."""
    import importlib

    from nnssl_ext.errors import NnsslError

    try:
        importlib.import_module("nnssl_ext.planners.raw_dataset").require_labels_of_command(sys.argv)
    except NnsslError as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # noqa: BLE001 - stock nnU-Net then fails or works as it always did
        _tell(f"cannot check for labels ({error!r})")


def _suggest(current_module: str | None, class_name: str) -> None:
    """Answer a misspelt name of ours, which nnU-Net would answer with ``'NoneType' object is not callable``."""
    names = [name for where, name in _registry() if where == current_module]
    if names and class_name.startswith("nnssl"):
        from nnssl_ext.errors import unknown_name

        print(f"nnssl_ext: {unknown_name('class', class_name, names)}", file=sys.stderr)


_told: set[str] = set()


def _tell(problem: str) -> None:
    """One line per problem and process."""
    if problem not in _told:
        _told.add(problem)
        print(f"nnssl_ext: {problem}; nnU-Net continues without our classes", file=sys.stderr)
