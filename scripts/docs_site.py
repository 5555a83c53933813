"""
What the documentation's site is made of: the repository's Markdown at the repository's paths, so that one link works in both.

`bash scripts/test` builds it into build/site, strictly: a broken link, anchor or reference fails. To see it while you write:

    .venv/bin/mkdocs serve --config-file scripts/mkdocs.yml
"""

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "RESULTS.md", "CHANGELOG.md", "docs/*.md", "tasks/**/README.md")
LINK = re.compile(r"\]\(([^)\s#]+)")
NAME = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")  # [`XSAMState`]
TYPED = re.compile(
    r"^ +(?:\w[\w, ]* \(.*\)|\[?`[\w.]+(?:\[.*?\])?`\]?(?:, \*optional\*)?):", re.MULTILINE
)  # `rho (`float`):`, ``ValueError`:`
DOCUMENTED = {
    name.rpartition(".")[2]: name
    for name in re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
}


def on_files(files, config):
    """MkDocs: the pages, and the files of the repository that they link to, in place of what is in docs/."""
    kept = Files([file for file in files if not Path(file.abs_src_path or "").is_relative_to(ROOT / "docs")])
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    linked = {
        (page.parent / link).resolve()
        for page in pages
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in link
    }
    for path in [*pages, *sorted(linked - set(pages))]:
        if path.is_file() and path.is_relative_to(ROOT):
            kept.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return kept


class TransformersStyle(griffe.Extension):
    """mkdocstrings: reads docstrings in transformers' style, and links the names that docs/api.md has."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            plain = TYPED.sub(_google, obj.docstring.value)
            obj.docstring.value = NAME.sub(_link, plain)


def _google(match):
    """`  state ([`XSAMState`], *optional*): ...` and `  `ValueError`: ...` as Google's style has them."""
    return re.sub(r"[`\[\]]|, \*optional\*|, defaults to .*(?=\))", "", match[0])


def _link(match):
    short, name = match.groups()
    if name in DOCUMENTED:
        return f"[`{name}`][{DOCUMENTED[name]}]"
    return f"`{name.rpartition('.')[2] if short else name}`"
