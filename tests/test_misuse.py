"""What a careless caller gives the library: one sentence that says what is wrong, never a wrong number in silence."""

import copy
import dataclasses
import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys import Classifier, Points, train
from toys import arguments as training_arguments
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments

from xsam_hf import XSAMArguments, XSAMMixin, XSAMState, XSAMTrainer, xsam_gradient
from xsam_hf.trainer.callback import keep_lines_before


DATA = Points(8)


def update(net=None, weights=None, arguments=None, state=None, gradient=None, probe=None):
    net = Classifier() if net is None else net
    weights = net if weights is None else weights

    def loss():
        return net(DATA.x, DATA.y)["loss"]

    def gradient_of_loss():
        value = loss()
        value.backward()
        return value.detach()

    return xsam_gradient(
        weights,
        gradient_of_loss if gradient is None else gradient,
        loss if probe is None else probe,
        XSAMArguments() if arguments is None else arguments,
        XSAMState() if state is None else state,
    )


def in_place_of(**values):
    arguments = XSAMArguments()
    for name, value in values.items():
        setattr(arguments, name, value)
    return arguments


@pytest.mark.parametrize(
    "given, error, sentence",
    [
        # Set after it was made, as a schedule of the caller's does: the plain optimizer, or another method, in silence.
        ({"arguments": in_place_of(rho=float("nan"))}, ValueError, "`rho` is nan"),
        ({"arguments": in_place_of(rho=-1)}, ValueError, "`rho` is -1"),
        ({"arguments": in_place_of(rho="0.1")}, ValueError, "`rho` is '0.1'"),
        ({"arguments": in_place_of(perturbation="SAM")}, ValueError, "`perturbation` is 'SAM'"),
        ({"weights": torch.ones(3, requires_grad=True)}, TypeError, "weights are given as Tensor: give the model"),
        ({"weights": torch.optim.SGD(Classifier().parameters())}, TypeError, "weights are given as SGD"),
        ({"weights": Classifier().named_parameters()}, TypeError, "weights are given as tuple"),
        (
            {"weights": torch.optim.SGD(Classifier().parameters()).param_groups[0]},
            TypeError,
            "'params' is a list: give",
        ),
        ({"weights": {**dict(Classifier().named_parameters()), "lr": 0.1}}, TypeError, "'lr' is a float: give names"),
        ({"weights": [nn.Parameter(torch.ones(2, device="meta"))]}, ValueError, "'0' is on the meta device"),
        ({"state": XSAMState(alpha=50.0)}, ValueError, "`alpha` is 50, beyond `alpha_max` .2.*another checkpoint"),
        ({"weights": iter(())}, ValueError, "is empty after its first use"),
        ({"arguments": XSAMArguments(rho_exclude=[""])}, ValueError, "leaves no weight that is not excluded"),
    ],
)
def test_what_is_no_argument_is_named(given, error, sentence):
    with pytest.raises(error, match=sentence):
        update(**given)


@pytest.mark.parametrize(
    "returned, error, sentence",
    [
        (lambda loss: None, TypeError, "returned NoneType: let it return the loss"),
        (lambda loss: loss.item(), TypeError, "returned float"),
        (lambda loss: loss.expand(8), ValueError, r"returned a tensor of shape \(8,\)"),
        (lambda loss: loss + 0j, TypeError, "returned a loss of torch.complex64"),
        (lambda loss: loss.int(), TypeError, "returned a loss of torch.int32"),
    ],
)
def test_what_is_no_loss_is_named(returned, error, sentence):
    net = Classifier()

    def gradient():
        loss = net(DATA.x, DATA.y)["loss"]
        loss.backward()
        return returned(loss.detach())

    with pytest.raises(error, match=f"`gradient` {sentence}"):
        update(net, gradient=gradient)
    before = [weight.clone() for weight in net.parameters()]
    with pytest.raises(error, match=f"`probe` {sentence}"):
        update(net, probe=lambda: returned(net(DATA.x, DATA.y)["loss"].detach()))
    assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize("name", ["gradient", "probe"])
