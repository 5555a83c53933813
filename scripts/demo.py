"""`bash scripts/demo` without its set-up: a small ViT on digits, with AdamW once more at the passes that SAM and XSAM take."""

from collections.abc import Sequence

from scripts.report import report
from scripts.run_seeds import ROOT, Run, run_or_exit
from tasks import recipes
from tasks.command import Parser, run


TASK, RECIPE = "image_classification", "digits-vit-small"


def main(argv: Sequence[str]) -> None:
    Parser(description=__doc__).parse_args(argv)
    recipe = recipes.read(ROOT / "tasks" / TASK / "recipes" / f"{RECIPE}.yaml")
    methods = {
        "AdamW": "--rho 0",
        "AdamW-2x": f"--rho 0 --num_train_epochs {2 * recipe['num_train_epochs']}",
        "SAM": "--alpha 1",
        "XSAM": "",
    }
    runs = [Run(TASK, RECIPE, "demo", name, seed, flags) for seed in range(3) for name, flags in methods.items()]
    run_or_exit(runs, jobs=2)
    report(ROOT / "runs" / "demo", "accuracy", baselines=["AdamW-2x", "SAM"])


if __name__ == "__main__":
    run(main)
