"""Which way imports run: each room of the package knows the rooms below it, and none above."""

import ast
from pathlib import Path

import esam_kernels
from esam_kernels import perturbation, settings
from esam_kernels.perturbation import ascent

PACKAGE = Path(esam_kernels.__file__).parent

# From the ground up. A room is a module or a folder; those in one row know nothing of each other.
FLOORS = [
    ["logs", "uploads"],
    ["device_numbers"],
    ["backends"],
    ["settings", "tensor_lists", "hooks"],
    ["ops", "normalization"],
    ["distributed"],
    ["selection"],
    ["perturbation", "ranking", "base_optimizer"],
    ["state"],
    ["step"],
    ["optimizer"],
    ["captures", "capturable"],
    ["graphs", "schedules", "diagnostics", "doctor"],
    ["__init__", "__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source):
    """The rooms that a module's text imports from."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "esam_kernels":
            modules = [f"esam_kernels.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
        else:
            continue
        for module in modules:
            package, _, rest = module.partition(".")
            if package == "esam_kernels" and rest:
                yield rest.split(".")[0]


def wrong_ways(sources):
    """(importing room, imported room) wherever an import does not lead down; ``sources`` are (room, text)."""
    return sorted(
        {
            (room, imported)
            for room, source in sources
            for imported in imported_rooms(source)
            if imported in FLOOR and imported != room and FLOOR[imported] >= FLOOR[room]
        }
    )


def test_every_module_has_a_floor():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")}
    assert rooms == set(FLOOR)


def test_imports_lead_down():
    assert wrong_ways([(room_of(path), path.read_text()) for path in PACKAGE.rglob("*.py")]) == []


def test_an_import_that_leads_up_is_found():
    sources = [("ops", "from esam_kernels.optimizer import ESAM"), ("state", "from esam_kernels import ops, step")]
    assert wrong_ways(sources) == [("ops", "optimizer"), ("state", "step")]


def test_names_that_settings_allows_are_those_that_exist():
    assert set(settings.ASCENTS) == set(ascent.ASCENTS)
    assert set(settings.ONE_PASS_ASCENTS) == {name for name, kind in ascent.ASCENTS.items() if not kind.two_passes}
    assert perturbation.__doc__
