"""Batches of sentences of like length, limited by their number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader, Sampler


def token_batches(lengths: Sequence[int], order: Sequence[int], max_tokens: int, multiple: int = 8) -> list[list[int]]:
    """
    Cuts an order of sentences into batches of at most `max_tokens`, padding counted.

    Args:
        lengths (`Sequence[int]`): tokens of every sentence, those of its longer side.
        order (`Sequence[int]`): numbers of the sentences, short ones first.
        max_tokens (`int`): limit for sentences × longest sentence of a batch.
        multiple (`int`): full batches hold a multiple of so many sentences, where that many fit.

    Raises:
        `ValueError`: a sentence alone is over the limit.

    Source: the behaviour of `batch_by_size` in fairseq 0.12.2, with which the batches agree.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    for index in order:
        if lengths[index] > max_tokens:
            raise ValueError(
                f"`max_tokens` is {max_tokens}, but sentence {index} has {lengths[index]} tokens: raise the limit to at "
                f"least {max(lengths)}, or leave long sentences out."
            )
        while batch and max(lengths[i] for i in (*batch, index)) * (len(batch) + 1) > max_tokens:
            full = len(batch) - len(batch) % multiple or len(batch)
            batches.append(batch[:full])
            batch = batch[full:]
        batch.append(index)
    if batch:
        batches.append(batch)
    return batches


class TokenBatchSampler(Sampler[list[int]]):
    """
    The same batches in every epoch, in an order that depends on the seed and the epoch alone; each process gets its share.

    Every sentence comes once an epoch. All processes get equally many batches: the largest are halved until the number fits.

    Args:
        source_lengths, target_lengths (`Sequence[int]`): in tokens, `</s>` included.
        max_tokens (`int`): limit for one batch of one process, see [`token_batches`].
        seed (`int`): must be the same on all processes.
        num_processes, process_index (`int`): this process's share; `Trainer` need not divide the batches again.

    Raises:
        `ValueError`: a sentence is over the limit, or there are fewer sentences than processes.

    Source: fairseq's translation task: random order, then sorted by target and by source length; its batches are
    shuffled, not rebuilt, by epoch.
    """

    def __init__(
        self,
        source_lengths: Sequence[int],
        target_lengths: Sequence[int],
        max_tokens: int,
        seed: int,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        self.seed, self.epoch = seed, 0
        self.num_processes, self.process_index = num_processes, process_index
        # Equal lengths in random order: lexsort sorts by its last key first and leaves no ties to chance.
        chance = np.random.default_rng(seed).random(len(source_lengths))
        order = np.lexsort((chance, target_lengths, source_lengths)).tolist()
        self.batches = token_batches(np.maximum(source_lengths, target_lengths).tolist(), order, max_tokens)
        while len(self.batches) % num_processes:
            largest = max(range(len(self.batches)), key=lambda i: len(self.batches[i]))
            batch = self.batches[largest]
            if len(batch) == 1:
                raise ValueError(
                    f"The training set has {len(order)} sentences, too few for {num_processes} processes."
                )
            self.batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order; the Trainer calls it at the beginning of an epoch and when it resumes in the middle of one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.batches))
        return (self.batches[i] for i in order[self.process_index :: self.num_processes])

    def __len__(self) -> int:
        return len(self.batches) // self.num_processes


class TokenBatchLoader(DataLoader):
    """
    A loader whose epoch the Trainer can set.

    Not prepared by accelerate, which would divide the batches among processes once more and, on two processes, not pass the
    epoch on to the sampler when it skips to the middle of one.
    """

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on to the sampler."""
        self.batch_sampler.set_epoch(epoch)
