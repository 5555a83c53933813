"""LoRA: the adapters are the weights, and ρ is a length in their norm."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from toys import arguments
from transformers import BertConfig, BertForSequenceClassification

from xsam_hf import XSAMTrainer


class Sentences(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(50, (6,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 3}


def adapted():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **size)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False)
    return get_peft_model(BertForSequenceClassification(config), lora)


@pytest.mark.parametrize("exclude", [None, ["classifier"]])
def test_only_adapters_move_and_the_ball_is_theirs(tmp_path, exclude):
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []  # the weights of every pass in train mode

    def note(module, inputs, outputs):
        if module.training:
            seen.append({name: p.detach().clone() for name, p in module.named_parameters()})

    model.register_forward_hook(note)
    args = arguments(tmp_path, rho=0.3, alpha=1.0, rho_exclude=exclude, max_steps=1)
    XSAMTrainer(model=model, args=args, train_dataset=Sentences()).train()
    first, second = seen
    moved = {name for name in before if not torch.equal(first[name], second[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or "classifier" in name for name in trained)
    assert moved == {name for name in trained if exclude is None or "classifier" not in name}
    length = sum((second[name] - first[name]).double().square().sum() for name in before).sqrt()
    assert length.item() == pytest.approx(0.3, rel=1e-5)
    after = dict(model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
