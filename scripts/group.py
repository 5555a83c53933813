"""Reads a group of runs back, as `run_seeds` leaves them, and refuses to put side by side what cannot be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from scripts.asked import asked, check_asked, check_folder
from tasks.command import sentence
from tasks.identity import difference
from tasks.secret import without_secret_flags


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    command: list[str]
    recipe: str
    result: dict
    history: list[dict]
    searches: list[dict]
    corruptions: dict  # how it scores on corrupted test images; empty if it was not asked

    @classmethod
    def load(cls, folder: Path) -> FinishedRun:
        """
        One run's files.

        Raises:
            `ValueError`: one of them is damaged, or the result is not of what the request asks for, or not of its folder.
        """
        state, searches = folder / "trainer_state.json", folder / "xsam_search.jsonl"
        corruptions = folder / "corruptions.json"
        *request, wanted = _read(folder / "request.json", _check_request)
        result = _read(folder / "result.json", _check_result)
        if f"seed-{result['seed']}" != folder.name:
            raise ValueError(f"{folder} holds a result of seed {result['seed']}: run this seed again.")
        again = "delete the folder and run this seed again"
        check_folder(folder / "request.json", folder.absolute(), request[0], again)
        check_asked(folder / "result.json", "its request.json", wanted, result, again)
        return cls(
            folder,
            *request,
            result=result,
            history=_read(state, _check_history) if state.exists() else [],
            searches=_read(searches, _check_searches, lines=True) if searches.exists() else [],
            corruptions=_read(corruptions, check_corruptions) if corruptions.exists() else {},
        )

    def curve(self, key: str, passes: float) -> tuple[list[float], list[float]]:
        """A logged value against the passes made so far of all, the axis on which all methods are worth the same."""
        points = [(entry["step"], entry[key]) for entry in self.history if entry.get(key) is not None]
        passes_a_step = passes / max(entry["step"] for entry in self.history)
        return [passes_a_step * step for step, _ in points], [value for _, value in points]


def _read(file: Path, take: Callable[[Any], Any], lines: bool = False) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        return take([json.loads(line) for line in text.splitlines()] if lines else json.loads(text))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged ({sentence(error)}): delete its folder and run this seed again."
        ) from error


def _check_history(state: dict) -> list[dict]:
    """What was logged, of which these are drawn."""
    history = list(state["log_history"])
    drawn = [value for entry in history for name, value in entry.items() if name.startswith(("step", "loss", "eval_"))]
    float(sum(value for value in drawn if value is not None))
    return history


def _check_searches(searches: list[dict]) -> list[dict]:
    """Lines of numbers; of the losses some are null."""
    for line in searches:
        single = [line[name] for name in ("step", "epoch", "alpha")]
        float(sum([*single, *line["alphas"], *(loss for loss in line["losses"] if loss is not None)]))
        if len(line["alphas"]) != len(line["losses"]) or not line["alphas"]:
            raise ValueError(f"the search of step {line['step']} has {len(line['losses'])} losses")
    return searches


def _check_request(request: dict) -> tuple[list[str], str, dict[str, Any]]:
    """Its command, its recipe's text, and the fields that both ask for."""
    command = request["command"]
    if not (isinstance(command, list) and all(isinstance(part, str) for part in command)):
        raise ValueError(f"its command is {json.dumps(command)[:50]}, and a list of words is expected")
    command, recipe = without_secret_flags(command), str(request["recipe"])
    try:
        values = YAML(typ="safe", pure=True).load(recipe)
    except YAMLError as error:
        raise ValueError(f"its recipe is no YAML: {sentence(error)}") from error
    return command, recipe, asked(command, values if isinstance(values, dict) else None)


def _check_result(result: dict) -> dict:
    for name in ("task", "dataset", "model", "versions", "device", "threads"):
        result[name]  # noqa: B018  (a KeyError otherwise)
    return check_numbers(result)


