"""
DeepSpeed's ZeRO 1, 2 and 3: two gloo processes equal one that has all weights, in float64.

All but the refusals need DeepSpeed, the extra `deepspeed`, and g++: with them, `pytest tests/test_deepspeed.py` runs all. The
first time DeepSpeed compiles a part of itself, for minutes.
"""

import ast
import importlib.util
import itertools
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from deepspeed_worker import (
    BF16,
    CONFIGURED,
    SCENARIOS,
    STAGES,
    Network,
    build,
    configured,
    everything,
    flat,
    main,
    result,
    run,
)
from processes import in_ranks, launched
from safetensors.torch import load_file
from toys import Tokens, arguments, tiny_gpt2

from xsam_hf import XSAMTrainer, find_rho
from xsam_hf.trainer import deepspeed, zero
from xsam_hf.trainer.compatibility import check_supported


SCRIPTS = Path(__file__).parents[1] / "scripts"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="needs DeepSpeed (the extra `deepspeed`) and g++",
)
in_all_stages = pytest.mark.parametrize("stage", STAGES)


def in_two_processes(directory, work):
    results = in_ranks(lambda rank, report: main(rank, directory, work), seconds=590)
    assert results == [(0, "")] * 2, results
    return [torch.load(directory / f"rank{i}.pt", weights_only=True) for i in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("zero"), everything)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {name: result(run(tmp_path_factory.mktemp("alone"), name)) for name in SCENARIOS}


@needs_deepspeed
@in_all_stages
@pytest.mark.parametrize(
    "name", [*SCENARIOS, *(f"{name}, offloaded" for name in ("xsam", "unused", "later not finite"))]
)
def test_sharded_weights_equal_whole_ones(ranks, alone, stage, name):
    sharded, expected = ranks[0][stage, name], alone[name.removesuffix(", offloaded")]
    assert (sharded["weights"] - expected["weights"]).abs().max() <= 1e-6
    for rank in ranks:
        assert torch.equal(rank[stage, name]["model's own"], sharded["weights"])
    assert sharded["history"]["xsam/alpha"] == expected["history"]["xsam/alpha"]
    for key in ("loss", "xsam/angle", "xsam/sharpness", "xsam/grad_norm_last"):
        assert sharded["history"][key] == pytest.approx(expected["history"][key], rel=1e-4, abs=1e-6, nan_ok=True), key


@needs_deepspeed
def test_scenarios_are_different_trainings(alone):
    found = [alone[name]["weights"] for name in SCENARIOS]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert len(one) != len(other) or (one - other).abs().max() > 1e-4


@needs_deepspeed
@in_all_stages
def test_an_update_that_deepspeed_skips_leaves_all_weights_alone(ranks, tmp_path, stage):
    expected = result(run(tmp_path, "first not finite", alpha=1.5))["weights"]
    assert torch.isfinite(expected).all()
    for rank, where in itertools.product(ranks, ("", ", offloaded")):
        skipped = rank[stage, f"first not finite{where}"]
        assert (skipped["weights"] - expected).abs().max() <= 1e-6
        assert torch.equal(skipped["model's own"], skipped["weights"])


def rounded():
    """DeepSpeed rounds the model before it copies the float32 weights from it."""
    return tiny_gpt2(layers=1).bfloat16().float()


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exact")
    return {
        rho: result(run(directory, f"{rho}", model=rounded(), **{**BF16, "bf16": False}, rho=rho))
        for rho in (0.0, 0.3)
    }


@needs_deepspeed
@pytest.mark.parametrize(
    "name, stage",
    [*itertools.product(("bf16", "bf16, offloaded"), STAGES), *(("bf16, sums in fp32", stage) for stage in (2, 3))],
)
def test_bfloat16_is_as_far_from_float64_as_in_plain_training(ranks, exact, name, stage):
    start = flat(rounded().parameters())

    def distance(one, other):
        return (one["weights"] - other["weights"]).norm() / (one["weights"] - start).norm()

    plain = max(distance(ranks[0]["plain bf16", accumulation], exact[0.0]) for accumulation in (1, 2))
    found = ranks[0][stage, name]
    assert distance(found, exact[0.3]) <= plain < 0.01 < 0.1 < distance(found, exact[0.0])
    assert found["history"]["xsam/alpha"] == exact[0.3]["history"]["xsam/alpha"]
    assert torch.equal(found["weights"], ranks[1][stage, name]["weights"])
    # The ascent is long beside bfloat16's spacing. It is the same at all stages, so that its parts are added up rightly.
    for key, most in (("xsam/seen_share", 1.01), ("xsam/seen_cosine", 1)):
        assert found["history"][key] == pytest.approx(ranks[0][2, "bf16"]["history"][key], abs=1e-3)
        assert len(found["history"][key]) == 1 and 0.99 < found["history"][key][0] < most
    assert not ranks[0][stage, "xsam"]["history"]["xsam/seen_cosine"]
    for rank in ranks:
        assert torch.equal(rank[stage, name]["model's own"], found["weights"].bfloat16().double())


