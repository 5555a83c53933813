"""Scores of every example."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from xsam_hf import XSAMTrainer


class WholeScoresTrainer(XSAMTrainer):
    """[`XSAMTrainer`] whose `dataloader_drop_last` is for training: the plain one would leave examples out of a score too."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        asked, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = asked
