"""Batches by tokens: every sentence once, no batch over the limit, equal shares, and the Trainer's resume."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from tasks.translation.batches import TokenBatchSampler, token_batches
from tasks.translation.model import build
from tasks.translation.trainer import TranslationTrainer
from xsam_hf import XSAMSeq2SeqTrainingArguments


rng = np.random.default_rng(0)
SOURCE, TARGET = rng.integers(2, 60, size=(2, 301)).tolist()
LONGER = np.maximum(SOURCE, TARGET)


def sampler(**changes):
    return TokenBatchSampler(SOURCE, TARGET, **{"max_tokens": 256, "seed": 3, **changes})


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_sentence_once_an_epoch_and_no_batch_over_the_limit(processes):
    shares = [sampler(num_processes=processes, process_index=i) for i in range(processes)]
    batches = [list(share) for share in shares]
    assert len({len(share) for share in shares}) == 1  # a process with a batch more would wait for ever
    assert [len(b) for b in batches] == [len(share) for share in shares]
    assert sorted(i for share in batches for batch in share for i in batch) == list(range(301))
    assert all(len(batch) * LONGER[batch].max() <= 256 for share in batches for batch in share)


def test_the_union_does_not_depend_on_the_number_of_processes():
    numbers = set()
    for limit in (256, 264):
        alone = list(sampler(max_tokens=limit))
        shares = [sampler(max_tokens=limit, num_processes=2, process_index=i) for i in range(2)]
        together = [batch for pair in zip(*shares, strict=True) for batch in pair]
        if len(alone) % 2 == 0:
            assert together == alone  # in turn: what one process accumulates, two take at the same time
        else:
            assert len(together) == len(alone) + 1
        assert sorted(sum(together, [])) == sorted(sum(alone, []))
        numbers.add(len(alone) % 2)
    assert numbers == {0, 1}


def test_the_largest_batch_is_halved_until_every_process_has_as_many():
    lengths = [1] * 8 + [8] * 2

    def sizes(processes):
        made = TokenBatchSampler(lengths, lengths, 8, 0, processes)
        assert sorted(sum(made.batches, [])) == list(range(10))
        return [len(batch) for batch in made.batches]

    assert sizes(1) == sizes(3) == [8, 1, 1]
    assert sizes(2) == [4, 4, 1, 1]
    assert sizes(5) == [2, 2, 4, 1, 1]
    assert sizes(6) == [2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_sentences_are_sorted_by_source_and_then_by_target(seed):
    def sets(source, target, limit):
        return [sorted(batch) for batch in TokenBatchSampler(source, target, limit, seed).batches]

    assert sets([3, 3, 3, 3], [9, 2, 9, 2], 18) == [[1, 3], [0, 2]]
    assert sets([9, 2, 9, 2], [3, 3, 3, 3], 18) == [[1, 3], [0, 2]]
    assert sets([2, 2, 5, 5], [5, 2, 2, 5], 10) == [[0, 1], [2, 3]]  # by target first: 1 and 2, 0 and 3


def test_chance_decides_between_equal_lengths_and_depends_on_the_seed():
    def batches(seed):
        return {frozenset(batch) for batch in TokenBatchSampler([5] * 32, [5] * 32, 40, seed).batches}

    assert len(batches(0)) == 4 and batches(0) == batches(0) and batches(0) != batches(1)
    assert frozenset(range(8)) not in batches(0)  # not by position


def test_an_epoch_and_a_seed_choose_the_order_and_nothing_else():
    one = sampler()
    first = list(one)
    assert list(one) == first
    one.set_epoch(1)
    second = list(one)
    assert second != first and sorted(second) == sorted(first)
    one.set_epoch(0)
    assert list(one) == first
    torch.manual_seed(99)
    assert list(sampler()) == first and list(sampler(seed=4)) != first


def test_sentences_of_like_length_share_a_batch():
    lengths = np.random.default_rng(1).integers(2, 60, size=301)

    def padding(batches):
        return sum(len(batch) * lengths[batch].max() - lengths[batch].sum() for batch in batches)

    in_order = token_batches(lengths.tolist(), range(301), 256)
    assert padding(TokenBatchSampler(lengths, lengths, 256, 0)) < 0.2 * padding(in_order)


def test_batches_by_hand():
    assert token_batches([2, 2, 3, 3, 5], range(5), max_tokens=6, multiple=1) == [[0, 1], [2, 3], [4]]
    # The ninth sentence fits, the tenth does not: eight go, the ninth waits for the tenth.
    assert token_batches([1] * 9 + [2], range(10), max_tokens=9) == [list(range(8)), [8, 9]]


def test_a_sentence_over_the_limit_and_too_few_sentences_are_refused():
    with pytest.raises(ValueError, match="`max_tokens` is 20, but sentence .* tokens: raise the limit to at least 59"):
        sampler(max_tokens=20)
    with pytest.raises(ValueError, match="2 sentences, too few for 3 processes"):
        TokenBatchSampler([3, 3], [3, 3], 10, 0, num_processes=3)


# --- in the Trainer --------------------------------------------------------------------------------------------------


class Recorder(TranslationTrainer):
    def training_step(self, model, inputs, *rest, **named):
        self.seen.append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *rest, **named)


def sentences(lengths):
    return [[4 + (7 * i + j) % 30 for j in range(length - 1)] + [2] for i, length in enumerate(lengths)]


def trainer(tmp_path, **changes):
    torch.manual_seed(0)
    data = Dataset.from_dict({"input_ids": sentences(SOURCE[:60]), "labels": sentences(TARGET[:60])})
    arguments = XSAMSeq2SeqTrainingArguments(
        **{
            "output_dir": str(tmp_path),
            "num_train_epochs": 2,
            "rho": 0.1,
            "use_cpu": True,
            "report_to": "none",
            "save_steps": 4,
            "save_strategy": "steps",
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "max_grad_norm": 0,
            "disable_tqdm": True,
            "label_smoothing_factor": 0.1,
            "seed": 1,
            **changes,
        }  # fmt: skip
    )
    made = Recorder(model=build("transformer-small", 40, 40), args=arguments, train_dataset=data, max_tokens=400)
    made.seen = []
    return made


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_in_the_middle_of_an_epoch_is_the_uninterrupted_run(tmp_path, accumulation):
    whole = trainer(tmp_path / "whole", gradient_accumulation_steps=accumulation)
    batches = len(whole.get_train_dataloader())
    whole.train()
    assert len(whole.seen) == 2 * batches and batches > 4 * accumulation
    assert whole.seen[:batches] != whole.seen[batches:]
    assert sorted(whole.seen[:batches]) == sorted(whole.seen[batches:])

    # The checkpoint of step 4, and the last one of the second epoch's middle.
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "whole").glob("checkpoint-*"))[:-1]
    for step in steps:
        resumed = trainer(tmp_path / f"resumed-{step}", gradient_accumulation_steps=accumulation)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        per_epoch = -(-batches // accumulation)
        done = step // per_epoch * batches + step % per_epoch * accumulation
        assert resumed.seen == whole.seen[done:]
        for name, weight in resumed.model.state_dict().items():
            assert torch.equal(weight, whole.model.state_dict()[name]), name


def test_accumulation_weighs_tokens_not_batches(tmp_path):
    """One update on all batches of an epoch has the gradient of the mean loss over all tokens, whatever their cut."""
    runs = {}
    for limit in (200, 2000):
        run = trainer(
            tmp_path / str(limit), rho=0, max_steps=1, gradient_accumulation_steps=1000, optim="sgd", learning_rate=1.0,
            save_strategy="no", lr_scheduler_type="constant", weight_decay=0,
        )  # fmt: skip
        run.max_tokens = limit
        run.model.config.dropout = 0
        for module in run.model.modules():
            module.dropout = 0
        run.train()
        runs[limit] = len(run.seen), run.model.state_dict()
    assert runs[200][0] > 3 * runs[2000][0]
    for name, weight in runs[200][1].items():
        torch.testing.assert_close(weight, runs[2000][1][name], rtol=0, atol=2e-5, msg=name)


def test_every_weight_decays(tmp_path):
    made = trainer(tmp_path, weight_decay=0.3)
    groups = [group for group in made.create_optimizer().param_groups if group["params"]]
    assert [group["weight_decay"] for group in groups] == [0.3]
    assert len(groups[0]["params"]) == len(list(made.model.parameters()))
