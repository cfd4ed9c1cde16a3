"""Which way imports run: each part of the package imports from the layers below its own, and from none above."""

import ast
from pathlib import Path

import esam_kernels
from esam_kernels import perturbation, settings
from esam_kernels.perturbation import ascent

PACKAGE = Path(esam_kernels.__file__).parent

# The lowest layer first. Modules and folders of one layer do not import from each other.
LAYERS = [
    ["logs", "uploads"],
    ["device_numbers"],
    ["backends"],
    ["settings", "tensor_lists", "hooks"],
    ["ops", "normalization", "batches"],
    ["distributed"],
    ["selection"],
    ["perturbation", "ranking", "base_optimizer"],
    ["state"],
    ["step"],
    ["optimizer"],
    ["captures", "capturable", "held_graphs"],
    ["graphs", "schedules", "diagnostics", "doctor"],
    ["__init__", "__main__"],
]
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def name_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(source):
    """The modules and folders that a module's text imports from."""
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
    """(importing, imported) wherever an import does not lead down; ``sources`` are (name, text)."""
    return sorted(
        {
            (name, imported)
            for name, source in sources
            for imported in imported_names(source)
            if imported in LAYER and imported != name and LAYER[imported] >= LAYER[name]
        }
    )


def test_every_module_has_a_layer():
    names = {name_of(path) for path in PACKAGE.rglob("*.py")}
    assert names == set(LAYER)


def test_imports_lead_down():
    assert wrong_ways([(name_of(path), path.read_text()) for path in PACKAGE.rglob("*.py")]) == []


def test_an_import_that_leads_up_is_found():
    sources = [("ops", "from esam_kernels.optimizer import ESAM"), ("state", "from esam_kernels import ops, step")]
    assert wrong_ways(sources) == [("ops", "optimizer"), ("state", "step")]


def test_names_that_settings_allows_are_those_that_exist():
    assert set(settings.ASCENTS) == set(ascent.ASCENTS)
    assert set(settings.ONE_PASS_ASCENTS) == {name for name, kind in ascent.ASCENTS.items() if not kind.two_passes}
    assert perturbation.__doc__