@pytest.mark.parametrize("given", [None, torch.ones(()), 0.5])
def test_what_cannot_be_called_is_named_before_the_first_pass(name, given):
    passes = []
    callables = {"gradient": lambda: passes.append(1), "probe": lambda: passes.append(1), name: given}
    for arguments in (
        XSAMArguments(),
        XSAMArguments(alpha=1.0, gradient_scale="slope_max"),
        XSAMArguments(perturbation="stale"),
    ):
        with pytest.raises(
            TypeError, match=f"^`{name}` is a {type(given).__name__}: give a function that takes nothing"
        ):
            xsam_gradient(Classifier(), callables["gradient"], callables["probe"], arguments, XSAMState())
    assert not passes


@pytest.mark.parametrize("fields", [{"alpha": 1.0}, {"direction": "lsam"}, {"rho": 0.0}])
def test_without_a_search_no_probe_is_needed(fields):
    net, state = Classifier(), XSAMState()

    def gradient():
        loss = net(DATA.x, DATA.y)["loss"]
        loss.backward()
        return loss.detach()

    for _ in range(2):
        net.zero_grad()
        xsam_gradient(net, gradient, None, XSAMArguments(**fields), state)
    with pytest.raises(TypeError, match="`probe` is a Tensor"):
        xsam_gradient(net, gradient, torch.ones(()), XSAMArguments(**fields), state)


def test_a_loss_of_one_element_is_a_loss():
    net = Classifier()
    reference = update(net)
    net.zero_grad()

    def gradient():
        loss = net(DATA.x, DATA.y)["loss"].reshape(1)
        loss.backward()
        return loss.detach()

    again = update(net, gradient=gradient, probe=lambda: net(DATA.x, DATA.y)["loss"].reshape(1))
    assert again.loss == reference.loss and again.alpha == reference.alpha and again.search == reference.search


def test_a_probe_that_returns_one_loss_again_is_no_search():
    net = Classifier()
    loss = net(DATA.x, DATA.y)["loss"]
    with pytest.raises(ValueError, match="`probe` returned the same tensor at every point"):
        update(net, probe=lambda: loss.detach())


def test_a_gradient_of_one_loss_again_is_refused():
    """Its second backward would be at the weights of the first, and XSAM the plain optimizer."""
    head = torch.nn.Linear(5, 3)
    loss = torch.nn.functional.cross_entropy(head(DATA.x), DATA.y)

    def once(made=loss):
        made.backward(retain_graph=True)
        return made.detach()

    with pytest.raises(ValueError, match="`gradient` returned the same tensor at moved weights"):
        xsam_gradient(head, once, once, XSAMArguments(), XSAMState())
    head.zero_grad()

    def anew():
        return once(torch.nn.functional.cross_entropy(head(DATA.x), DATA.y))

    assert xsam_gradient(head, anew, anew, XSAMArguments(alpha=1.0), XSAMState()).angle > 0
    with pytest.raises(ValueError, match="`gradient` returned the same tensor"):
        xsam_gradient(head, once, once, XSAMArguments(alpha=1.0), XSAMState())


def test_a_gradient_that_was_left_over_is_said(caplog):
    net, state = Classifier(), XSAMState()
    update(net, state=state)
    net.zero_grad()
    caplog.clear()  # of what it says about the counters of this model
    update(net, state=state)
    net.zero_grad(set_to_none=False)
    assert not update(net, state=XSAMState()).fell_back and not caplog.messages
    update(net, state=XSAMState())
    assert ["had a gradient before the update" in message for message in caplog.messages] == [True]


