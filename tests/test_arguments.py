"""Every field: its default, its flag, and a clear sentence for a bad value, before anything is trained."""

import math
import re
import runpy
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toys import Classifier, Points
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from xsam_hf import (
    XSAMArguments,
    XSAMSeq2SeqTrainer,
    XSAMSeq2SeqTrainingArguments,
    XSAMState,
    XSAMTrainer,
    XSAMTrainingArguments,
    xsam_gradient,
)


ROOT = Path(__file__).parents[1]
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
    ("gradient_scale", "median"),
    ("ascent_fraction", 0.0),
    ("ascent_fraction", 1.1),
    ("rho_exclude", ["(bias"]),
    ("sharpness_start", -0.1),
    ("sharpness_start", 1.0),
    ("sharpness_end", 1.5),
    ("sharpness_every", 0),
    ("sharpness_every", 1.5),
    ("asam_eta", -1.0),
    ("asam_scope", "biases"),
    ("vasso_decay", 0.0),
    ("fsam_sigma", -1.0),
    ("fsam_lambda", 1.0),
    ("stale_decay", 1.0),
    ("rho", None),
    ("rho", "0.05"),
    ("rho", True),
    ("alpha", False),
    ("alpha", "auto"),
    ("ascent_steps", None),
    ("alpha_max", None),
    ("ascent_fraction", None),
    ("rho_exclude", 3),
    ("rho_exclude", [3]),
    ("perturbation_dtype", "half"),
]
CONTRADICTIONS = [
    ({"direction": "lsam", "alpha": 1.0}, "`alpha` is 1.0, but `direction` 'lsam' has no arc: leave"),
    ({"perturbation": "vasso", "ascent_steps": 2}, "`ascent_steps` is 2, but vasso .* set it to 1"),
    ({"perturbation": "fsam", "ascent_steps": 2}, "`ascent_steps` is 2, but fsam .* set it to 1"),
    ({"perturbation": "fsam", "ascent_scope": "micro"}, "`perturbation` is 'fsam', .* `ascent_scope` to `update`"),
    ({"gradient_scale": "slope", "ascent_scope": "micro"}, "`gradient_scale` is 'slope', .* `ascent_scope` to"),
    (
        {"gradient_scale": "slope_max", "ascent_fraction": 0.5},
        "`gradient_scale` is 'slope_max', .* `ascent_fraction` to",
    ),
    ({"sharpness_start": 0.6, "sharpness_end": 0.5}, "`sharpness_start` is 0.6: give a share below `sharpness_end`"),
]


@pytest.mark.parametrize("fields, sentence", CONTRADICTIONS)
def test_fields_that_contradict_each_other_say_so(tmp_path, fields, sentence):
    for build in (lambda: XSAMArguments(**fields), lambda: XSAMTrainingArguments(str(tmp_path), **fields)):
        with pytest.raises(ValueError, match=sentence):
            build()
    for name, value in fields.items():  # each alone is fine
        if (name, value) != ("alpha", 1.0) and name != "sharpness_start":
            XSAMArguments(**{name: value})


def test_whole_numbers_and_single_patterns_may_come_in_other_types():
    arguments = XSAMArguments(ascent_steps=2.0, alpha_samples=5.0, sharpness_every=3.0, rho_exclude="bias")
    values = (arguments.ascent_steps, arguments.alpha_samples, arguments.sharpness_every)
    assert values == (2, 5, 3) and all(type(value) is int for value in values)
    assert arguments.rho_exclude == ["bias"] and len(arguments.alphas) == 5


def test_numpys_numbers_become_pythons():
    arguments = XSAMArguments(rho=np.float32(0.5), alpha=np.float64(1.5), ascent_steps=np.int64(2))
    values = (arguments.rho, arguments.alpha, arguments.ascent_steps)
    assert values == (0.5, 1.5, 2) and [type(value) for value in values] == [float, float, int]
    with pytest.raises(ValueError, match="`rho` is True: give a finite length"):
        XSAMArguments(rho=np.bool_(True))


def test_the_methods_fields_alone_are_no_arguments_of_a_trainer():
    for given in [(Classifier(), XSAMArguments(rho=0.1)), (Classifier(),)]:
        with pytest.raises(ValueError, match="`args` is XSAMArguments, .*: give XSAMTrainingArguments"):
            XSAMTrainer(*given, **({} if len(given) == 2 else {"args": XSAMArguments()}))


