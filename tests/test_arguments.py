"""Every field: its default, its flag, and a clear sentence for a bad value, before anything is trained."""

import math
from dataclasses import dataclass

import pytest
from toys import Classifier, Points
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from xsam_hf import (
    XSAMArguments,
    XSAMSeq2SeqTrainer,
    XSAMSeq2SeqTrainingArguments,
    XSAMTrainer,
    XSAMTrainingArguments,
)


CLASSES = [XSAMTrainingArguments, XSAMSeq2SeqTrainingArguments]
BAD = [
    ("rho", -0.1),
    ("rho", math.nan),
    ("rho", math.inf),
    ("rho_max", 0.0),
    ("rho_max", -1.0),
    ("rho_max", math.nan),
    ("ascent_steps", 0),
    ("ascent_steps", 1.5),
    ("alpha_samples", 1),
    ("alpha_max", 0.0),
    ("alpha_max", math.inf),
    ("perturbation", "sma"),
    ("direction", "up"),
    ("ascent_scope", "batch"),
    ("alpha", -0.1),
    ("alpha", 2.1),
    ("alpha", math.nan),
    ("alpha_search_steps", 0),
    ("alpha_search_steps", -3),
    ("alpha_search_steps", 2.5),
    ("alpha_search_steps", math.nan),
]


def test_defaults_are_the_papers():
    arguments = XSAMArguments()
    assert vars(arguments) == {
        "rho": 0.05,
        "ascent_steps": 1,
        "perturbation": "sam",
        "direction": "arc",
        "alpha": None,
        "rho_max": None,
        "alpha_max": 2.0,
        "alpha_samples": 21,
        "alpha_search_steps": None,
        "ascent_scope": "update",
    }
    assert arguments.alphas == pytest.approx([i / 10 for i in range(21)])
    assert XSAMArguments(alpha_max=1.5, alpha_samples=4).alphas == [0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("field, value", BAD)
def test_a_bad_value_names_the_field_the_value_and_the_way_out(tmp_path, cls, field, value):
    for build in (lambda: XSAMArguments(**{field: value}), lambda: cls(output_dir=str(tmp_path), **{field: value})):
        with pytest.raises(ValueError, match=f"`{field}` is '?{value}'?: (give|choose)"):
            build()


@pytest.mark.parametrize("cls", CLASSES)
def test_fields_are_flags_and_survive_a_round_trip(tmp_path, cls):
    argv = ["--output_dir", str(tmp_path), "--rho", "0.2", "--ascent_steps", "3", "--alpha", "1.7", "--rho_max", "0.3"]
    (parsed,) = HfArgumentParser(cls).parse_args_into_dataclasses(argv)
    assert (parsed.rho, parsed.ascent_steps, parsed.alpha, parsed.rho_max) == (0.2, 3, 1.7, 0.3)
    assert parsed.to_dict()["rho"] == 0.2
    (again,) = HfArgumentParser(cls).parse_dict({"output_dir": str(tmp_path), "alpha": None})
    assert again.alpha is None and again.rho == 0.05


def test_base_classes_keep_their_own_fields_and_checks(tmp_path):
    assert XSAMTrainingArguments(str(tmp_path)).output_dir == str(tmp_path)  # still the first positional argument
    assert isinstance(XSAMSeq2SeqTrainingArguments(str(tmp_path)), Seq2SeqTrainingArguments)
    with pytest.raises(ValueError):
        XSAMTrainingArguments(str(tmp_path), eval_strategy="fortnightly")


def test_own_subclasses_are_validated_too(tmp_path):
    @dataclass
    class Mine(XSAMArguments, TrainingArguments):
        pass

    with pytest.raises(ValueError, match="`rho` is -1"):
        Mine(str(tmp_path), rho=-1)


@pytest.mark.parametrize("trainer", [XSAMTrainer, XSAMSeq2SeqTrainer])
def test_plain_training_arguments_get_the_methods_defaults(tmp_path, trainer):
    plain = (TrainingArguments if trainer is XSAMTrainer else Seq2SeqTrainingArguments)(
        str(tmp_path), report_to="none", use_cpu=True
    )
    assert isinstance(trainer, type) and issubclass(trainer, Trainer)
    run = trainer(model=Classifier(), args=plain, train_dataset=Points())
    assert run.xsam_arguments == XSAMArguments()


def test_a_bad_value_set_later_is_found_before_it_is_used(tmp_path):
    run = XSAMTrainer(
        model=Classifier(),
        args=XSAMTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset=Points(),
    )
    run.args.rho = -1.0  # as a hyperparameter search would
    with pytest.raises(ValueError, match="`rho` is -1.0"):
        run.train()