@needs_deepspeed
@in_all_stages
@pytest.mark.parametrize("where", ["", ", offloaded"])
def test_resumed_runs_equal_uninterrupted_ones(ranks, stage, where):
    for rank in ranks:
        whole, resumed = rank[stage, f"whole{where}"], rank[stage, f"resumed{where}"]
        assert torch.equal(whole["weights"], resumed["weights"]) and torch.equal(
            whole["model's own"], whole["weights"]
        )
        assert (
            whole["history"]["xsam/alpha"] == resumed["history"]["xsam/alpha"]
            and 1 not in whole["history"]["xsam/alpha"]
        )


@needs_deepspeed
@in_all_stages
def test_after_an_exception_the_masters_are_whole_and_the_model_is_refused(ranks, tmp_path, stage):
    expected = result(run(tmp_path, "first only", max_steps=1, alpha=1.5))["weights"]
    parts = zip(*(rank[stage, "interrupted"]["masters"] for rank in ranks), strict=True)
    assert (flat([torch.cat(some) for some in parts]) - expected).abs().max() <= 1e-6
    for rank in ranks:
        said = rank[stage, "interrupted"]["said"]
        assert len(said) == 3 and all("start again from the last checkpoint" in text for text in said), said


@needs_deepspeed
@in_all_stages
def test_collectives_are_counted(ranks, stage):
    for rank in ranks:
        plain, xsam, search = (rank[stage, "collectives", name] for name in ("plain", "xsam", "a search"))
        assert plain["gathered"] >= plain["reduced"] >= sum(weight.numel() for weight in Network().parameters())
        assert xsam["reduced"] == search["reduced"] == 2 * plain["reduced"] + 12  # numbers of the log
        assert xsam["gathered"] == 2 * plain["gathered"] and search["gathered"] == (2 + 9) * plain["gathered"]


@needs_deepspeed
def test_deepspeeds_own_adamw_steps_against_the_same_direction(ranks):
    for rank, name in itertools.product(ranks, ("own", "own, offloaded")):
        own, torchs = rank[name], rank[2, "whole"]
        assert (own["weights"] - torchs["weights"]).abs().max() <= 1e-6
        assert own["history"]["xsam/alpha"] == torchs["history"]["xsam/alpha"]


@needs_deepspeed
def test_without_accumulation_no_sums_are_kept_in_the_hosts_memory(ranks, alone):
    for rank in ranks:
        found = rank["whole batch, offloaded"]
        assert (found["weights"] - alone["xsam"]["weights"]).abs().max() <= 1e-6
        assert found["sums of micro-batches"] == 0


@needs_deepspeed
def test_accelerate_configs_start(tmp_path):
    start = flat(tiny_gpt2(layers=1).parameters())
    settings = {**CONFIGURED, "per_device_train_batch_size": 16}
    full = XSAMTrainer(tiny_gpt2(layers=1), arguments(tmp_path, **settings), train_dataset=Tokens(32))
    full.train()
    moved = flat(full.model.parameters()) - start
    for stage in (2, 3):
        launched(f"zero{stage}", lambda stage=stage: configured(tmp_path / f"{stage}"), "--num_processes", "2")
        found = torch.load(tmp_path / f"{stage}" / "found.pt", weights_only=True)
        assert found["stage"] == stage and len(found["history"]["xsam/angle"]) == 2
        saved = load_file(tmp_path / f"{stage}" / "saved" / "model.safetensors")
        written = {name: tensor for name, tensor in saved.items() if "lm_head" not in name}
        assert sum(tensor.numel() for tensor in written.values()) == len(start)
        # Two updates in bfloat16 against two in float32.
        assert 1e-5 < (found["weights"] - start - moved).norm() / moved.norm() < 0.05


# --- what needs no DeepSpeed


def config(stage=2, zero=None, **settings):
    return {"zero_optimization": {"stage": stage, **(zero or {})}, **settings}


