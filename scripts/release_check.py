"""
Checks what would be published, and publishes nothing: docs/releasing.md says what comes before and after.

    scripts/run release_check            # leaves the wheel and the sdist in dist/

The version, CHANGELOG.md and CITATION.cff have to agree, and all has to be committed. Then the wheel and the sdist are built, looked at
by twine, and each trains the quick start's model. build and twine come from the package index, into an environment of their own.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tasks.command import Parser, run


ROOT = Path(__file__).resolve().parent.parent


def check_agreement(root: Path) -> str:
    """
    The version that is to be released.

    Raises:
        `ValueError`: CHANGELOG.md or CITATION.cff do not name it.
    """
    version = re.search(r'^__version__ = "(.+)"$', (root / "xsam_hf" / "__init__.py").read_text(), re.MULTILINE)[1]
    heading = re.search(r"^## .*$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    if not re.fullmatch(rf"## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", heading):
        raise ValueError(
            f"CHANGELOG.md begins with {heading.removeprefix('## ')!r} and xsam_hf/__init__.py says {version}: head it "
            f"'## [{version}] - YEAR-MONTH-DAY', or change the version."
        )
    cited = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1]
    if cited != version:
        raise ValueError(f"CITATION.cff says version {cited} and xsam_hf/__init__.py {version}: make them the same.")
    return version


def call(*command: object, **options) -> None:
    """
    Runs a command.

    Raises:
        `ValueError`: it failed; what it wrote last is in the message.
    """
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise ValueError(f"{' '.join(str(part) for part in command[:4])} ... failed: {last}")


def main(argv: Sequence[str]) -> None:
    Parser(description=__doc__).parse_args(argv)
    version, dist = check_agreement(ROOT), ROOT / "dist"
    git = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    if git.stdout:
        raise ValueError(f"{git.stdout.splitlines()[0][3:]} is not committed: a release is made of what is.")
    if dist.exists():
        raise ValueError(f"{dist} is there already: remove it, so that nothing old is published.")
    example = re.search(
        r"```python\n(.*?)```", (ROOT / "docs" / "quick_start.md").read_text(encoding="utf-8"), re.DOTALL
    )[1]
    with tempfile.TemporaryDirectory() as folder:
        tools = Path(folder) / "tools"
        call(sys.executable, "-m", "pip", "install", "--quiet", "--target", tools, "build", "twine")
        with_tools = {**os.environ, "PYTHONPATH": str(tools)}
        call(sys.executable, "-m", "build", "--outdir", dist, ROOT, env=with_tools)
        built = [dist / f"xsam_hf-{version}-py3-none-any.whl", dist / f"xsam_hf-{version}.tar.gz"]
        call(sys.executable, "-m", "twine", "check", "--strict", *built, env=with_tools)
        for file in built:
            alone = Path(folder) / file.suffix
            call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", alone, file)
            here = f"import xsam_hf\nassert xsam_hf.__file__.startswith({str(alone)!r}), xsam_hf.__file__\n"
            call(sys.executable, "-c", here + example, cwd=folder, env={**os.environ, "PYTHONPATH": str(alone)})
            print(f"{file.name}: built, accepted by twine, trains the quick start's model")


if __name__ == "__main__":
    run(main)