def test_a_later_pass_that_sees_no_batch_is_refused():
    data, model = Points(8), Classifier()
    start = [p.detach().clone() for p in model.parameters()]
    halves = [(data.x[:4], data.y[:4]), (data.x[4:], data.y[4:])]

    def over(batches):
        def gradient():
            whole = torch.zeros(())
            for x, y in batches:
                loss = model(x, y)["loss"] / 2
                loss.backward()
                whole = whole + loss.detach()
            return whole

        model.zero_grad()
        return xsam_gradient(model, gradient, None, XSAMArguments(rho=0.1, alpha=1.0), XSAMState())

    with pytest.raises(
        ValueError, match="A later pass of the update gave no weight a gradient, and the first one did"
    ):
        over(iter(halves))
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    assert over(halves).grad_norm_last > 0


class Shared(Classifier):
    """Two parameters in the same memory, as `b.weight.data = a.weight.data` leaves them."""

    def __init__(self):
        super().__init__()
        weight = next(self.parameters())
        self.other = nn.Parameter(weight.data)


def test_a_weight_that_is_computed_is_named():
    with pytest.raises(ValueError, match="'w' is computed from other tensors"):
        update(weights={"w": torch.ones(3, requires_grad=True) * 2})


def test_two_weights_in_the_same_memory_are_refused(tmp_path):
    memory = torch.randn(4, 4)
    halves = [nn.Parameter(memory[:, :2]), nn.Parameter(memory[:, 2:]), nn.Parameter(torch.empty(0))]
    update(weights=halves, gradient=lambda: sum(h.square().sum() for h in halves).backward() or torch.ones(()))
    for first, second in [(memory[:3], memory[2:]), (memory[:, :2], memory[:2])]:
        with pytest.raises(ValueError, match="'0' and '1' are two weights in the same memory"):
            update(weights=[nn.Parameter(first), nn.Parameter(second)])
    with pytest.raises(ValueError, match="in the same memory"):
        XSAMTrainer(Shared(), training_arguments(tmp_path), train_dataset=DATA)


@pytest.mark.parametrize("perturbation", ["vasso", "stale"])
def test_the_state_of_another_model_is_refused(perturbation):
    state, arguments = XSAMState(), XSAMArguments(perturbation=perturbation)
    update(arguments=arguments, state=state)
    name = next(iter(state.average))
    state.average[name] = torch.ones(2, 2)
    with pytest.raises(ValueError, match=f"average of '{name}' has the shape .* belongs to another model"):
        update(arguments=arguments, state=state)


@pytest.mark.parametrize("perturbation", ["vasso", "fsam", "stale"])
def test_one_state_for_two_models_of_one_shape_is_refused(perturbation):
    arguments = XSAMArguments(perturbation=perturbation)
    for keep in (True, False):  # the first model, beside the second
        state, first = XSAMState(), Classifier()
        update(first, arguments=arguments, state=state)
        first.zero_grad()
        if not keep:
            del first
        before = {name: part.clone() for name, part in state.average.items()}
        with pytest.raises(ValueError, match="average was made with another model, .* begin with a new XSAMState"):
            update(Classifier(), arguments=arguments, state=state)
        assert all(torch.equal(part, before[name]) for name, part in state.average.items())


