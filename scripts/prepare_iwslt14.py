"""
Prepares IWSLT14 German-English as fairseq's prepare-iwslt14.sh does: tokenised, cleaned, lower case, 10,000 joint BPE merges.

    scripts/run prepare_iwslt14 data/iwslt14                       # fetches the archive, 19 MB
    scripts/run prepare_iwslt14 data/iwslt14 --archive de-en.tgz   # takes one that is there

It can be interrupted and run again: what is finished and intact is kept, of a download too. Train with
`--dataset data/iwslt14`.
"""

from collections.abc import Sequence
from pathlib import Path

from tasks.command import Parser, run
from tasks.files import refuse_file
from tasks.translation.iwslt14 import download, prepare


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write train, valid, test, code and dictionaries")
    parser.add_argument("--archive", type=Path, help="fairseq's de-en.tgz; fetched into the folder if not given")
    arguments = parser.parse_args(argv)
    archive = arguments.archive or arguments.folder / "de-en.tgz"
    refuse_file(arguments.folder, "The folder")
    if not arguments.archive and not archive.is_file():
        download(archive)
    prepare(archive, arguments.folder)


if __name__ == "__main__":
    run(main)
