"""The user's code: functions that make a network, the modules that travel with it, and hashes of their source."""

from __future__ import annotations

import hashlib
import importlib
import io
import sys
import tokenize
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from ray_sampler.errors import RequestError, printable, require
from ray_sampler.networks.family import PREFIX
from ray_sampler.networks.source_text import SKIPPED, tokens

PACKAGE = Path(__file__).resolve().parents[1]
MAIN_MODULE = "__main__"
"""Of a script or a notebook, what is defined there travels by value by itself."""


def function_of(name: str) -> Callable[..., Any]:
    """The function `module:function`, of a module that is imported where it is not yet.

    Raises:
        RequestError: there is no such module or function, or its import fails.
    """
    shown = f"--model is {PREFIX}{printable(name)}"
    module_name, separator, function_name = name.partition(":")
    require(
        bool(module_name and separator and function_name.isidentifier()),
        f"{shown}; it must be of the form python:package.module:function",
    )
    meant = module_name.removesuffix(".py").replace("/", ".")
    require(meant == module_name, f"{shown}, a file; give its module: {PREFIX}{meant}:{function_name}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise RequestError(f"{shown}; importing it failed: {brief(error)}") from error
        raise RequestError(
            f"{shown}; there is no module {module_name!r} in the current directory or on PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:
        raise RequestError(f"{shown}; importing it failed: {brief(error)}") from error
    function = getattr(module, function_name, None)
    found = f"; {function_name} is a {type(function).__name__}: define a function that returns a Model"
    require(
        callable(function),
        f"{shown}; module {module_name!r} has no function {function_name!r}{found * (function is not None)}",
    )
    return cast(Callable[..., Any], function)


def brief(error: BaseException, place: str = "") -> str:
    """An exception in one line, with the file and line of the user's code where it came up, else with `place`."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    frames = [f for f in frames if PACKAGE not in Path(f.filename).resolve().parents]
    own = [f for f in frames if not installed(Path(f.filename))] or (frames if not place else [])
    if isinstance(error, SyntaxError) and error.filename:
        where = f" ({error.filename}, line {error.lineno})"
    else:
        where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else place
    message = printable(" ".join(str(error).split()))
    return f"{type(error).__name__}: {message}{where}" if message else f"{type(error).__name__}{where}"


def companions(module: ModuleType) -> tuple[str, ...]:
    """The module, and those of its package or folder that are loaded: they travel by value to nodes that lack them.

    Its folder is where its outermost package is found; of a notebook, the current directory.
    """
    package = module.__name__.partition(".")[0]
    file = Path(getattr(module, "__file__", None) or "notebook").resolve()
    folder = file.parents[module.__name__.count(".") + hasattr(module, "__path__")]
    names = []
    for name, loaded in list(sys.modules.items()):
        if not isinstance(loaded, ModuleType) or name.partition(".")[0] in ("ray_sampler", MAIN_MODULE):
            continue
        path = Path(getattr(loaded, "__file__", None) or "")
        beside = path.is_absolute() and not installed(path) and folder in path.resolve().parents
        if name == package or name.startswith(package + ".") or beside:
            names.append(name)
    return tuple(names)


def installed(file: Path) -> bool:
    """Whether a module came with Python or a package manager, by its path or that to which links lead."""
    return _among_packages(file) or _among_packages(file.resolve())


def _among_packages(file: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & {*file.parts}) or file.is_relative_to(sys.base_prefix)


def travelling(home: str | None, objects: Iterable[Any]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Modules that travel by value with a network, and hashes of their source by file.

    Args:
        home: the module of its function, where that was named.
        objects: the function, classes of the network, and what else of the user's code it is sampled with.
    """
    objects = list(objects)
    homes = dict.fromkeys([home, *(getattr(each, "__module__", None) for each in objects)])
    modules = [sys.modules[name] for name in homes if name in sys.modules and name.partition(".")[0] != "ray_sampler"]
    files = [Path(getattr(module, "__file__", None) or "") for module in modules]
    users = [
        module
        for module, file in zip(modules, files, strict=True)
        if module.__name__ in (home, MAIN_MODULE) or (file.is_absolute() and not installed(file))
    ]
    names = dict.fromkeys(name for module in users for name in companions(module))
    return tuple(names), source_hashes(names, objects)


def source_hashes(modules: Iterable[str], objects: Iterable[Any]) -> dict[str, str]:
    """Hashes of the source of modules, by file below the folder in which their outermost package is.

    Args:
        objects: classes and functions, of which those of a script or notebook are hashed by themselves, with what they
            name there: other lines of it, as those that ask for more samples, may change.
    """
    result = {}
    for name in modules:
        if file := getattr(sys.modules[name], "__file__", None):  # a folder without __init__.py has none
            parts = Path(file).parts[-1 - name.count(".") - hasattr(sys.modules[name], "__path__") :]
            result["/".join(parts)] = token_hash(Path(file).read_bytes())
    if found := defined_here(objects):
        file = Path(getattr(sys.modules[MAIN_MODULE], "__file__", None) or MAIN_MODULE).name
        result[file] = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]
    return result


def defined_here(objects: Iterable[Any]) -> dict[str, str]:
    """What code does that a script or notebook defines, by name: of classes and functions, and of all that they name
    there. Its compiled form is taken, as a notebook's cells lie in no file.
    """
    here, found = vars(sys.modules[MAIN_MODULE]), dict[str, str]()
    todo = list(objects)
    for item in todo:  # which grows
        name = getattr(item, "__qualname__", "")
        if name in found or getattr(item, "__module__", None) != MAIN_MODULE:
            continue
        members = [*vars(item).values(), *item.__bases__] if isinstance(item, type) else [item]
        todo += members
        codes = [getattr(getattr(member, "__func__", member), "__code__", None) for member in members]
        read: list[Any] = []
        for code in codes:  # which grows
            if code:
                codes += [constant for constant in code.co_consts if hasattr(constant, "co_code")]
                plain = [constant for constant in code.co_consts if not hasattr(constant, "co_code")]
                read.append((code.co_code, code.co_names, plain))
                todo += [here.get(each) for each in code.co_names]
        values = {each: here.get(each) for _, names, _ in read for each in names}
        found[name] = repr((read, [(each, v) for each, v in values.items() if isinstance(v, int | float | str)]))
    return found


def token_hash(source: bytes) -> str:
    """Of Python source, without its comments and layout: 16 hexadecimal digits. Of another file its bytes."""
    try:
        text = source.decode(tokenize.detect_encoding(io.BytesIO(source).readline)[0])
        skipped = {*SKIPPED, tokenize.NEWLINE}
        source = " ".join(string for kind, string in tokens(text) if kind not in skipped).encode()
    except (tokenize.TokenError, SyntaxError, UnicodeError):
        pass
    return hashlib.sha256(source).hexdigest()[:16]
