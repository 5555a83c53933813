"""What setup.cfg cannot say: the package index shows README.md without the links into the repository, which lead nowhere there."""

import re
from pathlib import Path

from setuptools import setup


LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://)[^)]*\)")  # its text may hold a link or a picture

readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
setup(long_description=LINK.sub(r"\1", readme), long_description_content_type="text/markdown")