def test_a_state_goes_on_with_its_model_and_with_one_that_it_is_loaded_for():
    arguments, net, state = XSAMArguments(perturbation="vasso"), Classifier(), XSAMState()

    def goes_on(weights, state):
        net.zero_grad()
        update(net, weights, arguments, state)

    goes_on(net, state)
    kept = {name: getattr(state, name) for name in ("alpha", "updates", "average", "average_of")}
    with torch.serialization.safe_globals([XSAMState]):
        torch.save(state, file := io.BytesIO())
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    copies = (XSAMState(**kept), copy.copy(state), copy.deepcopy(state), dataclasses.replace(state), loaded)
    for converted in (net.double(), net.float(), net.requires_grad_(True)):
        goes_on(converted, state)
    average = dict(state.average)
    for wrapped in (nn.ModuleList([net]), nn.ModuleList(net.children())):  # whose weights have other names
        with pytest.raises(
            ValueError, match="'first.bias', and no weight of the model is called so. What wraps a model"
        ):
            goes_on(wrapped, state)
        assert state.average == average
    net.first.requires_grad_(False)  # it still has that name
    goes_on(net, state)
    net.first.requires_grad_(True)
    net.load_state_dict({name: part.clone() for name, part in net.state_dict().items()}, assign=True)
    goes_on(net, state)
    listed = XSAMState()
    for _ in range(2):
        goes_on(nn.ParameterList(net.parameters()), listed)
    for known in copies:
        other = Classifier()
        update(other, arguments=arguments, state=known)
        other.zero_grad()
        with pytest.raises(ValueError, match="another model"):
            goes_on(net, known)


@pytest.mark.parametrize("begins", [1, 4])
def test_a_forward_pass_that_begins_to_write_into_a_weight_is_refused(begins):
    net, state = Classifier(), XSAMState()
    weight = next(net.parameters())

    def write(module, inputs):
        with torch.no_grad():
            weight.mul_(0.9)

    for number in range(1, 6):
        if number == begins:
            net.register_forward_pre_hook(write)
            with pytest.raises(NotImplementedError, match="writes into the trained weight"):
                update(net, state=state)
            break
        update(net, state=state)
        net.zero_grad()


def test_a_hook_that_steps_is_refused_from_any_update_on():
    net, state = Classifier(), XSAMState()
    for _ in range(3):
        update(net, state=state)
        net.zero_grad()
    for weight in net.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    with pytest.raises(NotImplementedError, match="register_post_accumulate_grad_hook"):
        update(net, state=state)


SETTINGS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "rho": 0.5, "perturbation": "vasso"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(folder, Classifier(), **SETTINGS)
    return folder / "checkpoint-2"


def test_a_damaged_state_is_not_resumed(tmp_path, checkpoint):
    file = checkpoint / "trainer_state.json"
    whole = file.read_text(encoding="utf-8")
    for change, sentence in [
        ({"alpha": float("nan")}, "`alpha` is nan"),
        ({"alpha": "x"}, "`alpha` is 'x'"),
        ({"alpha": -1.0}, "`alpha` is -1.0"),
        ({"search_due": "false"}, "`search_due` is 'false'"),
        ({"updates": "3"}, "`updates` is '3'"),
        ({"search_gain": float("inf")}, "`search_gain` is inf"),
        ({"news": 1}, "has news in XSAM's own state"),
        (None, "has a damaged trainer_state.json"),
    ]:
        state = json.loads(whole)
        attributes = state["stateful_callbacks"]["XSAMCallback"]["attributes"]
        attributes["xsam"] = [] if change is None else attributes["xsam"] | change
        file.write_text(json.dumps(state), encoding="utf-8")
        with pytest.raises(ValueError, match=sentence):
            train(tmp_path, Classifier(), resume=str(checkpoint), **SETTINGS)
    file.write_text(whole, encoding="utf-8")


def test_a_damaged_average_is_not_resumed(tmp_path, checkpoint):
    file = checkpoint / "xsam_state.safetensors"
    whole = load_file(file)
    for change, sentence in [
        (lambda part: part.fill_(torch.nan), "not finite for 'first.bias'"),
        (lambda part: part.int(), "torch.int32 for 'first.bias'"),
        (lambda part: part + 0j, "torch.complex64 for 'first.bias'"),
    ]:
        save_file({**whole, "first.bias": change(whole["first.bias"].clone())}, file)
        with pytest.raises(ValueError, match=f"{sentence}: resume from another checkpoint"):
            train(tmp_path, Classifier(), resume=str(checkpoint), **SETTINGS)
    save_file(whole, file)