@pytest.mark.parametrize(
    "settings, precision, message",
    [
        (config(), "fp16", "loss scaling.*`bf16=True`"),
        (config(fp16={"enabled": True}), "no", "loss scaling.*`bf16=True`"),
        (config(stage=0), "no", "stage 0.*use DDP"),
        (config(3, {"offload_param": {"device": "cpu"}}), "no", "`zero_optimization.offload_param`"),
        (config(3, {"offload_optimizer": {"device": "nvme"}}), "no", "offload_optimizer` puts .* on 'nvme'.*'cpu'"),
        (
            config(3, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}),
            "no",
            "`zero_optimization.offload_optimizer.ratio`",
        ),
        (config(3, {"zero_quantized_weights": True}), "no", "`zero_optimization.zero_quantized_weights`"),
        (config(3, {"zero_quantized_gradients": True}), "no", "`zero_optimization.zero_quantized_gradients`"),
        (config(3, {"zero_hpz_partition_size": 8}), "no", "`zero_optimization.zero_hpz_partition_size`"),
        (config(3, {"mics_shard_size": 4}), "no", "`zero_optimization.mics_shard_size`"),
        (config(2, {"zenflow": {"topk_ratio": 0.1}}), "no", "`zero_optimization.zenflow`"),
        (config(bf16={"enabled": True, "check_grad_overflow": True}), "bf16", "`bf16.check_grad_overflow`"),
        (config(1, data_types={"grad_accum_dtype": "fp32"}), "bf16", "ZeRO-1 with `data_types`.*stage 2 or 3"),
        (config(torch_autocast={"enabled": True}), "no", "`torch_autocast`"),
        (config(compile={"deepcompile": True}), "no", "`compile`"),
        (config(tensor_parallel={"autotp_size": 2}), "no", "`tensor_parallel`"),
        (config(scheduler={"type": "WarmupLR"}), "no", "`scheduler`"),
        (config(optimizer={"type": "OneBitAdam"}), "no", "'OneBitAdam'.*AdamW"),
        (config(optimizer={"type": "Muon"}), "no", "'Muon'.*AdamW"),
    ],
)
def test_settings_that_were_not_tried_are_refused(settings, precision, message):
    with pytest.raises(NotImplementedError, match=message) as refused:
        deepspeed.check_settings(settings, precision)
    assert "DDP" in str(refused.value) or "FSDP2" in str(refused.value)


