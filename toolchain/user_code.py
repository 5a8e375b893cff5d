"""Functions of the user's own, named as `module:function`."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import DataError


def function_at(place: str, option: str) -> Callable[..., Any]:
    """The function at `module:function`; modules are found in the working folder too.

    Raises:
        DataError: there is none, or its module fails while it is imported.
    """
    module_name, _, function_name = place.partition(":")
    with users_code(f"{option} {place}"):
        function = getattr(importlib.import_module(module_name), function_name)
        if not callable(function):
            raise TypeError(f"{function_name!r} is no function")
        return function


@contextmanager
def users_code(where: str) -> Iterator[None]:
    """Where the user's own code runs: it may import from the working folder, and whatever it raises is a DataError that says where."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    except (Exception, SystemExit) as error:  # anything may be raised there; a script ends itself
        raise DataError(f"{where}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