def test_a_damaged_file_of_searches_costs_the_damaged_lines_alone(tmp_path):
    file = tmp_path / "xsam_search.jsonl"
    file.write_bytes(b'{"step": 1}\n[]\nnull\n{"step": "x"}\n{}\n\xff\xfe\n{"step": 2}\n{"step": 5}\n')
    keep_lines_before(file, 3)
    assert file.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'


# --- what would be passed over


def test_fields_set_on_plain_arguments_are_refused(tmp_path):
    plain = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    XSAMTrainer(Classifier(), plain)  # the defaults, as documented
    plain.alpha = 1.0
    with pytest.raises(ValueError, match=r"`args\.alpha` was set, and TrainingArguments has no such field"):
        XSAMTrainer(Classifier(), plain)


@pytest.mark.parametrize("name, value", [("rho", 0.3), ("rho", 0.0), ("alpha", 1.0)])
def test_fields_that_a_callback_sets_on_plain_arguments_are_refused(tmp_path, name, value):
    class Sets(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                setattr(args, name, value)

    plain = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=4, save_strategy="no")
    trainer = XSAMTrainer(Classifier(), plain, train_dataset=Points(), callbacks=[Sets()])
    with pytest.raises(ValueError, match=rf"`args\.{name}` was set, and TrainingArguments has no such field"):
        trainer.train()
    assert trainer.state.global_step == 2
    train(tmp_path, Classifier(), callbacks=[Sets()], rho=0.1, max_steps=4)  # which has the fields


def test_a_range_without_an_update_is_refused(tmp_path):
    with pytest.raises(ValueError, match="of 2 updates none lies between them"):
        train(tmp_path, Classifier(), rho=0.5, sharpness_start=0.9, max_steps=2)
    train(tmp_path, Classifier(), rho=0.5, sharpness_start=0.5, max_steps=2)
    train(tmp_path, Classifier(), rho=0, sharpness_start=0.9, max_steps=2)


@pytest.mark.parametrize("wrong", [{"arguments": {"rho": 0.1}}, {"state": {"alpha": 1.0}}])
def test_arguments_and_state_of_another_kind_are_refused(wrong):
    with pytest.raises(TypeError, match="give an XSAMArguments, and an XSAMState"):
        update(**wrong)


def test_the_mixin_behind_the_trainer_is_refused():
    for bases in ((Trainer, XSAMMixin), (Seq2SeqTrainer, XSAMMixin), (type("Mine", (Trainer,), {}), XSAMMixin)):
        with pytest.raises(TypeError, match=r"Plain has the Trainer in front of XSAMMixin.*put XSAMMixin in front"):
            type("Plain", bases, {})

    class Mine(Trainer):
        pass

    class Alone(XSAMMixin):
        pass

    for bases in ((XSAMMixin, Mine), (Mine, XSAMTrainer), (Alone, Mine)):
        type("Right", bases, {})


@pytest.mark.parametrize("form", [list, lambda net: net.parameters(), dict])
@pytest.mark.parametrize("begins", [1, 4])
@pytest.mark.parametrize("perturbation", ["sam", "stale"])
def test_a_gradient_that_steps_the_optimizer_is_refused_whatever_the_weights_are_given_as(form, begins, perturbation):
    net, state = Classifier(), XSAMState()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    arguments = XSAMArguments(rho_exclude=["second"] if form is dict else None, perturbation=perturbation)

    def gradient(step):
        net.zero_grad()
        loss = net(DATA.x, DATA.y)["loss"]
        loss.backward()
        if step:
            optimizer.step()
        return loss.detach()

    for number in range(1, begins + 1):
        weights = (
            dict(net.named_parameters()) if form is dict else form(net.parameters()) if form is list else form(net)
        )
        if number < begins:  # zero_grad and backward are no writes into weights
            update(net, weights, arguments, state, lambda: gradient(False))
        else:
            with pytest.raises(
                NotImplementedError, match="writes into the trained weight .*step .* no place in a pass"
            ):
                update(net, weights, arguments, state, lambda: gradient(True))
    # With XSAM off nothing is put back, and `gradient` may do what it likes.
    update(net, list(net.parameters()), XSAMArguments(rho=0), XSAMState(), lambda: gradient(True))


