"""Imports go one way (design.md): the algorithm knows no framework, nothing knows the layer above it."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "xsam_hf"
LAYERS = [
    {"geometry"},
    {"perturbation", "ascent", "direction", "search", "reuse", "rounding"},
    {"hyperparameters", "state"},
    {"schedule"},
    {"xsam"},
    {"arguments", "callback", "checkpoint", "compatibility", "meter", "micro_batch", "model_card"},
    {"replay"},
    {"trainer"},
    {"__init__"},
]
TORCH_ONLY = set().union(*LAYERS[:5])


def imports(module):
    """The modules that `module` imports, its own package's without the leading dot."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module


def test_every_module_has_a_layer():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set().union(*LAYERS)


@pytest.mark.parametrize("depth", range(len(LAYERS)))
def test_imports_point_downwards(depth):
    below = set().union(*LAYERS[:depth])
    for module in LAYERS[depth]:
        own = {name for level, name in imports(module) if level}
        assert own <= below, f"{module} imports {own - below}"


@pytest.mark.parametrize("module", sorted(TORCH_ONLY))
def test_the_algorithm_imports_only_torch(module):
    outside = {name.split(".")[0] for level, name in imports(module) if not level}
    assert not outside & {"transformers", "accelerate"}, module
