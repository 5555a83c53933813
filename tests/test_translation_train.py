"""The task as a command: a small recipe from end to end, in one process and in two, saved and resumed."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from processes import in_ranks
from translation_toys import difference, flags, parse, weights, write_word_for_word

from tasks.translation import fairseq_format
from tasks.translation import train as task
from tasks.translation.batches import TokenBatchSampler
from tasks.translation.corpus import collate
from tasks.translation.data import load
from tasks.translation.vocabulary import Vocabulary


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "tasks" / "translation" / "recipes").glob("*.yaml"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_word_for_word(tmp_path_factory.mktemp("text"))


def run(*arguments, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command = [*launcher, "-m", "tasks.translation.train", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    return output, run(*flags(text, output))


def test_a_run_prints_and_leaves_what_it_promises(finished, text):
    output, printed = finished
    result = json.loads((output / "result.json").read_text())
    assert (result["task"], result["method"], result["model"]) == ("translation", "xsam", "transformer-small")
    names = {"bleu_tokenised", "bleu_detokenised", "chrf"}
    for split in ("validation", "test"):
        assert result["metrics"][split].keys() == names | {"loss"} and result["copied_source"][split].keys() == names
        scores = json.loads((output / f"{split}.scores.json").read_text())
        assert {name: row["score"] for name, row in scores.items()} == {n: result["metrics"][split][n] for n in names}
        assert len((output / f"{split}.hypotheses.txt").read_text().splitlines()) == 10
    assert (output / "test.references.txt").read_text() == (text / "test.en").read_text()
    assert result["passes"]["forward"] > result["passes"]["backward"] > 0 and result["signatures"].keys() == names
    assert result["arguments"]["rho"] == 0.05 and result["arguments"]["max_tokens"] == 100
    assert printed.count("  hypothesis  ") == 10 and "test, source copied" in printed
    assert all(signature in printed for signature in result["signatures"].values())


def test_the_saved_model_scores_the_same_when_it_is_given_as_model(finished, text, tmp_path):
    output, _ = finished
    first = json.loads((output / "result.json").read_text())["metrics"]["test"]
    arguments, training = parse(
        *flags(text, tmp_path / "again", model=output, learning_rate=0, rho=0, num_train_epochs=1, save_strategy="no")
    )
    again = json.loads(task.train(arguments, training).read_text())["metrics"]["test"]
    assert again == pytest.approx(first)
    with pytest.raises(ValueError, match=f"`model` {output} has .* tokens, `dataset` .*: give the data"):
        arguments, _ = parse(*flags(text, tmp_path, model=output, bpe_merges=1))
        task.build_model(arguments, load(arguments))


def test_a_saved_model_is_refused_with_a_dictionary_of_another_order(finished, text, tmp_path):
    arguments, _ = parse(*flags(text, tmp_path, model=finished[0]))
    corpus = load(arguments)
    task.build_model(arguments, corpus)
    first, second, *rest = corpus.target_vocabulary.counts.items()
    corpus.target_vocabulary = Vocabulary(dict([second, first, *rest]))
    words = f"`model` .* has {first[0]!r} in line 1 of dict.en.txt, and `dataset` {second[0]!r}: give the data"
    with pytest.raises(ValueError, match=words):
        task.build_model(arguments, corpus)


def test_a_saved_model_with_too_few_positions_is_refused(finished, text, tmp_path):
    model = shutil.copytree(finished[0], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    arguments, _ = parse(*flags(text, tmp_path, model=model))
    corpus = load(arguments)
    longest = max(
        len(ids) for split in corpus.splits.values() for side in ("input_ids", "labels") for ids in split[side]
    )
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": longest}))
    fits = task.build_model(arguments, corpus)
    fits(**collate([row for row in corpus.splits["train"] if len(row["input_ids"]) == longest]))
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": longest - 1}))
    with pytest.raises(
        ValueError, match=f"has {longest - 1} positions, and `dataset` sentences of up to {longest} tokens"
    ):
        task.build_model(arguments, corpus)


def test_a_finished_run_is_not_written_over_by_another_model(finished, tmp_path):
    for write in (fairseq_format.to_fairseq, partial(fairseq_format.to_hugging_face, finished[0])):
        with pytest.raises(
            ValueError, match=f"{finished[0]} holds a finished run .result.json., whose files would be"
        ):
            write(finished[0], finished[0], ("de", "en"))
    fairseq_format.to_fairseq(finished[0], tmp_path / "new", ("de", "en"))
    fairseq_format.to_fairseq(finished[0], tmp_path / "new", ("de", "en"))  # its own files may be


PARALLEL = {"num_train_epochs": 2, "max_tokens": 50, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def two_processes(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("parallel") / "out"
    run(*flags(text, output, **PARALLEL), processes=2)
    return output


def test_two_processes_equal_one_that_accumulates_their_batches(text, two_processes, tmp_path):
    def alone(name, **changes):
        options = {**PARALLEL, "gradient_accumulation_steps": 2, "save_strategy": "no", "threads": 1, **changes}
        return weights(task.train(*parse(*flags(text, tmp_path / name, **options))).parent)

    corpus = load(parse(*flags(text, tmp_path, **PARALLEL))[0])
    train = corpus.splits["train"]
    sides = [[len(ids) for ids in train[name]] for name in ("input_ids", "labels")]
    batches = len(TokenBatchSampler(*sides, max_tokens=PARALLEL["max_tokens"], seed=42))
    assert batches % 2 == 0 and batches >= 6  # an odd number would be cut otherwise for two
    states = [json.loads((two_processes / "trainer_state.json").read_text())]
    one = alone("one")
    states.append(json.loads((tmp_path / "one" / "trainer_state.json").read_text()))
    assert [state["global_step"] for state in states] == [batches, batches]  # two epochs of half as many updates
    found = weights(two_processes)
    assert difference(found, one) <= 1e-6
    # The same sentences in another order, and half of them at a time, are other trainings.
    assert difference(found, alone("another order", data_seed=7)) > 1e-3
    assert difference(found, alone("half the batch", gradient_accumulation_steps=1, max_steps=batches)) > 1e-3


def test_two_processes_train_to_the_same_weights_as_they_do_when_resumed(text, two_processes, tmp_path):
    checkpoint = two_processes / "checkpoint-2"
    assert 0 < json.loads((checkpoint / "trainer_state.json").read_text())["epoch"] < 1  # in the middle of the first
    line = flags(text, tmp_path, **PARALLEL, resume_from_checkpoint=checkpoint)
    results = in_ranks(lambda rank, report: task.main([str(part) for part in line]))
    assert results == [(0, "")] * 2, results
    assert difference(weights(two_processes), weights(tmp_path)) == 0
    files = [(folder / "test.hypotheses.txt").read_text() for folder in (two_processes, tmp_path)]
    assert files[0] == files[1] and len(files[0].splitlines()) == 10


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_the_command_line_comes_first(recipe, tmp_path):
    fields = yaml.safe_load(recipe.read_text())
    fields = {name: value for name, value in fields.items() if name not in ("bf16", "fp16")}
    arguments, training = parse(recipe, "--use_cpu", "--output_dir", tmp_path, "--learning_rate", "0.5")
    assert training.learning_rate == 0.5 and str(tmp_path) == training.output_dir
    assert arguments.dataset == fields["dataset"] and training.rho == fields["rho"]
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.98) and training.max_grad_norm == 0


def test_the_papers_recipe_has_the_papers_values(tmp_path):
    arguments, training = parse(
        ROOT / "tasks/translation/recipes/iwslt14-transformer.yaml", "--use_cpu", "--output_dir", tmp_path
    )
    assert (training.rho, training.rho_max, training.weight_decay, training.label_smoothing_factor) == (
        0.15,
        0.45,
        0.3,
        0.1,
    )
    assert (training.num_train_epochs, arguments.max_tokens, training.alpha) == (300, 4096, None)
    assert (training.metric_for_best_model, training.greater_is_better) == ("bleu_tokenised", True)


@pytest.mark.parametrize(
    "flag, value, words",
    [("dropout", 1.0, "`dropout` is 1.0"), ("threads", 0, "`threads` is 0"), ("average_checkpoints", -1, "-1")],
)
def test_values_out_of_range_are_refused_before_anything_is_read(flag, value, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        parse(f"--{flag}", value, "--output_dir", tmp_path, "--use_cpu")
