"""One word: a plain Transformers script, run with `Trainer` and with `XSAMTrainer` in its place, nothing else changed."""

import torch
import transformers
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

import xsam_hf


WORDS = ["[PAD]", "[UNK]", "good", "fine", "great", "bad", "poor", "awful", "film", "a", "the", "very"]


def script(Trainer, output_dir):
    """Sequence classification as the Transformers documentation shows it, with a BERT small enough for a test."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")

    texts = [f"{a} {b} film" for a in ("a very", "the", "the very") for b in WORDS[2:8]] * 4
    data = Dataset.from_dict({"text": texts, "label": [int(text.split()[-2] in WORDS[2:5]) for text in texts]})
    data = data.map(lambda row: tokenizer(row["text"]), batched=True).train_test_split(0.25, seed=0)

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    args = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=60,
        logging_steps=10,
        learning_rate=3e-3,
        label_smoothing_factor=0.1,
        per_device_train_batch_size=9,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=4)],
    )
    trainer.train()
    return trainer, trainer.evaluate(), trainer.predict(data["test"])


def test_replacing_the_word_is_enough(tmp_path):
    (plain, plain_metrics, plain_output), (ours, metrics, output) = (
        script(Trainer, tmp_path / name)
        for name, Trainer in (("plain", transformers.Trainer), ("xsam", xsam_hf.XSAMTrainer))
    )
    assert plain_metrics["eval_accuracy"] == metrics["eval_accuracy"] == 1.0
    assert (output.predictions.argmax(-1) == output.label_ids).all()
    assert output.predictions.shape == plain_output.predictions.shape
    assert abs(output.predictions - plain_output.predictions).max() > 1e-3  # it is another optimizer after all
    # Early stopping ended both before 60 epochs, four epochs after the best.
    for trainer in (plain, ours):
        assert trainer.state.global_step < trainer.state.max_steps
        best = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
        assert trainer.state.global_step - best == 4 * 6
    assert {"xsam/alpha", "xsam/sharpness"} <= set().union(*ours.state.log_history)
    assert set(metrics) == set(plain_metrics)


def test_the_documented_subclass_with_a_weighted_loss(tmp_path):
    # The example of the Trainer's documentation for `compute_loss`, with either class as its base.
    def weights(base, classes, **method):
        class CustomTrainer(base):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                labels = inputs.pop("labels")
                outputs = model(**inputs)
                logits = outputs.get("logits")
                loss_fct = torch.nn.CrossEntropyLoss(weight=torch.tensor(classes, device=model.device))
                loss = loss_fct(logits.view(-1, self.model.config.num_labels), labels.view(-1))
                return (loss, outputs) if return_outputs else loss

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=12,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=3,
        )
        rows = [{"input_ids": [i % 12, (5 * i + 1) % 12], "labels": i % 3} for i in range(24)]
        cls = xsam_hf.XSAMTrainingArguments if method else TrainingArguments
        args = cls(output_dir=str(tmp_path), num_train_epochs=2, learning_rate=1e-2, report_to="none", use_cpu=True,
                   disable_tqdm=True, save_strategy="no", eval_strategy="epoch", **method)  # fmt: skip
        trainer = CustomTrainer(BertForSequenceClassification(config), args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()]), trainer

    plain, _ = weights(transformers.Trainer, [1.0, 2.0, 3.0])
    off, _ = weights(xsam_hf.XSAMTrainer, [1.0, 2.0, 3.0], rho=0.0)
    ours, trainer = weights(xsam_hf.XSAMTrainer, [1.0, 2.0, 3.0], rho=0.1)
    other, _ = weights(xsam_hf.XSAMTrainer, [1.0, 1.0, 1.0], rho=0.1)
    assert torch.equal(plain, off)
    assert (ours - plain).abs().max() > 1e-4 and (ours - other).abs().max() > 1e-4
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2
