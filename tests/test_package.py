"""What is built and published: metadata, the wheel and the sdist, and the examples of README.md."""

import ast
import configparser
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import release_check
from tasks.recipes import read


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def requirements(lines):
    return {
        r.name.lower(): r
        for r in (Requirement(line) for line in lines.strip().splitlines() if not line.startswith("%"))
    }


NEEDED = requirements(SETUP["options"]["install_requires"])
EXTRAS = {
    name: requirements(SETUP.get("options.extras_require", name, raw=True)) for name in SETUP["options.extras_require"]
}


def test_every_dependency_has_a_lower_bound_that_is_run():
    for name, found in {
        **NEEDED,
        **EXTRAS["analysis"],
        **EXTRAS["checkout"],
        **EXTRAS["docs"],
        **EXTRAS["test"],
    }.items():
        pinned = name == "hessian-eigenthings"  # an alpha
        assert [part.operator for part in found.specifier] == ["==" if pinned else ">="], name


@pytest.mark.parametrize(
    "folders, extra, ours",
    [
        (["xsam_hf"], {}, ["xsam_hf"]),
        (["xsam_hf/analysis"], EXTRAS["analysis"], ["xsam_hf"]),
        (
            ["tasks", "scripts"],
            EXTRAS["analysis"] | EXTRAS["checkout"] | EXTRAS["docs"],
            ["xsam_hf", "tasks", "scripts"],
        ),
    ],
)
def test_what_is_imported_is_declared(folders, extra, ours):
    names = {
        "pil": "pillow",
        "sklearn": "scikit-learn",
        "yaml": "pyyaml",
        "ruamel": "ruamel.yaml",
        "subword_nmt": "subword-nmt",
        "hessian_eigenthings": "hessian-eigenthings",
        "mkdocs": "mkdocs-material",
        "griffe": "mkdocstrings-python",
    }
    # Peers and tools of scripts that say so, and what comes with others.
    others = {
        "pytorch_optimizer",
        "composer",
        "fairseq",
        "imagecorruptions",
        "lxml",
        "setuptools",
        "tqdm",
        "peft",
        "trl",
    }
    known = others if extra else set()
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    for file in files if extra else [file for file in files if file.parent.name != "analysis"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for module in (name.partition(".")[0] for name in modules):
                declared = names.get(module.lower(), module.lower()) in {**NEEDED, **extra}
                assert declared or module in {*sys.stdlib_module_names, *ours, *known}, f"{file} imports {module}"


# --- what is built ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist, made by the build backend from a copy of the sources."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "copy"
    files = [
        "setup.cfg",
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "RESULTS.md",
    ]
    files += [
        str(path.relative_to(ROOT))
        for name in ("xsam_hf", "tasks", "scripts", "tests", "docs", "results", ".ci")
        for path in (ROOT / name).rglob("*")
    ]
    for name in files:
        if (ROOT / name).is_file() and "__pycache__" not in name:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    code = "from setuptools import build_meta as b; print(b.build_wheel('out'), b.build_sdist('out'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,), (sdist,) = (copy / "out").glob("*.whl"), (copy / "out").glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        return Parser().parsestr(wheel.read(name).decode("utf-8"))


def test_metadata(metadata):
    assert metadata["Author"] and metadata.get_all("Project-URL") and metadata["License"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    lowest = metadata["Requires-Python"].removeprefix(">=3.")
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers and f"Programming Language :: Python :: 3.{lowest}" in classifiers
    assert f"Programming Language :: Python :: 3.{sys.version_info.minor}" in classifiers
    assert set(metadata.get_all("Provides-Extra")) == {
        "analysis",
        "checkout",
        "corruptions",
        "deepspeed",
        "docs",
        "fairseq",
        "test",
    }


def test_no_link_of_the_description_leads_into_the_repository(metadata):
    description = metadata.get_payload()
    assert "trainer = XSAMTrainer(model=model" in description and "RESULTS.md" in description
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert links and all(link.startswith("https://") for link in links)
    assert any(
        not link.startswith("https://") for link in re.findall(r"\]\(([^)]*)\)", README)
    )  # as they do in the repository


def test_links_of_the_repository_lead_somewhere():
    for file in (
        ROOT / "README.md",
        ROOT / "RESULTS.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "tasks").rglob("*.md"),
    ):
        for link in re.findall(r"\]\(([^)\s]*)\)", file.read_text(encoding="utf-8")):
            if not link.startswith(("https://", "#")):
                assert (file.parent / link.partition("#")[0]).exists(), f"{file}: {link}"


def test_the_wheel_is_the_library_and_typed(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {
        "xsam_hf",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    assert "xsam_hf/py.typed" in names
    assert {n for n in names if n.endswith(".py")} == {
        str(p.relative_to(ROOT)) for p in (ROOT / "xsam_hf").rglob("*.py")
    }


def test_the_sdist_has_all_that_its_tests_need(built, tmp_path):
    with tarfile.open(built[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    for name in ("tests", "tasks", "scripts", "docs", "results", "xsam_hf"):
        ours = {str(p.relative_to(ROOT)) for p in (ROOT / name).rglob("*") if p.is_file() and p.suffix != ".pyc"}
        assert ours <= {str(p.relative_to(folder)) for p in (folder / name).rglob("*")}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "RESULTS.md", "setup.py", "setup.cfg"} <= {
        p.name for p in folder.iterdir()
    }
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_layers.py", "tests/test_translation_text.py"]  # fmt: skip
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]


# --- README's examples, with the wheel alone -------------------------------------------------------------------------

TOYS = """
from dataclasses import dataclass
import torch, xsam_hf
assert {wheel!r} in xsam_hf.__file__, xsam_hf.__file__
from transformers import TrainingArguments
from xsam_hf import XSAMArguments, XSAMMixin

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def forward(self, x, labels=None):
        from types import SimpleNamespace
        class Output(dict):
            loss = property(lambda self: self["loss"])
        return Output(loss=(self.layer(x)[:, 0] - labels).square().mean())

model = Model()
data = [{{"x": torch.tensor([float(i), 1.0]), "labels": torch.tensor(float(i % 2))}} for i in range(8)]
args = TrainingArguments({folder!r}, report_to="none", use_cpu=True, num_train_epochs=1, save_strategy="no")
loader = torch.utils.data.DataLoader(data, batch_size=4)
optimizer, epochs = torch.optim.SGD(model.parameters(), lr=0.01), 2
before = model.layer.weight.detach().clone()
class SFTTrainer: ...
class SFTConfig: ...
"""


def test_the_examples_of_the_readme_run_with_the_wheel_alone(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path / "wheel")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3 and any("xsam_gradient" in block for block in blocks)
    toys = TOYS.format(wheel=str(tmp_path / "wheel"), folder=str(tmp_path / "out"))
    for block in blocks:
        changed = "assert not torch.equal(before, model.layer.weight)\n" if "train()" in block else ""
        done = subprocess.run(
            [sys.executable, "-c", f"{toys}\n{block}\n{changed}"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path / "wheel"), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"


# --- releases --------------------------------------------------------------------------------------------------------


def test_a_release_names_its_version_everywhere(tmp_path):
    (tmp_path / "xsam_hf").mkdir()
    (tmp_path / "xsam_hf" / "__init__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.0\n")
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text("# Changelog\n\n## [1.2.0] - 2026-11-25\n\n## [1.1.0] - 2026-10-01\n")
    assert release_check.check_agreement(tmp_path) == "1.2.0"
    for heading in ("[Unreleased]", "[1.2.1] - 2026-11-25", "[1.2.0]", "[1x2.0] - 2026-11-25"):
        changelog.write_text(f"# Changelog\n\n## {heading}\n\n## [1.2.0] - 2026-11-25\n")
        with pytest.raises(ValueError, match=r"CHANGELOG.md begins with .* and xsam_hf/__init__.py says 1\.2\.0"):
            release_check.check_agreement(tmp_path)
    changelog.write_text("## [1.2.0] - 2026-11-25\n")
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.1.0\n")
    with pytest.raises(ValueError, match=r"CITATION.cff says version 1\.1\.0"):
        release_check.check_agreement(tmp_path)


# --- citation --------------------------------------------------------------------------------------------------------


def test_the_citation_is_of_the_paper_and_of_this_version():
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert f'__version__ = "{citation["version"]}"' in (ROOT / "xsam_hf" / "__init__.py").read_text()
    paper = citation["preferred-citation"]
    assert paper["title"] in README and "2603.10048" in json.dumps(paper)
