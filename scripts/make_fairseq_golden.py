"""
Writes tests/fixtures/fairseq/: a small model that fairseq itself trained, and what fairseq itself computes with it.

Run it in an environment of its own, because fairseq 0.12.2 does not import on Python 3.11 or later:

    python3.10 -m venv /tmp/fairseq && . /tmp/fairseq/bin/activate
    pip install pip==23.0.1 && pip install torch==1.12.1 numpy==1.23.5 hydra-core==1.0.7 omegaconf==2.0.6 \
        antlr4-python3-runtime==4.8 sacrebleu==2.3.1 cython cffi bitarray regex scikit-learn tqdm
    pip install --no-deps fairseq==0.12.2
    python scripts/make_fairseq_golden.py tests/fixtures/fairseq

The toy language pair is made here: German word i is English word i, and neighbours trade places.
"""

import argparse
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils
from fairseq.sequence_generator import SequenceGenerator


DIMENSIONS = {"embed-dim": 32, "ffn-embed-dim": 64, "layers": 2, "attention-heads": 4}
SIZES = {"train": 300, "valid": 20, "test": 24}


def write_toy_text(folder):
    random.seed(1)
    for split, size in SIZES.items():
        with open(folder / f"{split}.de", "w") as german, open(folder / f"{split}.en", "w") as english:
            for _ in range(size):
                # Words of the test that training never saw become <unk>.
                words = [random.randrange(55 if split == "test" else 50) for _ in range(random.randint(1, 14))]
                swapped = [words[i ^ 1] if i ^ 1 < len(words) else words[i] for i in range(len(words))]
                print(*(f"de{i}" for i in words), file=german)
                print(*(f"en{i // 2}" for i in swapped), file=english)


def train(folder):
    languages = ["--source-lang", "de", "--target-lang", "en"]
    prefixes = [f"--{split}pref={split}" for split in SIZES]
    # Relative paths, because fairseq stores its arguments in the checkpoint.
    subprocess.run(["fairseq-preprocess", *languages, *prefixes, "--destdir=data-bin"], check=True, cwd=folder)
    sides = [f"--{side}-{name}={n}" for side in ("encoder", "decoder") for name, n in DIMENSIONS.items()]
    options = """
        --share-decoder-input-output-embed --dropout 0 --criterion label_smoothed_cross_entropy --label-smoothing 0.1
        --optimizer adam --lr 3e-3 --max-update 200 --max-tokens 512 --seed 1 --cpu --no-progress-bar
        --no-save-optimizer-state --no-epoch-checkpoints --disable-validation
    """
    command = ["fairseq-train", "data-bin", "--arch=transformer_iwslt_de_en", *sides, *options.split()]
    subprocess.run(command, check=True, cwd=folder)
    return folder / "checkpoints" / "checkpoint_last.pt"


def generate(generator, model, sample, name):
    """The best hypothesis of each sentence, padded to one array, and its score per token."""
    best = [hypotheses[0] for hypotheses in generator.generate([model], sample)]
    tokens = torch.nn.utils.rnn.pad_sequence([h["tokens"] for h in best], batch_first=True, padding_value=1)
    return {f"{name}_tokens": tokens.numpy(), f"{name}_scores": np.array([h["score"].item() for h in best])}


def batches_of_fairseq(max_tokens):
    """Random sentences sorted by source length, the longer side of each, and the batches that fairseq makes of them."""
    source, target = np.random.default_rng(1).geometric(0.05, size=(2, 2000)).clip(max=175)
    lengths = np.maximum(np.sort(source), target)
    indices = np.arange(len(lengths))
    batches = data_utils.batch_by_size(
        indices, None, num_tokens_vec=lengths, max_tokens=max_tokens, required_batch_size_multiple=8
    )
    return {"batch_lengths": lengths, "batch_sizes": np.array([len(batch) for batch in batches])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path)
    destination = parser.parse_args().destination
    destination.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_toy_text(folder)
        checkpoint = train(folder)
        models, _, task = checkpoint_utils.load_model_ensemble_and_task(
            [str(checkpoint)], arg_overrides={"data": str(folder / "data-bin")}
        )
        for language in ("de", "en"):
            shutil.copy(folder / f"test.{language}", destination)
            for name in (f"dict.{language}.txt", f"test.de-en.{language}.idx", f"test.de-en.{language}.bin"):
                shutil.copy(folder / "data-bin" / name, destination)
        shutil.copy(checkpoint, destination / "checkpoint.pt")
        task.load_dataset("test")

    model = models[0].train()
    dataset = task.dataset("test")
    sample = dataset.collater([dataset[i] for i in range(len(dataset))])
    logits, _ = model(**sample["net_input"])

    # The sum over the tokens divided by their number is what fairseq's trainer hands to the optimizer.
    state = checkpoint_utils.load_checkpoint_to_cpu(str(destination / "checkpoint.pt"))
    criterion = task.build_criterion(state["cfg"].criterion)
    loss, tokens, _ = criterion(model, sample)
    (loss / tokens).backward()
    gradients = {f"gradient/{n}": p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}

    # Generation switches the encoder of 0.12.2 to another code path, so it comes last.
    model.eval()
    beam = SequenceGenerator([model], task.target_dictionary, beam_size=5, max_len_a=1.2, max_len_b=10)
    greedy = SequenceGenerator([model], task.target_dictionary, beam_size=1, max_len_a=1.2, max_len_b=10)
    np.savez_compressed(
        destination / "golden.npz",
        input_ids=sample["net_input"]["src_tokens"].numpy(),
        decoder_input_ids=sample["net_input"]["prev_output_tokens"].numpy(),
        labels=sample["target"].numpy(),
        logits=logits.detach().numpy(),
        loss=(loss / tokens).item(),
        **gradients,
        **generate(greedy, model, sample, "greedy"),
        **generate(beam, model, sample, "beam"),
        **batches_of_fairseq(max_tokens=1024),
    )


if __name__ == "__main__":
    main()
