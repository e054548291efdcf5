"""What `zimage` offers: a sorted list of names, each documented, and none loaded before it is used."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest

import zimage
import zimage.testing

HEAVY = ("torch", "numpy", "diffusers", "transformers", "PIL", "huggingface_hub", "tokenizers", "tqdm")


def test_names_are_sorted_unique_and_importable() -> None:
    assert list(zimage.__all__) == sorted(set(zimage.__all__), key=lambda name: (not name.isupper(), name))
    assert dir(zimage) == sorted(zimage.__all__)
    for name in zimage.__all__:
        assert getattr(zimage, name) is not None
    namespace: dict[str, Any] = {}
    exec("from zimage import *", namespace)
    assert set(zimage.__all__) <= set(namespace)


def test_every_lazy_name_is_public_and_where_it_says() -> None:
    assert set(zimage._HOMES) == set(zimage.__all__) - {"__version__"}
    for name, home in zimage._HOMES.items():
        value = getattr(zimage, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert (value.__module__, value.__name__) == (f"zimage.{home}", name)


def test_type_checkers_see_every_name() -> None:
    """The imports under `TYPE_CHECKING` are those that `__getattr__` makes."""
    module = ast.parse(inspect.getsource(zimage))
    (block,) = (node for node in module.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == zimage._HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'zimage' has no attribute 'StableDiffusion'"):
        zimage.StableDiffusion  # noqa: B018
    with pytest.raises(ImportError):
        exec("from zimage import StableDiffusion")


@pytest.mark.parametrize("name", [*zimage.__all__, "testing"])
def test_public_names_and_their_public_members_are_documented(name: str) -> None:
    value = getattr(zimage, name)
    if isinstance(value, str | dict):
        return
    assert len(inspect.getdoc(value) or "") > 20
    if inspect.isclass(value):
        members = {key: member for key, member in vars(value).items() if not key.startswith("_")}
        for key, member in members.items():
            if callable(member) or isinstance(member, property | classmethod):
                assert inspect.getdoc(getattr(value, key)), key


def test_every_error_is_of_the_one_tree() -> None:
    values = {name: getattr(zimage, name) for name in zimage.__all__}
    raised = {name for name, value in values.items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert raised - {"ZImageWarning"} == {
        "AdapterError",
        "Cancelled",
        "CheckpointError",
        "MissingExtra",
        "NonFiniteError",
        "NotEnoughMemory",
        "RequestError",
        "ZImageError",
    }
    assert all(issubclass(values[name], zimage.ZImageError) for name in raised - {"ZImageWarning"})
    assert issubclass(zimage.RequestError, ValueError)
    assert issubclass(zimage.MissingExtra, ImportError)
    assert issubclass(zimage.ZImageWarning, UserWarning)


def test_importing_loads_nothing_heavy(run_python: Callable[..., str]) -> None:
    code = f"""
import json, sys
import zimage
first = [name for name in {HEAVY} if name in sys.modules]
zimage.GenerationRequest("a fox", seed=1).resolve(zimage.VARIANTS["turbo"])
zimage.RequestError, zimage.__version__, dir(zimage)
print(json.dumps([first, [name for name in {HEAVY} if name in sys.modules]]))
"""
    assert json.loads(run_python(code)) == [[], []]


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert version("zimage-pipeline") == zimage.__version__