def check_numbers(result: dict) -> dict:
    """
    A result, if every number in it can be one. Scores of a run that diverged are null or not finite; [`check_metric`] tells.

    Raises:
        `ValueError`, `KeyError` or `TypeError`: a number is none, or out of its range, or something is missing.
    """
    for name in ("identity", "arguments", "versions"):  # which older ones may lack
        if not isinstance(result.get(name, {}), dict):
            raise ValueError(f"its {name} is {json.dumps(result[name])[:50]}, and a mapping is expected")
    if type(result["seed"]) is not int:
        raise ValueError(f"its seed is {result['seed']!r}, and a whole number is expected")
    for split, scores in result["metrics"].items():
        if not isinstance(scores, dict):
            raise ValueError(f"its {split} scores are {json.dumps(scores)[:50]}, and a mapping is expected")
        for name, value in scores.items():
            highest = 1 if name.endswith("accuracy") else 100 if name.startswith(("bleu", "chrf")) else math.inf
            if value is not None and not (_is_number(value) and (math.isnan(value) or 0 <= value <= highest)):
                raise ValueError(
                    f"its {split} {name} is {value!r}, and a number from 0 {'up' if highest == math.inf else f'to {highest}'} is "
                    "expected"
                )
    passes = result["passes"]
    for kind in dict.fromkeys(["forward", "backward", *passes]):
        if not (_is_number(passes[kind]) and 0 < passes[kind] < math.inf):
            raise ValueError(f"it counts {passes[kind]!r} {kind} passes, and a number above 0 is expected")
    if not (_is_number(result["seconds"]) and 0 <= result["seconds"] < math.inf):
        raise ValueError(f"it took {result['seconds']!r} seconds, and a number from 0 up is expected")
    return result


def check_corruptions(found: dict) -> dict:
    """
    How a model scored on corrupted images, if every number in it can be one.

    Raises:
        `ValueError`, `KeyError` or `TypeError`: a number is none, or out of its range, or something is missing.
    """
    for group, share in found["groups"].items():
        if not (_is_number(share) and 0 <= share <= 1):
            raise ValueError(
                f"its share of corrupted images, {group}, is {share!r}, and a number from 0 to 1 is expected"
            )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_one_method(places: Sequence[Any], results: Sequence[Mapping]) -> None:
    """
    Refuses runs of one method that are not one training with several seeds, whose mean would be of nothing.

    Args:
        places (`Sequence`): where each result is, for the message.
        results (`Sequence[Mapping]`): what stands in each `result.json`.

    Raises:
        `ValueError`: two differ in more than their seed ([`~tasks.identity.difference`]).
    """
    for place, result in zip(places[1:], results[1:], strict=True):
        if found := difference(results[0], result):
            name, first, other = found
            raise ValueError(
                f"{places[0]} and {place} stand for one method and differ in their {name} ({first} and {other}), where only the seed "
                "may differ: take one of them out, or run its seed again."
            )


def load_group(group: Path) -> tuple[dict[str, list[FinishedRun]], list[str]]:
    """
    The finished runs of each method, by seed, and the names of the others.

    Raises:
        `ValueError`: none is finished, or a run is damaged; or see [`check_one_table`], [`check_one_method`] and [`check_corrupted`].
    """
    runs: dict[str, list[FinishedRun]] = {}
    unfinished = []
    for request in sorted(group.glob("*/seed-*/request.json")):
        folder = request.parent
        if (folder / "result.json").exists():
            runs.setdefault(folder.parent.name, []).append(FinishedRun.load(folder))
        else:
            unfinished.append(f"{folder.parent.name} {folder.name.replace('-', ' ')}")
    for result in sorted(group.glob("*/seed-*/result.json")):
        if not (folder := result.parent).joinpath("request.json").exists():
            unfinished.append(
                f"{folder.parent.name} {folder.name.replace('-', ' ')} (it has no request.json of run_seeds)"
            )
    if not runs:
        found = f" ({'; '.join(unfinished)})" if unfinished else ""
        raise ValueError(f"There is no finished run of run_seeds in {group}{found}: give one of runs/, or train one.")
    for seeds in runs.values():
        seeds.sort(key=lambda run: run.result["seed"])
    every = [run for seeds in runs.values() for run in seeds]
    check_one_table([(run.folder, run.recipe, run.result) for run in every])
    for seeds in runs.values():
        check_one_method([run.folder for run in seeds], [run.result for run in seeds])
    check_corrupted((run.folder, run.corruptions) for run in every)
    return runs, unfinished


