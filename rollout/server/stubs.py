"""Import-only stand-ins for triton and torchvision, on machines without CUDA.

SGLang imports both unconditionally and uses neither with device=cpu. A stand-in lets a module be
imported and a kernel be *defined*; launching a kernel raises. Whatever is really installed wins:
the finder is appended to sys.meta_path and takes only names that nobody else has.

Delete when SGLang's own imports are optional (0.5.23 needs this).
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

STUBBED = ("triton", "torchvision")


class _Placeholder:
    """What a stub module's attributes are: can be subclassed, annotated with, subscripted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass

    def __class_getitem__(cls, item: Any) -> type:
        return cls


class _Kernel:
    """A decorated kernel: keeps its name, refuses to run."""

    def __init__(self, function: Callable) -> None:
        self.fn = function
        self.__name__ = getattr(function, "__name__", "kernel")

    def __getitem__(self, grid: Any) -> NoReturn:
        raise RuntimeError(
            f"triton kernel {self.__name__} was launched, but triton is not installed here"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.__getitem__(None)


def _jit(*args: Any, **kwargs: Any) -> Any:
    """triton.jit, autotune, heuristics: with or without arguments, in any stacking."""
    if len(args) == 1 and callable(args[0]) and not kwargs:
        return args[0] if isinstance(args[0], _Kernel) else _Kernel(args[0])
    return lambda function: function if isinstance(function, _Kernel) else _Kernel(function)


class _StubModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (_Placeholder,), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "triton":
            functions: dict[str, Any] = {
                "__version__": "0.0.0+stub",
                "jit": _jit,
                "autotune": _jit,
                "heuristics": _jit,
                "cdiv": lambda a, b: -(a // -b),
                "next_power_of_2": lambda n: 1 << (n - 1).bit_length() if n > 0 else 1,
            }
            for name, value in functions.items():
                setattr(module, name, value)


def install() -> list[str]:
    """Install stand-ins for what is missing, before the first import of sglang; tells which."""
    if any(isinstance(finder, _StubFinder) for finder in sys.meta_path):
        return []
    missing = {name for name in STUBBED if importlib.util.find_spec(name) is None}
    if missing:
        _settle_feature_checks()
        sys.meta_path.append(_StubFinder(missing))
    return sorted(missing)


def _settle_feature_checks() -> None:
    """Let torch and transformers find and remember that these packages are absent."""
    import torch._inductor.runtime.triton_compat  # noqa: F401  (decides at import)
    import torch.utils._triton as triton_checks
    import transformers.utils.import_utils as transformers_checks

    triton_checks.has_triton_package()
    triton_checks.get_triton_version()
    transformers_checks.is_torchvision_available()
    transformers_checks.is_torchvision_v2_available()