@pytest.mark.parametrize("perturbation", ["vasso", "fsam", "stale"])
def test_an_average_that_is_none_is_refused_before_it_is_used(perturbation):
    arguments, state, net = XSAMArguments(perturbation=perturbation), XSAMState(), Classifier()
    update(net, arguments=arguments, state=state)
    kept, one = {"updates": 1, "average_of": perturbation}, torch.ones(7)

    for wrong, sentence in (
        ({"average": [one]}, r"`average` is \[tensor.*: give a dictionary"),
        ({"average": None}, "`average` is None: give a dictionary"),
        ({"average": {"first.bias": "x"}}, "`average` is {'first.bias': 'x'}: give a dictionary"),
        ({"average": {"first.bias": one.int()}}, "'first.bias' has torch.int32, and the weight torch.float32"),
        ({"average": {"first.bias": one + 0j}}, "'first.bias' has torch.complex64"),
        ({"average": {"first.bias": one * torch.nan}}, "'first.bias' has numbers that are not finite"),
        (
            {"average": {"first.bias": one, "module.first.bias": one}},
            "'module.first.bias', and no weight of the model",
        ),
        ({"average": {"first.bias": one}, "average_of": None}, "`average_of`, which perturbation made it, is None"),
    ):
        other = Classifier()
        with pytest.raises(ValueError, match=sentence):
            update(other, arguments=arguments, state=XSAMState(**{**kept, **wrong}))
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), Classifier().parameters(), strict=True))
    update(Classifier(), arguments=arguments, state=XSAMState(**kept, average=dict(state.average)))
    update(Classifier(), arguments=arguments, state=XSAMState(**kept, average={"first.bias": one.bfloat16()}))


def test_a_sparse_gradient_of_an_excluded_weight_is_named():
    embedding, head = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)

    def gradient():
        loss = head(embedding(torch.arange(4))).square().mean()
        loss.backward()
        return loss.detach()

    for weights in (nn.ModuleList([embedding, head]), [*embedding.parameters(), *head.parameters()]):
        excluded = XSAMArguments(rho_exclude=[r"0\.weight"]) if isinstance(weights, nn.Module) else XSAMArguments()
        with pytest.raises(NotImplementedError, match="A gradient is sparse .* `sparse=False`"):
            update(weights=weights, arguments=excluded, gradient=gradient)


def test_an_alpha_of_the_grid_is_gone_on_from():
    for alpha_max, samples, alpha in ((2.0, 21, 2.0), (0.5, 21, 1.0), (1.1, 4, None), (3.0, 21, 3.0)):
        arguments = XSAMArguments(alpha_max=alpha_max, alpha_samples=samples)
        update(arguments=arguments, state=XSAMState(alpha=arguments.alphas[-1] if alpha is None else alpha))
    update(arguments=XSAMArguments(alpha=1.0), state=XSAMState(alpha=50.0))  # nobody reads it