def check_one_table(runs: Sequence[tuple[Any, str | None, Mapping]]) -> None:
    """
    Refuses runs, of whatever methods, whose scores do not belong into one table.

    Args:
        runs (`Sequence`): of each, where it is, for the message; its recipe, as text or by name; and what stands in its `result.json`.

    Raises:
        `ValueError`: two are of different recipes or data, or one tells of its data and another does not.
    """
    (first, *facts), *others = runs
    ours = _what_must_agree(*facts)
    for place, *facts in others:
        for name, value in _what_must_agree(*facts).items():
            if value != ours[name]:
                shown = "" if "\n" in f"{ours[name]}{value}" else f" ({ours[name]} and {value})"  # a recipe's text
                raise ValueError(
                    f"{first} and {place} differ in their {name}{shown}, so that their scores do not belong into one table: take one "
                    "of them out."
                )


def _what_must_agree(recipe: str | None, result: Mapping) -> dict[str, Any]:
    identity = result.get("identity", {})
    # The images or sentences that scores are of; methods may differ in what they train on.
    data = {name: identity.get(name) for name in ("validation_data", "test_data")}
    return {"task": result.get("task"), "dataset": result.get("dataset"), "recipe": recipe, **data}


def check_corrupted(scores: Iterable[tuple[Any, Mapping]]) -> None:
    """
    Refuses scores on corrupted images that are not of the same images.

    Args:
        scores (`Iterable`): where they are, for the message, and themselves, empty if there are none.

    Raises:
        `ValueError`: two were made by another program, or are of another number of images.
    """
    (first, ours), *others = [of for of in scores if of[1]] or [(None, {})]
    for place, theirs in others:
        for name in ("made_by", "test_examples"):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"{first} and {place} were scored on other corrupted images ({name} {ours.get(name)} and {theirs.get(name)}): "
                    "score one of them again."
                )


def check_metric(results: Mapping[str, Sequence[dict]], metric: str, split: str, where: Any = None) -> None:
    """
    Refuses a metric that not every run has as a number.

    Args:
        results (`Mapping[str, Sequence[dict]]`): the results of each method.
        metric, split (`str`): its name, and of which images or sentences.
        where (*optional*): the file or folder that holds them, for the message.

    Raises:
        `ValueError`: a run has no such metric, or has diverged, or a method has two runs of one seed.
    """
    place = "" if where is None else f"{where}: "
    for name, runs in results.items():
        seeds = [run["seed"] for run in runs]
        if len(set(seeds)) < len(seeds):
            twice = next(seed for seed in seeds if seeds.count(seed) > 1)
            raise ValueError(f"{place}{name} has two results of seed {twice}: take one of them out.")
        for run in runs:
            who, scores = f"{place}{name}, seed {run['seed']}", run["metrics"].get(split)
            if scores is None:
                raise ValueError(
                    f"{who} has no scores of {split}: it has {', '.join(run['metrics']) or 'none at all'}."
                )
            if metric not in scores:
                raise ValueError(f"{place}There is no metric {metric}: choose one of {', '.join(scores)}.")
            # A table of test scores shows these beside it.
            beside = {"wrong_labels": "accuracy", "best_epoch": metric} if split == "test" else {}
            for part, kind in {split: metric, **beside}.items():
                value = run["metrics"].get(part, {kind: 0}).get(kind)
                if run.get("diverged") or not _is_number(value) or not math.isfinite(value):
                    raise ValueError(
                        f"{who} has diverged ({part} {kind} {value}), and a mean with it means nothing: take the method out of the "
                        "group, or change it."
                    )
