"""The oldest versions that are asked for go together: none is below what diffusers itself needs."""

from __future__ import annotations

import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {canonicalize_name(one.name): one.specifier for one in map(Requirement, PROJECT["dependencies"])}
DIFFUSERS = metadata("diffusers")
THEIRS = {canonicalize_name(one.name): one for one in map(Requirement, DIFFUSERS.get_all("Requires-Dist") or ())}


def least(specifiers: SpecifierSet) -> str:
    (version,) = (one.version for one in specifiers if one.operator == ">=")
    return version


def test_python() -> None:
    assert least(SpecifierSet(PROJECT["requires-python"])) in SpecifierSet(DIFFUSERS["Requires-Python"])


@pytest.mark.parametrize("library", ["huggingface-hub", "safetensors", "numpy", "pillow"])
def test_a_library(library: str) -> None:
    assert least(OURS[library]) in THEIRS[library].specifier
