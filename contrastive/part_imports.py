"""Importing a module without all that its package imports.

`import open_clip` imports transformers' models and `import timm` a hundred families of networks:
seconds, in programs that use one module of each.
"""

import sys
import threading
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_lock = threading.RLock()


class _Unopened(ModuleType):
    """A package whose own code has not run. It runs where a name is asked for that no module of the
    package is, so to everybody else this is the package."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)  # Python itself looks at all modules for these
        with _lock:
            if type(self) is _Unopened and not self.__dict__.get("_opens"):
                self._opens = True
                spec = self.__spec__
                assert isinstance(spec, ModuleSpec)
                assert spec.loader is not None
                try:
                    spec.loader.exec_module(self)
                except BaseException:
                    self._opens = False
                    raise
                self.__class__ = ModuleType  # type: ignore[assignment]
            if name in self.__dict__:
                return self.__dict__[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def import_alone(name: str) -> Any:
    """The module `name`; packages around it that nobody has imported yet are not run for it, but
    when somebody uses them."""
    around = name.split(".")[:-1]
    with _lock:
        for depth in range(1, len(around) + 1):
            package = ".".join(around[:depth])
            if package not in sys.modules and (spec := find_spec(package)) is not None:
                module = module_from_spec(spec)
                module.__class__ = _Unopened
                sys.modules[package] = module
                parent, _, own = package.rpartition(".")
                if parent:
                    setattr(sys.modules[parent], own, module)
                if find_spec(f"{package}.version") is not None:  # which its own modules ask it for
                    version = import_module(f"{package}.version").__version__
                    setattr(module, "__version__", version)  # noqa: B010
    return import_module(name)


def timm_model(name: str, **args: Any) -> Any:
    """`timm.create_model`; of plain ViTs without importing all other families, of which one imports
    torch's compiler, as torchvision's operators do."""
    for module in ("torchvision.ops.misc", "torchvision.models.feature_extraction"):
        import_alone(module)
    import_module("torchvision.transforms")
    if hasattr(import_alone("timm.models.vision_transformer"), name):
        return import_alone("timm.models._factory").create_model(name, **args)
    return import_module("timm").create_model(name, **args)
