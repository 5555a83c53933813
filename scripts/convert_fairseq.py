"""
Converts a transformer_iwslt_de_en between fairseq and Hugging Face; float32 weights stay the same, bit for bit.

    scripts/run convert_fairseq checkpoint_best.pt runs/converted --dictionaries data-bin      # from fairseq
    scripts/run convert_fairseq runs/converted converted-back                                  # to fairseq

A file is taken for fairseq's, a folder for Hugging Face's.
"""

from collections.abc import Sequence
from pathlib import Path

from tasks.command import Parser, run
from tasks.translation.fairseq_format import to_fairseq, to_hugging_face


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint_*.pt of fairseq, or a folder that train.py wrote")
    parser.add_argument("destination", type=Path, help="folder to write to")
    parser.add_argument(
        "--dictionaries", type=Path, help="folder with dict.xx.txt, for a file of fairseq's; its own if not given"
    )
    parser.add_argument("--source_language", default="de")
    parser.add_argument("--target_language", default="en")
    arguments = parser.parse_args(argv)
    languages = arguments.source_language, arguments.target_language
    if arguments.model.is_dir():
        if arguments.dictionaries is not None:
            raise ValueError("--dictionaries is for a file of fairseq's: a folder has its own, so leave it out.")
        to_fairseq(arguments.model, arguments.destination, languages)
    elif arguments.model.is_file():
        dictionaries = arguments.dictionaries or arguments.model.parent
        to_hugging_face(arguments.model, dictionaries, arguments.destination, languages)
    else:
        raise ValueError(f"There is no {arguments.model}: give a checkpoint of fairseq's, or the folder of a model.")
    print(f"{arguments.destination} is written.")


if __name__ == "__main__":
    run(main)
