"""Two rules of imports: the algorithm knows no framework, and nothing needs the analysis."""

import ast
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer


PACKAGE = Path(__file__).parents[1] / "xsam_hf"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
TORCH_ONLY = [path for path in FILES if len(path.parts) == 1 and path.name != "__init__.py"]


def imports(path):
    """The modules that a file imports, with the names that it takes from them: `xsam_hf.trainer.logs`, `torch.Tensor`."""
    package = ("xsam_hf", *path.parent.parts)
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


@pytest.mark.parametrize("path", TORCH_ONLY, ids=str)
def test_files_at_the_top_import_neither_transformers_nor_accelerate_nor_the_trainer(path):
    for name in imports(path):
        assert name.split(".")[0] not in ("transformers", "accelerate"), name
        assert not f"{name}.".startswith(("xsam_hf.trainer.", "xsam_hf.analysis.")), name


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "analysis"], ids=str)
def test_nothing_but_the_analysis_imports_the_analysis(path):
    assert not any(f"{name}.".startswith("xsam_hf.analysis.") for name in imports(path))


def test_the_rules_look_at_something():
    assert {str(path) for path in TORCH_ONLY} >= {"xsam.py", "arguments.py", "passes.py"} and len(FILES) > len(
        TORCH_ONLY
    )
    assert {"transformers.Trainer", "xsam_hf.xsam.xsam_gradient"} <= set(imports(Path("trainer/trainer.py")))


def test_the_algorithm_leaves_rounding_and_schedules_to_others():
    assert not {name for name in imports(Path("xsam.py")) if "rounding" in name or "_at" in name.split(".")[-1]}


# --- private names of others


def private_names():
    """
    Attributes that begin with one underscore and are not ours: no class or function of the package defines them.

    DeepSpeed's are listed and looked up in trainer/deepspeed.py, see test_deepspeed.py.
    """
    used, ours = set(), set()
    for path in FILES:
        if path == Path("trainer/zero.py"):
            continue
        for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                used.add(node.attr)
                if isinstance(node.ctx, ast.Store):
                    ours.add(node.attr)
                if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super":
                    used.add(f"super.{node.attr}")
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                used |= {name.name for name in node.names if name.name.startswith("_")} - {"__future__"}
            elif isinstance(node, ast.FunctionDef):
                ours.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                ours |= {target.id for target in targets if isinstance(target, ast.Name)}
    # What we override is another's, although we define it too.
    return {name.removeprefix("super.") for name in used if name.startswith("super.")} | {
        name for name in used if name not in ours and not name.startswith("super.")
    }


def test_private_names_are_listed():
    page = (PACKAGE.parent / "docs" / "compatibility.md").read_text(encoding="utf-8")
    table = page[page.index("## Private names that we use") :]
    listed = set(re.findall(r"`(_\w+)`", table))
    found = {name for name in private_names() if not name.startswith("_xsam_")}
    assert listed == found and "_save_checkpoint" in found
    for name in listed:
        owners = (Trainer, torch, torch.Tensor, torch.nn.Module(), torch._utils, Accelerator())
        assert any(hasattr(owner, name) for owner in owners), name
