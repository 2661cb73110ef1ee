"""A user's own function, named as package.module:function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from gptfl_dist.errors import ModelError, first_line


def import_function(source: str, setting: str) -> Callable[..., Any]:
    """The function that `setting` of a file names. Raises ModelError where it cannot be imported."""
    module_name, _, function_name = source.partition(":")
    if not module_name or not function_name:
        raise ModelError(
            f"{setting} is {source!r}, expected package.module:function",
            hint="name a function of a module that Python can import, such as my_package.models:build",
        )
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # importing runs the user's module, which may raise anything
        raise ModelError(
            f"{setting} {source} cannot be imported: {type(error).__name__}: {first_line(error)}",
            hint="check the spelling, and that the module lies beside the file that names it, is installed, or its "
            "folder stands in PYTHONPATH",
        ) from error
    if not callable(function):
        raise ModelError(f"{setting} {source} is {type(function).__name__}, expected a function")
    return function  # type: ignore[no-any-return]  # callable, as was seen
