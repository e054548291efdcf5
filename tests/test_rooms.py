"""The order of the rooms: a module imports from its own room and from those below it, and reads in one sitting.

Read from the syntax trees of `src/zimage`, imports inside functions and under `TYPE_CHECKING` included.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import zimage

SOURCE = Path(zimage.__file__).parent
ROOMS: tuple[tuple[str, ...], ...] = (
    (
        "arrays",
        "errors",
        "editing",
        "equality",
        "hires",
        "variants",
        "rules",
        "own",
        "request",
        "caching",
        "_version",
        "memory.pages",
        "memory.pairs",
        "memory.peaks",
        "memory.plan",
        "memory.planner",
        "memory.sizes",
    ),
    (
        "sampling",
        "kernels",
        "models",
        "memory.copiers",
        "memory.ladder",
        "memory.meter",
        "memory.ring",
        "memory.streams",
    ),
    ("checkpoint", "files", "prompts", "adapters", "memory.budget", "memory.residency"),
    (
        "runtime",
        "components",
        "canvas",
        "denoiser",
        "legs",
        "pairing",
        "relay",
        "callbacks",
        "calls",
        "many",
        "output",
        "parts",
        "pipeline",
        "placed",
        "previews",
        "recorded",
        "starting",
        "turns",
        "adapted",
        "controlled",
    ),
    ("cli", "testing", "server", "distributed", "training", "demo", "bench"),
)
ALSO = {"cli": {"bench"}, "bench": {"testing"}}
"""What parts of the top room need of each other: a command is made of the bench, and the bench of random weights."""
FACADE = ("", "__main__")
"""The package itself, which knows where every public name is, and `python -m zimage`."""
SPLIT = ("memory",)
"""Packages whose modules are in different rooms; they themselves hold nothing."""
OPEN_TO_APPS = (
    "",
    "_version",
    "adapters.controlnet",
    "bench",
    "checkpoint.convert",
    "checkpoint.identify",
    "checkpoint.inspect",
    "checkpoint.locate",
    "checkpoint.sizes",
    "editing",
    "errors",
    "files",
    "hires",
    "memory",
    "pipeline",
    "prompts",
    "request",
    "rules",
    "runtime",
    "sampling",
    "variants",
)
"""What the rooms above the pipeline may use: public names, and the plain functions that those are made of."""
LOWEST = [module for module in ROOMS[0] if module != "memory.plan" or (SOURCE / "memory" / "plan.py").exists()]
MAX_LINES = 350
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(file: Path) -> str:
    """`checkpoint.load` for `src/zimage/checkpoint/load.py`, "" for the package itself."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def room(module: str) -> int:
    if module in SPLIT:
        return 0
    for number, names in enumerate(ROOMS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    raise AssertionError(f"{module} belongs to no room: add it to ROOMS and to the design")


def imports(module: str, *, at_import: bool = False) -> Iterator[str]:
    """Modules of zimage and others that `module` imports; `at_import` leaves out functions and `TYPE_CHECKING`."""
    is_package = f"{module}." in "".join(f"{name} " for name in MODULES) or module in ("", *packages())
    package = module.split(".") if is_package and module else module.split(".")[:-1]
    for node in walk(MODULES[module], at_import):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            target = ".".join(filter(None, base))
            for alias in node.names:
                inner = f"{target}.{alias.name}".strip(".")
                yield f"zimage.{inner if inner in MODULES else target}".rstrip(".")


def packages() -> set[str]:
    return {name_of(file) for file in FILES if file.name == "__init__.py"}


def walk(node: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        skipped = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if at_import and (skipped or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))):
            continue
        yield child
        yield from walk(child, at_import)


def own(names: Iterator[str]) -> set[str]:
    """The modules of zimage among them, without "zimage."."""
    return {name.removeprefix("zimage").lstrip(".") for name in names if name.split(".")[0] == "zimage"}


@pytest.mark.parametrize("module", [module for module in MODULES if module not in FACADE])
def test_a_module_imports_from_its_own_room_and_lower_ones(module: str) -> None:
    number = room(module)
    for imported in own(imports(module)) - {module}:
        if imported == "":
            assert number == 4, f"{module} imports the whole package"
        else:
            assert room(imported) <= number, f"{module} (room {number}) imports {imported} (room {room(imported)})"


def test_nobody_imports_what_is_above() -> None:
    """The top room is for users: no other module needs it, and its parts do not need each other, but for `ALSO`."""
    for module in MODULES:
        part = module.split(".")[0]
        for imported in own(imports(module)) - {"", module}:
            if module not in FACADE and room(imported) == 4:
                assert imported.split(".")[0] in {part, *ALSO.get(part, ())}, f"{module} imports {imported}"
            assert imported.split(".")[0] != "testing" or part in ("testing", "bench")


@pytest.mark.parametrize("module", [module for module in MODULES if module.split(".")[0] == "cli"])
def test_the_command_line_uses_what_apps_can_use(module: str) -> None:
    for imported in own(imports(module)):
        inside = imported.split(".")[0] == "cli"
        assert inside or any(imported == name or (name and imported.startswith(f"{name}.")) for name in OPEN_TO_APPS)


def test_imports_go_in_no_circle() -> None:
    """At import time; a cycle would make the order in which a user imports modules matter."""
    graph = {module: own(imports(module, at_import=True)) - {module, ""} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join([*path, module])
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
    assert done == set(MODULES)


@pytest.mark.parametrize("module", LOWEST)
def test_plain_data_and_rules_need_no_torch(module: str) -> None:
    needed = {name.split(".")[0] for name in imports(module, at_import=True)}
    assert needed <= {"zimage", *STANDARD}, needed


STANDARD = {
    "__future__", "bisect", "collections", "dataclasses", "enum", "functools", "itertools", "math", "numbers",
    "operator", "re", "secrets", "types", "typing",
}  # fmt: skip


def test_plain_data_and_rules_load_no_torch(run_python: Callable[..., str]) -> None:
    code = f"""
import json, sys
from importlib import import_module
for module in {LOWEST!r}:
    import_module("zimage." + module)
print(json.dumps(sorted(name for name in sys.modules if name.split(".")[0] in ("torch", "numpy", "PIL", "diffusers"))))
"""
    assert json.loads(run_python(code)) == []


@pytest.mark.parametrize("file", FILES, ids=[name_of(file) or "zimage" for file in FILES])
def test_a_file_reads_in_one_sitting(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert (ast.get_docstring(MODULES[name_of(file)]) or "")[:1].strip()
    assert text.count("\n") <= MAX_LINES
    assert file.stem not in ("utils", "util", "helpers", "helper", "common", "misc")


def test_the_imports_are_found() -> None:
    """Of what is known to be there, so that the tests above look at something."""
    assert {"errors", "variants", "request"} <= own(imports("rules"))
    assert "torch" in set(imports("rules"))
    assert "torch" not in set(imports("rules", at_import=True))
    assert {"request", "variants", "errors", "rules"} <= own(imports("files.recipe"))
    assert {"pipeline", "errors"} <= own(imports(""))
    assert {"", "request", "errors", "cli.options", "cli.targets"} <= own(imports("cli.generate"))
    assert {"cli.generate", "_version"} <= own(imports("cli"))
    assert {"recorded", "denoiser"} <= own(imports("pipeline", at_import=True))
    assert {"previews", "files.png"} <= own(imports("recorded", at_import=True))
    assert {"components", "runtime", "checkpoint.load"} <= own(imports("parts", at_import=True))
