"""A training that kills process 1 once, in an ascent, for torchrun to restart: it then goes on from the last checkpoint."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_faults import TWO, die, faulty, model
from toys import train, weights_of

from xsam_hf import XSAMTrainer


def main(directory):
    first = not (directory / "killed").exists()

    def fault(trainer):
        if dist.get_rank() == 1:
            (directory / "killed").write_text(f"rank 1, update {trainer.state.global_step}")
            die()

    run = train(directory, model(), trainer=faulty(5, 3, fault) if first else XSAMTrainer, resume=not first, **TWO)
    torch.save(weights_of(run), directory / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