def test_excluding_what_is_not_there_says_so(tmp_path):
    for patterns, sentence in [
        (["frist"], "`rho_exclude` is 'frist', which no name of a trainable weight contains: give .* 'first.weight'"),
        (["first", "second"], "not excluded"),
    ]:
        args = XSAMTrainingArguments(str(tmp_path), rho_exclude=patterns, use_cpu=True, report_to="none")
        with pytest.raises(ValueError, match=sentence):
            XSAMTrainer(model=Classifier(), args=args, train_dataset=Points())
    with pytest.raises(ValueError, match="plain tensors have none: give the model"):
        xsam_gradient([nn.Parameter(torch.ones(2))], None, None, XSAMArguments(rho_exclude=["w"]), XSAMState())


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
        "gradient_scale": "last",
        "ascent_scope": "update",
        "ascent_fraction": 1.0,
        "perturbation_dtype": "weights",
        "rho_exclude": None,
        "sharpness_start": 0.0,
        "sharpness_end": 1.0,
        "sharpness_every": 1,
        "asam_eta": 0.01,
        "asam_scope": "weights",
        "vasso_decay": 0.4,
        "fsam_sigma": 1.0,
        "fsam_lambda": 0.9,
        "stale_decay": 0.5,
    }
    assert arguments.alphas == pytest.approx([i / 10 for i in range(21)])
    assert XSAMArguments(alpha_max=1.5, alpha_samples=4).alphas == [0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("field, value", BAD)
def test_a_bad_value_names_the_field_the_value_and_the_way_out(tmp_path, cls, field, value):
    for build in (lambda: XSAMArguments(**{field: value}), lambda: cls(output_dir=str(tmp_path), **{field: value})):
        with pytest.raises(
            ValueError, match=f"`{field}` is '?{re.escape(str(value).strip('[]').strip(chr(39)))}'?: (give|choose)"
        ):
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


# --- fields of the same name


@dataclass
class Distilling(TrainingArguments):
    alpha: float = 0.25  # of a distillation's loss


def test_a_field_of_the_same_name_in_other_arguments_is_not_the_methods(tmp_path):
    args = Distilling(str(tmp_path), report_to="none", use_cpu=True)
    run = XSAMTrainer(model=Classifier(), args=args, train_dataset=Points())
    assert run.xsam_arguments == XSAMArguments() and run.args.alpha == 0.25


def test_a_class_whose_fields_collide_is_refused_when_it_is_made():
    with pytest.raises(
        TypeError, match="`alpha` is a field of XSAMArguments and of Distilling.*two meanings.*trainer's class"
    ):

        class Mixed(XSAMArguments, Distilling):
            pass

    with pytest.raises(TypeError, match="`alpha` is a field of XSAMArguments and of Mine"):

        class Mine(XSAMTrainingArguments):
            alpha: float = 0.25

    class Longer(XSAMTrainingArguments):  # another default is no other meaning
        rho: float = 0.5

    class Deeper(Longer):
        temperature: float = 2.0

    assert Deeper.rho == 0.5


def test_the_way_out_of_a_collision_works(tmp_path):
    class Mine(XSAMTrainer):
        xsam_arguments = XSAMArguments(rho=0.5, alpha=1.7)

    settings = {"report_to": "none", "use_cpu": True, "max_steps": 2, "disable_tqdm": True, "logging_steps": 1}
    run = Mine(model=Classifier(), args=Distilling(str(tmp_path), **settings), train_dataset=Points())
    run.train()
    assert [entry["xsam/alpha"] for entry in run.state.log_history if "xsam/alpha" in entry] == [1.7, 1.7]
    assert run.args.alpha == 0.25


def test_every_field_has_a_help_that_says_something():
    for field in fields(XSAMArguments):
        assert len(field.metadata["help"]) > 30 and field.metadata["help"].endswith("."), field.name


def test_readme_the_docs_and_the_logged_hyperparameters_name_every_field(tmp_path):
    names = [field.name for field in fields(XSAMArguments)]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in names if f"`{name}`" not in readme]
    page = runpy.run_path(str(ROOT / "scripts" / "document_arguments.py"))["page"]()
    assert (ROOT / "docs" / "arguments.md").read_text(encoding="utf-8") == page
    logged = XSAMTrainingArguments(str(tmp_path)).to_sanitized_dict()  # what the Trainer's loggers are given
    assert not [name for name in names if name not in logged]
