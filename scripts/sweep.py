"""
What one argument of SAM or XSAM changes: trains a setting of the study with several values of it, at the `rho` that the study chose.

    scripts/run sweep cifar10-steps --flags="--data_dir DATA/cifar10"    # after scripts/run study cifar10; writes results/cifar10-steps.json

The values are not tuned, and all that were tried are shown. Call it again after an interruption: finished runs are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scripts import study
from scripts.run_flags import check_once, parse_count, parse_flags, parse_seed, refuse_overridden
from scripts.run_seeds import ROOT, Run, run_or_exit
from scripts.summarize import keep
from tasks.command import Parser, run


@dataclass(frozen=True)
class Variant:
    """
    A method of the study with an argument of another value.

    Args:
        of (`str`): the method of the study, whose `rho` and flags it has.
        flags (`str`): beside them.
        rho_max (`float`, *optional*): as a multiple of that `rho`.
    """

    of: str
    flags: str = ""
    rho_max: float | None = None


@dataclass(frozen=True)
class Sweep:
    """
    Args:
        setting (`str`): of the study.
        title (`str`): what is varied.
        variants (`Mapping[str, Variant]`): by name, fit for a folder.
        seeds (`int`): how many.
    """

    setting: str
    title: str
    variants: Mapping[str, Variant]
    seeds: int = 3

    @property
    def baselines(self) -> list[str]:
        """The methods of the study that its variants are of."""
        return list(dict.fromkeys(variant.of for variant in self.variants.values()))


_SEARCHES = Sweep(
    "digits-noise",
    "How often α is searched (the paper's figure 4)",
    {f"search-{share:g}": Variant("xsam", f"--alpha_search_steps {share:g}") for share in (0.5, 0.2, 0.02)},
)
_RADII = Sweep(
    "digits-noise",
    "The radius of the search (the paper's figure 14a)",
    {f"rho-max-{ratio:g}": Variant("xsam", rho_max=ratio) for ratio in (0.5, 2, 4)},
)
_STEPS = Sweep(
    "digits-noise",
    "Two to four ascent steps of one length together (the paper's tables 4 and 12 to 14)",
    {
        f"{method}-{k}-steps": Variant("xsam" if method == "xsam" else "sam", f"--method {method} --ascent_steps {k}")
        for k in (2, 3, 4)
        for method in ("sam", "lsam", "lsam+", "msam", "msam+", "xsam")
    },
)
SWEEPS = {
    "digits-noise-searches": _SEARCHES,
    "digits-noise-rho-max": _RADII,
    "digits-noise-steps": _STEPS,
    "cifar10-steps": replace(_STEPS, setting="cifar10"),
    "cifar10-searches": replace(_SEARCHES, setting="cifar10"),
    "cifar10-rho-max": replace(_RADII, setting="cifar10"),
}


def flags(sweep: Sweep, variant: Variant, rho: float, more: str = "") -> str:
    """All that a variant's runs are told, `more` at the end."""
    radius = "" if variant.rho_max is None else f"--rho_max {variant.rho_max * rho:g}"
    return study.flags(sweep.setting, variant.of, rho, more=" ".join(filter(None, [variant.flags, radius, more])))


def results(name: str) -> dict[str, list[dict]]:
    """The results of each variant, from results/, after those of the methods that they are of, at the same seeds; empty if there are none."""
    path, sweep = ROOT / "results" / f"{name}.json", SWEEPS[name]
    if not path.is_file():
        return {}

    def told(variant: str, run: dict) -> str | None:
        rho = run.get("arguments", {}).get("rho")
        return flags(sweep, sweep.variants[variant], rho) if variant in sweep.variants and rho else None

    found = study.read_kept(sweep.setting, path, "test", told)
    seeds = {run["seed"] for runs in found.values() for run in runs}
    of = study.results(sweep.setting)
    study.check_methods(sweep.setting, of, sweep.baselines)
    known = {method: [run for run in of[method] if run["seed"] in seeds] for method in sweep.baselines}
    return {**known, **{variant: found[variant] for variant in sweep.variants if variant in found}}


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="some of the sweep's; default: all")
    parser.add_argument(
        "--seeds", nargs="+", type=parse_seed, help="default: 0, 1 and so on, as many as the sweep has"
    )
    parser.add_argument(
        "--flags", type=parse_flags, default="", help='for all runs, such as --flags="--data_dir DATA/cifar10"'
    )
    parser.add_argument(
        "--jobs", type=parse_count, default=1, help="runs at a time; with more than one, each has one thread"
    )
    args = parser.parse_args(argv)
    sweep = SWEEPS[args.sweep]
    for name in args.variants or []:
        if name not in sweep.variants:
            parser.error(f"{args.sweep} has no variant {name}: choose among {', '.join(sweep.variants)}")
    check_once(parser, variants=args.variants, seeds=args.seeds)
    variants = {name: of for name, of in sweep.variants.items() if args.variants is None or name in args.variants}
    for variant in variants.values():
        refuse_overridden(study.own(sweep.setting, flags(sweep, variant, 1)), args.flags)
    rhos, of = study.chosen(sweep.setting), study.SETTINGS[sweep.setting]
    for method in sweep.baselines:
        if method not in rhos:
            raise ValueError(
                f"{method} has no `rho` in {sweep.setting} yet: scripts/run study {sweep.setting} --methods {method} --tune_only "
                "finds one."
            )
    for seed in range(sweep.seeds) if args.seeds is None else args.seeds:
        run_or_exit(
            [
                Run(of.task, of.recipe, args.sweep, name, seed, flags(sweep, variant, rhos[variant.of], args.flags))
                for name, variant in variants.items()
            ],
            args.jobs,
        )
        keep(ROOT / "runs" / args.sweep)


if __name__ == "__main__":
    run(main)