def test_settings_that_were_tried_or_ask_for_nothing_are_let_through():
    nowhere = {"device": "none", "nvme_path": None, "buffer_count": 4}
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 1.0}}
    zero = {"offload_optimizer": nowhere, "offload_param": nowhere, "zero_hpz_partition_size": 1, "overlap_comm": True}
    rest = {"fp16": {"enabled": False, "loss_scale": 0}, "train_batch_size": "auto", "optimizer": {"type": "AdamW"}}
    for stage in STAGES:
        deepspeed.check_settings(config(stage, zero, **rest), "bf16")
        deepspeed.check_settings(config(stage, offload, **rest), "no")


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """As it would be built under DeepSpeed."""
    monkeypatch.setattr(deepspeed, "version", lambda name: deepspeed.TRIED[-1])
    monkeypatch.setattr(deepspeed, "METHODS", {})
    trainer = build(tmp_path, "refused", rho=0.0)
    plugin = types.SimpleNamespace(deepspeed_config=config())
    trainer.accelerator = types.SimpleNamespace(
        scaler=None,
        distributed_type=DistributedType.DEEPSPEED,
        state=types.SimpleNamespace(deepspeed_plugin=plugin),
        parallelism_config=None,
        mixed_precision="bf16",
    )
    trainer.args.rho = 0.1
    return trainer


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("ascent_scope", "micro", "each process's own gradient"),
        ("perturbation", "vasso", "'vasso'.*not written into DeepSpeed's checkpoints"),
        ("perturbation", "fsam", "'fsam'.*not written into DeepSpeed's checkpoints"),
        ("perturbation", "stale", "'stale'.*not written into DeepSpeed's checkpoints"),
        ("perturbation_dtype", "stochastic", "rounds the moved weights itself"),
        ("torch_compile", True, "`torch_compile`"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(trainer, name, value, message):
    trainer.args.gradient_scale = "last"
    check_supported(trainer, trainer.xsam_arguments)
    setattr(trainer.args, name, value)
    with pytest.raises(NotImplementedError, match=message + ".*FSDP2"):
        check_supported(trainer, trainer.xsam_arguments)
    trainer.args.rho = 0.0
    check_supported(trainer, trainer.xsam_arguments)


def test_the_settings_of_the_trainer_are_looked_at(trainer):
    trainer.accelerator.state.deepspeed_plugin.deepspeed_config = config(stage=0)
    with pytest.raises(NotImplementedError, match="stage 0"):
        check_supported(trainer, trainer.xsam_arguments)
    trainer.accelerator.state.deepspeed_plugin.deepspeed_config = config()
    trainer.accelerator.mixed_precision = "fp16"
    with pytest.raises(NotImplementedError, match="loss scaling"):
        check_supported(trainer, trainer.xsam_arguments)


@pytest.mark.parametrize("version", ["0.19.7", "0.19.9", "0.20.0"])
def test_other_versions_are_refused(trainer, monkeypatch, version):
    monkeypatch.setattr(deepspeed, "version", lambda name: version)
    with pytest.raises(NotImplementedError, match=f"with {deepspeed.TRIED[-1]}, not with {version}.*FSDP2"):
        check_supported(trainer, trainer.xsam_arguments)


def test_a_name_that_is_gone_is_refused(trainer, monkeypatch):
    monkeypatch.setattr(deepspeed, "METHODS", {"gone.Optimizer": ("update_lp_params",)})
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.gone", types.SimpleNamespace(Optimizer=object))
    with pytest.raises(NotImplementedError, match="'update_lp_params'.*FSDP2"):
        check_supported(trainer, trainer.xsam_arguments)


@pytest.mark.parametrize(
    "engine, optimizer, changes, message",
    [
        ("PipelineEngine", "DeepSpeedZeroOptimizer", {}, "PipelineEngine.*FSDP2"),
        ("DeepSpeedEngine", "BF16_Optimizer", {}, "BF16_Optimizer.*FSDP2"),
        ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", {"has_moe_layers": True}, "experts.*FSDP2"),
        ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", {"loss_scale": 2.0}, "loss scaling.*FSDP2"),
        (
            "DeepSpeedEngine",
            "DeepSpeedZeroOptimizer",
            {"left_out": 1},
            "does not step the trainable weight 'first.weight'",
        ),
        ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", {"outside": 1}, "steps weights outside the model"),
        ("DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3", {}, "'fp16_groups'.*FSDP2"),
        ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", {"engine": ()}, "'was_step_applied'.*FSDP2"),
        ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", {"cpu_offload": True}, "'accumulated_grads_in_cpu'.*FSDP2"),
        ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", {"part": {}}, "'_index_in_param_group'.*FSDP2"),
        (
            "DeepSpeedEngine",
            "DeepSpeedZeroOptimizer",
            {"part": {"_index_in_param_group": 0}},
            "'hp_fragment'.*FSDP2",
        ),
    ],
)
def test_engines_that_were_not_tried_are_refused(engine, optimizer, changes, message):
    changes = {"has_moe_layers": False, "left_out": 0, "outside": 0, "engine": ("was_step_applied",), **changes}
    module = Network()
    for parameter in module.parameters():
        # Without a part in this process, or with one that has no attributes.
        parameter._hp_mapping = types.SimpleNamespace() if "part" in changes else None
        vars(parameter).update(changes.get("part", {}))
    group = [*list(module.parameters())[changes["left_out"] :], *map(torch.zeros, range(changes["outside"]))]
    names = {
        "averaged_gradients": {},
        "bit16_groups": [group],
        "cpu_offload": changes.get("cpu_offload", False),
        "dp_process_group": None,
        "loss_scale": changes.get("loss_scale", 1.0),
    }
    parts = {"module": module, "optimizer": type(optimizer, (), names)(), "has_moe_layers": changes["has_moe_layers"]}
    with pytest.raises(NotImplementedError, match=message):
        zero.ZeROWeights(type(engine, (), parts | dict.fromkeys(changes["engine"]))())


def test_find_rho_runs_without_deepspeed(trainer):
    trainer.accelerator.num_processes, trainer.is_deepspeed_enabled = 1, True
    with pytest.raises(NotImplementedError, match="without DeepSpeed"):
        find_rho(trainer)


# What zero.py reads of weights and engines that PyTorch or DeepSpeed document.
DOCUMENTED = {"device", "dtype", "module", "ndim", "numel", "optimizer", "step"}


def names_that_are_read(path):
    """
    The attributes of DeepSpeed's objects, by what zero.py calls them: `optimizer.name`, `self._optimizer.name`, and so on; also in the
    second argument of `getattr`.
    """
    held = {"engine", "mapping", "optimizer", "parameter", "kept_whole", "value", "_optimizer"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            of = node.value.value if isinstance(node.value, ast.Subscript) else node.value
            if getattr(of, "attr", getattr(of, "id", None)) in held:
                yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            if getattr(node.args[0], "id", None) in held:
                yield node.args[1].value


def test_names_of_deepspeed_are_in_the_list():
    tables = (deepspeed.METHODS, deepspeed.ATTRIBUTES, deepspeed.OFFLOADED, deepspeed.OF_PARAMETERS)
    listed = {name for table in tables for names in table.values() for name in names}
    listed |= {*deepspeed.OF_SLICES, *deepspeed.OF_ENGINES}
    assert set(names_that_are_read(Path(zero.__file__))) - DOCUMENTED == listed
    page = (Path(__file__).parents[1] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in listed) and f"DeepSpeed {deepspeed.TRIED[-1]}" in page