def test_where_the_methods_fields_are_read_from(tmp_path):
    class Mine(XSAMTrainer):
        xsam_arguments = XSAMArguments(rho=0.2)

    def build(cls, args):
        return cls(Classifier(), args, train_dataset=DATA)

    ours = training_arguments(tmp_path, rho=0.7)
    for cls, args in ((Mine, ours), (Mine, training_arguments(tmp_path)), (type("Off", (Mine,), {"xsam_arguments": XSAMArguments(rho=0)}), ours)):  # fmt: skip
        with pytest.raises(ValueError, match=r"`args\.rho` is 0.*which is read instead, has 0"):
            build(cls, args)
    run = build(Mine, training_arguments(tmp_path, rho=0.2, max_steps=1))
    run.args.rho = 0.3
    with pytest.raises(ValueError, match=r"`args\.rho` is 0.3, and `xsam_arguments` of Mine"):
        run.train()
    plain = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    assert build(Mine, plain).xsam_arguments.rho == 0.2 and build(XSAMTrainer, ours).xsam_arguments.rho == 0.7
    for wrong in ({"rho": 0.2}, {0.2}, None):
        with pytest.raises(TypeError, match=r"`xsam_arguments` of Wrong is .*: give `xsam_arguments = XSAMArguments"):
            build(type("Wrong", (XSAMTrainer,), {"xsam_arguments": wrong}), plain)
    with pytest.raises(AttributeError, match=r"is read from `args`: set the fields there, `trainer\.args\.rho = 0.1`"):
        build(XSAMTrainer, ours).xsam_arguments = XSAMArguments()


def test_an_optimizer_that_climbs_is_refused(tmp_path):
    def build(maximize, rho, given):
        net = Classifier()
        if given:
            how = {"optimizers": (torch.optim.SGD(net.parameters(), lr=0.1, maximize=maximize), None)}
        else:
            how = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "maximize": maximize})}
        return XSAMTrainer(net, training_arguments(tmp_path, rho=rho), train_dataset=DATA, **how)

    for given in (True, False):
        with pytest.raises(NotImplementedError, match=r"The optimizer climbs \(`maximize=True`\)"):
            build(True, 0.1, given)
        build(True, 0, given)
        build(False, 0.1, given)


# --- fields that nothing reads


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"vasso_decay": 0.2}, "`vasso_decay` (0.2) where `perturbation` is sam"),
        ({"asam_scope": "all", "perturbation": "fsam"}, "`asam_scope` (all) where `perturbation` is fsam"),
        (
            {"alpha": 1.0, "rho_max": 3.0, "alpha_samples": 5},
            "`rho_max` (3.0), `alpha_samples` (5) where `alpha` is 1.0",
        ),
        ({"alpha": 1.5, "alpha_search_steps": 0.1}, "`alpha_search_steps` (0.1) where `alpha` is 1.5"),
        ({"direction": "lsam", "rho_max": 0.3}, "`rho_max` (0.3) where `direction` is lsam"),
        (
            {"direction": "msam", "alpha_max": 3.0, "fsam_sigma": 0.5},
            "`alpha_max` (3.0) where `direction` is msam; nor `fsam_sigma` (0.5) where `perturbation` is sam",
        ),
        ({"rho": 0, "alpha": 1.0, "perturbation": "asam"}, "`perturbation` (asam), `alpha` (1.0) where `rho` is 0"),
        ({}, None),
        ({"rho": 0}, None),
        ({"rho": 0.3, "rho_max": 3.0, "alpha_samples": 5, "alpha_search_steps": 2, "alpha_max": 1.0}, None),
        ({"alpha": 3.0, "alpha_max": 3.0}, None),
        ({"alpha": 1.0, "rho_max": 3.0, "gradient_scale": "slope_max"}, None),
        ({"perturbation": "fsam", "fsam_sigma": 0.5, "fsam_lambda": 0.5}, None),
        ({"perturbation": "stale", "stale_decay": 0.0, "alpha": 1.0}, None),
    ],
)
def test_fields_that_nothing_reads_are_told_once(tmp_path, caplog, fields, told):
    expected = [] if told is None else [f"Nothing reads {told}: leave out what was not meant for another run."]

    def said():
        messages = [message for message in caplog.messages if "Nothing reads" in message]
        caplog.clear()
        return messages

    state, net = XSAMState(), Classifier()
    for _ in range(2):
        update(net, arguments=XSAMArguments(**fields), state=state)
        net.zero_grad()
    assert said() == expected
    train(tmp_path, Classifier(), max_steps=2, save_strategy="no", **fields)
    assert said() == expected
