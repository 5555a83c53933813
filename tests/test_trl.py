"""trl's trainers with the mixin: what they count is counted once an update, and the gradient is XSAM's."""

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from xsam_hf import XSAMArguments, XSAMMixin


WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(30))]


class XSAMSFTTrainer(XSAMMixin, SFTTrainer):
    pass


class XSAMRewardTrainer(XSAMMixin, RewardTrainer):
    pass


@dataclass
class XSAMSFTConfig(XSAMArguments, SFTConfig):
    pass


@dataclass
class XSAMRewardConfig(XSAMArguments, RewardConfig):
    pass


def tokenizer():
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


def sentence(i, n):
    return " ".join(f"w{(i * k) % 30}" for k in range(1, n))


TEXTS = Dataset.from_dict({"text": [sentence(i, 4 + i % 5) for i in range(16)]})
PAIRS = Dataset.from_dict({side: [sentence(i + j, 4 + i % 5) for i in range(16)] for j, side in enumerate(["chosen", "rejected"])})  # fmt: skip
SIZE = {"vocab_size": len(WORDS), "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
SIZE |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0} | dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)  # fmt: skip


def run(directory, kind, trainer, config, **changes):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZE)) if kind == "sft" else GPT2ForSequenceClassification(GPT2Config(**SIZE, num_labels=1))  # fmt: skip
    args = config(
        str(directory), per_device_train_batch_size=4, num_train_epochs=2, logging_steps=1, report_to="none", optim="sgd",
        learning_rate=0.1, max_grad_norm=0, use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=False, lr_scheduler_type="constant", **changes,
    )  # fmt: skip
    made = trainer(
        model=model, args=args, train_dataset=TEXTS if kind == "sft" else PAIRS, processing_class=tokenizer()
    )
    made.train()
    return made


@pytest.mark.parametrize(
    "kind, plain, ours, counted",
    [
        ("sft", (SFTTrainer, SFTConfig), (XSAMSFTTrainer, XSAMSFTConfig), ["num_tokens", "mean_token_accuracy", "entropy"]),
        ("reward", (RewardTrainer, RewardConfig), (XSAMRewardTrainer, XSAMRewardConfig), ["num_tokens", "accuracy", "margin"]),
    ],
)  # fmt: skip
def test_counters_see_the_first_pass_only(tmp_path, kind, plain, ours, counted):
    logs = {}
    for name, (trainer, config), changes in (
        ("plain", plain, {}),
        ("off", ours, {"rho": 0.0}),
        ("xsam", ours, {"rho": 0.5, "ascent_steps": 2}),
    ):
        made = run(tmp_path / name, kind, trainer, config, **changes)
        logs[name] = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(logs["plain"]) == 8
    for key in counted:
        plain_values, off, xsam = ([entry[key] for entry in logs[name]] for name in ("plain", "off", "xsam"))
        assert plain_values == off
        assert plain_values[0] == xsam[0], key  # the first update's first pass is the plain one
        if key == "num_tokens":
            assert plain_values == xsam  # tokens do not depend on the weights
    assert [e["loss"] for e in logs["plain"]] != [e["loss"] for e in logs["xsam"]]
    assert all(entry["xsam/sharpness"] > 0 for entry in logs["xsam"])


PREFERENCES = Dataset.from_dict({
    "prompt": [sentence(i, 4) for i in range(16)],
    "chosen": [sentence(i + 1, 4 + i % 4) for i in range(16)],
    "rejected": [sentence(i + 2, 5 + i % 3) for i in range(16)],
})  # fmt: skip


def mixed(trainer, config):
    """Both with the mixin, made anew: the experimental ones are not in every trl."""
    name = trainer.__name__
    return type(f"XSAM{name}", (XSAMMixin, trainer), {}), dataclass(
        type(f"XSAM{name}Config", (XSAMArguments, config), {})
    )


def experimental(name):
    module = pytest.importorskip(f"trl.experimental.{name.lower()}")
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")


@pytest.mark.parametrize("name", ["DPO", "ORPO"])
@pytest.mark.parametrize("method", [{"alpha": 1.0}, {}, {"ascent_steps": 2}])
def test_preference_trainers_count_the_first_pass_only(tmp_path, name, method):
    theirs = (DPOTrainer, DPOConfig) if name == "DPO" else experimental(name)
    ours = mixed(*theirs)
    found = {}
    for kind, (trainer, config), changes in (("plain", theirs, {}), ("off", ours, {"rho": 0.0}), ("on", ours, {"rho": 0.5, **method})):  # fmt: skip
        torch.manual_seed(0)
        models = [GPT2LMHeadModel(GPT2Config(**SIZE | {"n_positions": 64})) for _ in range(2)]
        reference = {"ref_model": models[1]} if name == "DPO" else {}
        made = trainer(
            model=models[0],
            **reference,
            args=config(
                str(tmp_path / kind), per_device_train_batch_size=4, num_train_epochs=1, logging_steps=1, report_to="none", optim="sgd",
                learning_rate=0.1, max_grad_norm=0, use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", max_length=40,
                gradient_checkpointing=False, lr_scheduler_type="constant", **changes,
            ),
            train_dataset=PREFERENCES,
            processing_class=tokenizer(),
        )  # fmt: skip
        made.train()
        rows = [entry for entry in made.state.log_history if "loss" in entry]
        found[kind] = [{key: value for key, value in row.items() if not key.startswith("xsam/")} for row in rows]
    timing = ("epoch", "grad_norm", "step", "learning_rate")
    assert len(found["plain"]) == 4 and any(key.startswith("rewards/") for key in found["plain"][0])
    assert found["off"] == found["plain"]
    for row, wanted in zip(found["on"], found["plain"], strict=True):
        assert row.keys() == wanted.keys()
        if row["step"] == 1:
            assert {k: v for k, v in row.items() if k not in timing} == {
                k: v for k, v in wanted.items() if k not in timing
            }
    assert found["on"][-1]["loss"] != found["plain"][-1]["loss"]


def test_a_trainer_that_generates_is_refused_by_what_it_does(tmp_path):
    trainer, config = experimental("GKD")
    ours, ours_config = mixed(trainer, config)
    chats = Dataset.from_dict({"messages": [[{"role": "user", "content": sentence(i, 5)}, {"role": "assistant", "content": sentence(i + 1, 6)}] for i in range(8)]})  # fmt: skip
    texts = tokenizer()
    texts.chat_template = "{% for m in messages %}{{ m['content'] + ' <eos> ' }}{% endfor %}"

    def run(name, share, **changes):
        size = SIZE | {"n_positions": 64}
        return ours(
            model=GPT2LMHeadModel(GPT2Config(**size)),
            teacher_model=GPT2LMHeadModel(GPT2Config(**size)),
            args=ours_config(
                str(tmp_path / name), lmbda=share, max_new_tokens=4, max_length=40, report_to="none", use_cpu=True, bf16=False,
                disable_tqdm=True, max_steps=1, gradient_checkpointing=False, per_device_train_batch_size=4, save_strategy="no", **changes,
            ),
            train_dataset=chats,
            processing_class=texts,
        )  # fmt: skip

    with pytest.raises(NotImplementedError, match="XSAMGKDTrainer generates inside its training step.*SFTTrainer"):
        run("a", 1.0).train()
    run("b", 1.0, rho=0.0).train()
    assert run("c", 0.0).train().global_step == 1  # with given texts alone it is a supervised trainer
