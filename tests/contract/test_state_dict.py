"""What is in a `state_dict` does not change while a model trains, and bears what is done to it."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_flatten

import deq_phantom_plugin as dpp
import processes
from conftest import DRIVERS
from deq_phantom_plugin._plumbing.extras import why_not
from host_cases import CASES

DRIVER = DRIVERS / "state_dict.py"
WARM = "ift(warm_start=True, tol=1e-6, max_iter=100)"
needs_transformers = pytest.mark.skipif(
    bool(why_not("transformers.modeling_utils")), reason=why_not("transformers.modeling_utils")
)


class Net(nn.Module):
    """An equilibrium of a loop of one's own, with the memory before the weights."""

    def __init__(self, grad=WARM):
        super().__init__()
        self.memory, self.grad = dpp.Memory(), grad
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        func = lambda h: torch.tanh(0.5 * self.linear(h) + x)  # noqa: E731
        h = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(60):
                h = func(h)
        return dpp.attach(func, h, self.grad, dpp.Context(memory=self.memory))


def trained(model=None, rows=3):
    """A model after a step that leaves a warm start."""
    model = Net() if model is None else model
    model(torch.randn(rows, 4)).square().sum().backward()
    return model


def shapes(model):
    return {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}


def steps(model):
    return [m.step for m in model.modules() if isinstance(m, dpp.Memory)]


# --- the number ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.skipif(bool(c.missing), reason=c.missing)) for c in CASES],
    ids=lambda case: case.name,
)
def test_keys_and_shapes_stay_the_same_in_training(case):
    with dpp.enabled(case.name):
        model = case.model("jfb")
        dpp.set_grad(model, "jfb")  # not all hosts remember anything before
        before = shapes(model)
        assert sum(name.endswith("step") for name in before) == len(steps(model)) > 0
        for step, grad in enumerate([WARM, "guard('ift')", "schedule({0: 'upg', 9: 'npg'})"]):
            dpp.set_grad(model, grad)
            dpp.set_step(model, step)
            case.gradients(model)
            assert shapes(model) == before


def test_the_step_is_one_number_in_double_precision():
    model = Net()
    assert list(model.state_dict()) == ["memory.step", "linear.weight", "linear.bias"]
    assert model.state_dict()["memory.step"] == -1
    dpp.set_step(model, 2**24 + 1)  # which a float32 does not tell from its neighbours
    for changed in (model, model.half(), model.to(torch.bfloat16), model.double()):
        number = changed.state_dict()["memory.step"]
        assert number == 2**24 + 1
        assert (number.dtype, number.shape, number.device.type) == (torch.float64, (), "cpu")
    with torch.inference_mode():
        saved = model.state_dict()
    saved["memory.step"].mul_(2)
    assert model.memory.step == 2**24 + 1
    assert not list(model.buffers())


def test_equilibria_with_integers_get_theirs_when_they_are_switched():
    torchdeq = pytest.importorskip("torchdeq")
    with dpp.enabled("torchdeq"):
        deq = torchdeq.get_deq(grad=2, n_states=2)
        assert list(deq.state_dict()) == []
        dpp.set_grad(deq, ["upg", 1])
        keys = list(deq.state_dict())
        assert keys == ["grad_memory.0.step", "grad_memory.1.step"]
        for spec in (3, "npg"):
            dpp.set_grad(deq, spec)
            assert list(deq.state_dict()) == keys


@pytest.mark.parametrize("step", [2**53 + 1, 10**400])
def test_a_step_that_no_float64_holds_is_refused(step):
    with pytest.raises(ValueError, match=r"expected a whole number of at least 0, at most 2\*\*53"):
        dpp.set_step(Net(), step)


# --- averages -----------------------------------------------------------------------------------


def in_order(old, new, decay):
    """timm's ModelEmaV2."""
    for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True):
        a.copy_(decay * a + (1 - decay) * b)


def in_groups(old, new, decay):
    """timm's ModelEmaV3."""
    pairs = list(zip(old.state_dict().values(), new.state_dict().values(), strict=True))
    assert all(a.is_floating_point() for a, _ in pairs)
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], weight=1 - decay)


def in_place(old, new, decay):
    """Scale and add what is there."""
    average = {key: value.clone() for key, value in old.state_dict().items()}
    for key, value in new.state_dict().items():
        average[key].mul_(decay).add_(value, alpha=1 - decay)
    old.load_state_dict(average)


@pytest.mark.parametrize("average", [in_order, in_groups, in_place])
def test_averages_of_a_model_in_training(average):
    new = trained().double()
    old = copy.deepcopy(new)
    want = copy.deepcopy(list(new.parameters()))
    for step in (1000, 2000):
        dpp.set_step(new, step)
        with torch.no_grad():
            for p, w in zip(new.parameters(), want, strict=True):
                p.add_(torch.randn_like(p))
                w.mul_(0.9).add_(0.1 * p)
            average(old, new, 0.9)
        trained(new.float(), rows=step // 1000).double()  # warm starts of another shape each time
    torch.testing.assert_close(list(old.parameters()), want)
    if average is in_place:  # from -1: 0.1 * 1000 - 0.9 is 99.1, and 0.9 * 99 + 200 is 289.1
        assert old.memory.step == 289


@pytest.mark.parametrize("use_buffers", [False, True])
def test_torchs_averaged_model(use_buffers):
    model = trained()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    before = model.linear.weight.detach().clone()
    for step in range(3):
        dpp.set_step(model, step)
        trained(model)
        with torch.no_grad():
            model.linear.weight.add_(1)
        average.update_parameters(model)
    # The first update copies: w + 1, then halfway to w + 2, then halfway to w + 3.
    torch.testing.assert_close(average.module.linear.weight, before + 2.25)
    resumed = AveragedModel(Net(), use_buffers=use_buffers)
    resumed.load_state_dict(average.state_dict())
    torch.testing.assert_close(resumed.module.linear.weight, before + 2.25)


# --- what loads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    ("saved", "step"),
    [
        (torch.tensor(5), 5),
        (torch.tensor(5, dtype=torch.int32), 5),
        (torch.tensor(11.5 + 1e-3, dtype=torch.float64), 12),
        (torch.tensor(6.75, dtype=torch.bfloat16), 7),
        (7, 7),
        (6.9, 7),
        (torch.tensor(-1.0), None),
        (torch.tensor(-0.3), None),
        (-1, None),
        ("missing", None),
    ],
)
def test_any_number_loads(saved, step, strict, assign):
    model = Net()
    dpp.set_step(model, 3)
    state = model.state_dict()
    del state["memory.step"]
    if saved != "missing":
        state["memory.step"] = saved
    model.load_state_dict(state, strict=strict, assign=assign)
    assert model.memory.step == step
    assert step is None or type(model.memory.step) is int


def test_checkpoints_of_0_1_load_with_their_warm_starts():
    model = Net()
    warm = torch.randn(3, 4)
    state = {**Net().state_dict(), "memory.step": torch.tensor(3)}
    state["memory.warm_start.adjoint_0"] = warm
    assert model.load_state_dict(state).unexpected_keys == []
    assert model.memory.step == 3
    assert torch.equal(model.memory.warm_start("adjoint_0", warm), warm)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"memory.other"'):
        model.load_state_dict({**state, "memory.other": warm})


def test_a_model_without_the_plugin_loads_the_rest():
    state = Net().state_dict()
    plain = nn.Module()
    plain.linear = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"memory.step"'):
        plain.load_state_dict(state)
    plain.load_state_dict({key: x for key, x in state.items() if not key.endswith("memory.step")})


def test_a_memory_that_was_pickled_by_0_1_is_whole():
    memory = pickle.loads(pickle.dumps(dpp.Memory()))
    for name in ("histories", "_on_meta"):
        del memory.__dict__[name]
    memory = pickle.loads(pickle.dumps(memory))
    assert memory.state_dict() == {"step": -1}
    assert dpp.memory_state_dict(memory) == dpp.memory_state_dict(dpp.Memory())


# --- the meta device, and who builds models there -----------------------------------------------


def test_a_model_made_empty_has_no_number_until_it_is_put_to_use():
    """As Accelerate and Transformers 4 make it: each parameter goes to the meta device."""
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        model = nn.ModuleDict({"layer": nn.Linear(2, 2), "memory": dpp.Memory()})
    assert sorted(model.state_dict()) == ["layer.bias", "layer.weight"]
    model.load_state_dict(nn.ModuleDict({"layer": nn.Linear(2, 2)}).state_dict(), assign=True)
    assert "memory.step" in model.eval().state_dict()


def test_on_the_meta_device_there_is_no_number_and_none_is_missed():
    with torch.device("meta"):
        model = Net()
    assert list(model.state_dict()) == ["linear.weight", "linear.bias"]
    real = Net()
    dpp.set_step(real, 4)
    model.load_state_dict(real.state_dict(), assign=True)
    assert list(model.state_dict()) == list(real.state_dict())
    assert model.memory.step == 4
    weights = {key: value for key, value in real.state_dict().items() if "step" not in key}
    model.to("meta").load_state_dict(weights, assign=True)
    assert list(model.state_dict()) == list(real.state_dict())
    assert model.memory.step == 4
    assert "memory.step" in model.to("meta").to_empty(device="cpu").state_dict()


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_models_with_memories_of_their_own(tmp_path, dtype):
    from transformers import PreTrainedConfig, PreTrainedModel

    class Model(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.net = Net()
            self.post_init()

    model = Model(PreTrainedConfig())
    dpp.set_step(model, 4)
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, dtype=dtype)
    twin = copy.deepcopy(loaded)
    assert loaded.net.linear.weight.dtype == dtype
    torch.testing.assert_close(loaded.net.linear.weight, model.net.linear.weight.to(dtype))
    dpp.set_step(loaded, 9)
    assert list(loaded.state_dict()) == list(twin.state_dict()) == list(model.state_dict())


@needs_transformers
def test_our_language_model_is_loaded_without_a_word(tmp_path):
    from deq_phantom_plugin.adapters.transformer import DEQTransformerForCausalLM

    model = language_model("upg")
    dpp.set_step(model, 4)
    for state in (None, {k: v for k, v in model.state_dict().items() if "memory" not in k}):
        model.save_pretrained(tmp_path, state_dict=state)
        loaded, info = DEQTransformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert list(loaded.state_dict()) == list(model.state_dict())
        assert steps(loaded) == [None]


@pytest.mark.skipif(bool(why_not("accelerate")), reason="no Accelerate")
@pytest.mark.parametrize("buffers", [False, True])
def test_accelerate_offloads_models_with_memories(buffers, tmp_path):
    import accelerate

    model, x = Net("jfb").eval(), torch.randn(2, 4)
    want, keys = model(x).detach(), list(model.state_dict())
    device = torch.device("cpu")
    for offload, options in (
        (accelerate.cpu_offload, {}),
        (accelerate.disk_offload, {"offload_dir": tmp_path}),
    ):
        away = copy.deepcopy(model)
        away.grad = lambda func, equilibrium, context: equilibrium  # F is outside the hooks
        away = offload(away, execution_device=device, offload_buffers=buffers, **options)
        with torch.no_grad():
            torch.testing.assert_close(away(x), want)
        assert list(away.state_dict()) == keys


# --- what is kept besides the step --------------------------------------------------------------


def same(got, want):
    """Whether two nestings are the same, tensors to the bit."""
    (a, structure), (b, other) = tree_flatten(got), tree_flatten(want)
    assert structure == other
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def kept():
    """A model that keeps something of every kind."""
    model = trained()
    dpp.set_step(model, 5)
    model.memory.failures["adjoint"] += 2
    model.memory.histories["residual"] = {
        "values": [0.5, (1, None)],
        "mean": torch.ones(2),
        "a": "b",
    }
    return model


def test_all_that_is_kept_goes_through_a_file_and_the_step_does_not():
    model, other = kept(), Net()
    file = io.BytesIO()
    torch.save(dpp.memory_state_dict(model), file)
    file.seek(0)
    dpp.load_memory_state_dict(other, torch.load(file, weights_only=True))
    same(dpp.memory_state_dict(other), dpp.memory_state_dict(model))
    assert list(dpp.memory_state_dict(model)["memory"]["warm_starts"]) == ["adjoint_0"]
    assert dpp.failures(other) == {"forward": 0, "adjoint": 2}
    assert other.memory.step is None
    # What was loaded is no part of what it was loaded from.
    other.memory.histories["residual"]["values"].append(1)
    other.memory.histories["residual"]["mean"].zero_()
    assert model.memory.histories["residual"]["values"] == [0.5, (1, None)]
    assert model.memory.histories["residual"]["mean"].sum() == 2
    dpp.load_memory_state_dict(other, {})
    assert not any(dpp.memory_state_dict(other)["memory"].values())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, AveragedModel, nn.Sequential])
def test_wrapped_models_have_the_same_names(wrap):
    source, plain = kept(), Net()
    if wrap is nn.Sequential:  # which is no wrapper
        with pytest.raises(ValueError, match=r"'memory' names no memory of Sequential.*'0.memory'"):
            dpp.load_memory_state_dict(wrap(plain), dpp.memory_state_dict(source))
        return
    state = dpp.memory_state_dict(wrap(source))
    same(state, dpp.memory_state_dict(source))
    dpp.load_memory_state_dict(plain, state)
    same(dpp.memory_state_dict(plain), state)
    wrapped = wrap(Net())
    dpp.load_memory_state_dict(wrapped, {f"module.{key}": kept for key, kept in state.items()})
    same(dpp.memory_state_dict(wrapped), state)


def test_a_module_that_is_called_module_keeps_its_name_where_it_is_needed():
    model = nn.Module()
    model.memory, model.module = dpp.Memory(), Net()
    model.module.memory.failures["forward"] = 3
    state = dpp.memory_state_dict(model)
    assert list(state) == ["memory", "module.memory"]
    other = copy.deepcopy(model)
    other.module.memory.failures.clear()
    dpp.load_memory_state_dict(other, state)
    assert (other.memory.failures["forward"], other.module.memory.failures["forward"]) == (0, 3)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "None is no dict; expected what dpp.memory_state_dict returns"),
        ([], "expected what dpp.memory_state_dict returns"),
        ({"deq": {}}, "'deq' names no memory of Net; there are 'memory'"),
        ({3: {}}, "3 names no memory of Net"),
        ({"memory": {}, "module.memory": {}}, "'module.memory' names no memory"),
        ({"memory": 3}, "memory is 3; expected a dict of 'warm_starts', 'histories', 'failures'"),
        ({"memory": {"step": 3}}, "memory has the unknown part 'step'; there are 'warm_starts'"),
        ({"memory": {"failures": 3}}, r"memory\.failures is 3; expected a dict"),
        ({"memory": {"failures": {"adjoint": -1}}}, r"memory\.failures\.adjoint is -1; expected a"),
        ({"memory": {"failures": {"adjoint": 1.0}}}, r"memory\.failures\.adjoint is 1\.0"),
        ({"memory": {"failures": {"x": 1}}}, r"memory\.failures\.x is unknown; there are"),
        (
            {"memory": {"warm_starts": {"a": "b"}}},
            r"memory\.warm_starts\.a is 'b'; expected a dens",
        ),
        ({"memory": {"warm_starts": {"a": torch.tensor(1)}}}, r"memory\.warm_starts\.a is tensor"),
        ({"memory": {"warm_starts": {1: torch.ones(1)}}}, "expected a dict with names as keys"),
        ({"memory": {"histories": {"a": nn.Linear(1, 1)}}}, r"memory\.histories\.a is Linear.*exp"),
        ({"memory": {"histories": {"a": {"b": {1: 2}}}}}, r"memory\.histories\.a\.b is \{1: 2\}"),
        ({"memory": {"histories": {"a": torch.ones(1, device="meta")}}}, r"histories\.a is tensor"),
    ],
)
def test_what_no_memory_keeps_is_refused_and_changes_nothing(state, message):
    model = kept()
    before = copy.deepcopy(dpp.memory_state_dict(model))
    with pytest.raises(ValueError, match=message):
        dpp.load_memory_state_dict(model, state)
    same(dpp.memory_state_dict(model), before)


def test_one_bad_memory_keeps_the_others_from_loading():
    model = nn.ModuleList([kept(), kept()])
    state = dpp.memory_state_dict(nn.ModuleList([Net(), Net()]))
    state["1.memory"]["failures"] = {"adjoint": "many"}
    before = copy.deepcopy(dpp.memory_state_dict(model))
    with pytest.raises(ValueError, match=r"1\.memory\.failures\.adjoint is 'many'"):
        dpp.load_memory_state_dict(model, state)
    same(dpp.memory_state_dict(model), before)


def test_lists_within_lists_without_an_end_are_refused():
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match=r"memory\.histories\.a is"):
        dpp.load_memory_state_dict(Net(), {"memory": {"histories": {"a": endless}}})


def test_a_model_is_no_state():
    for function in (dpp.memory_state_dict, lambda m: dpp.load_memory_state_dict(m, {})):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
            function(3)


def test_training_goes_on_with_the_warm_starts():
    x = torch.randn(3, 4)

    def products(model):
        counts = []
        func = lambda h: torch.tanh(0.9 * model.linear(h) + x)  # noqa: E731
        h = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(200):
                h = func(h)
        context = dpp.Context(memory=model.memory, monitor=lambda stats: counts.append(stats.n_vjp))
        dpp.attach(func, h, WARM, context).sum().backward()
        return counts[0]

    model = Net()
    cold = products(model)
    resumed, bare = Net(), Net()
    for other in (resumed, bare):
        other.load_state_dict(model.state_dict())
    dpp.load_memory_state_dict(resumed, dpp.memory_state_dict(model))
    assert products(resumed) < products(bare) == cold


# --- Transformers' Trainer ----------------------------------------------------------------------


def language_model(grad):
    from deq_phantom_plugin.adapters.transformer import (
        DEQTransformerConfig,
        DEQTransformerForCausalLM,
    )

    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 16}
    config = DEQTransformerConfig(num_attention_heads=2, grad=grad, f_max_iter=20, **sizes)
    return DEQTransformerForCausalLM(config)


def train(folder, total=8, resume=None, checkpoint=None):
    """Train on one batch with a loose tolerance, so that the first guess can be told from g."""
    from transformers import Trainer, TrainingArguments

    from deq_phantom_plugin.adapters.transformer import SetStep

    ids = torch.randint(1, 13, (1, 6), generator=torch.Generator().manual_seed(0)).expand(32, 6)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        logging_steps=1,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        language_model("ift(warm_start=True, tol=0.3)"),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[SetStep(checkpoint)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@needs_transformers
def test_a_resumed_trainer_goes_on_with_the_warm_starts(tmp_path):
    whole = train(tmp_path / "whole")
    saved = tmp_path / "whole" / "checkpoint-4"
    file = saved / "deq_phantom_memory.pt"
    held = torch.load(file, weights_only=True)["model.deq.grad_memory.0"]
    assert list(held["warm_starts"]) == ["adjoint_0"]
    assert train(tmp_path / "whole", resume=str(saved)) == pytest.approx(whole, abs=1e-6)
    elsewhere = train(tmp_path / "other", resume=str(saved), checkpoint=saved)
    assert elsewhere == pytest.approx(whole, abs=1e-6)
    file.unlink()  # as in checkpoints of 0.1
    cold = train(tmp_path / "whole", resume=str(saved))
    assert cold[:4] == pytest.approx(whole[:4], abs=1e-6)
    assert cold != pytest.approx(whole, abs=1e-6)


@needs_transformers
def test_each_process_of_a_trainer_has_a_file_of_its_own(tmp_path):
    from deq_phantom_plugin.adapters.transformer import SetStep

    callback, state = SetStep(), SimpleNamespace(global_step=4)
    models = [kept(), kept()]
    for rank, model in enumerate(models):
        args = SimpleNamespace(output_dir=str(tmp_path), process_index=rank)
        callback.on_save(args, state, None, model=model)
    assert not list(tmp_path.iterdir())  # no checkpoint, no file
    (tmp_path / "checkpoint-4").mkdir()
    for rank, model in enumerate(models):
        args = SimpleNamespace(output_dir=str(tmp_path), process_index=rank)
        callback.on_save(args, state, None, model=model)
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert names == {"deq_phantom_memory.pt", "deq_phantom_memory_1.pt"}
    for rank, model in enumerate(models):
        other = Net()
        args = SimpleNamespace(output_dir=str(tmp_path), process_index=rank)
        for step, there in ((0, False), (4, True)):  # a run from the beginning loads nothing
            callback.on_train_begin(args, SimpleNamespace(global_step=step), None, model=other)
            assert bool(dpp.memory_state_dict(other)["memory"]["warm_starts"]) == there
        same(dpp.memory_state_dict(other), dpp.memory_state_dict(model))


# --- strategies in files ------------------------------------------------------------------------

SPECS = [
    "auto(cosine=0.9, every=7, budget=4)",
    "auto(methods=['jfb', 'npg(k=3)'])",
    "tbptt(k=2)",
    "bptt(steps=3)",
    "exact",
    "guard('jfb', on_failure='raise', forward_tol=0.3)",
    "guard('ift(tol=1e-3)', on_failure=\"fallback('npg(k=3)')\", adjoint_tol=0.2)",
    "ift(solver='anderson', tol=1e-3, max_iter=7, warm_start=True)",
    "ift(higher_order=True)",
    "ift(solver='fixed_point', clip=2.0)",
    "jfb",
    "npg(k=3, lam='adaptive')",
    "npg(k=2, lam=1.0, clip=1.0)",
    "npg_rr(p=0.5, lam=0.25)",
    "reversible(steps=3, beta=0.5)",
    "ramp('upg', {'k': (2, 5)}, until=9)",
    "upg(k='poisson(3)')",
    "schedule({0: 'bptt(steps=2)', 7: \"guard('ift', on_failure='raise')\"})",
    "shine(refine=2, fallback=None)",
    "upg(k=2, lam=0.3, checkpoint=True)",
]


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("spec", SPECS)
def test_strategies_load_with_weights_only(spec):
    strategy = dpp.get_strategy(spec)
    loaded = through_a_file({"args": {"grad": strategy, "lr": 0.1}, "weight": torch.ones(2)})
    found = loaded["args"]["grad"]
    assert type(found) is type(strategy)
    assert found == strategy
    assert vars(found) == vars(strategy)  # what a guard derives from its arguments too
    assert repr(found) == repr(strategy)


def test_every_built_in_strategy_was_tried():
    tried = {dpp.get_strategy(spec).name for spec in SPECS}
    assert tried >= {name for name in dpp.list_strategies() if name in BUILT_IN}


BUILT_IN = {
    cls.name
    for cls in vars(dpp).values()
    if isinstance(cls, type) and issubclass(cls, dpp.GradStrategy) and cls is not dpp.GradStrategy
}


@dataclass(frozen=True)
class Mine(dpp.GradStrategy):
    k: int = 1

    def attach(self, func, equilibrium, context):
        return func(equilibrium)


def test_a_registered_strategy_loads_too(monkeypatch):
    from deq_phantom_plugin.strategies import registry

    monkeypatch.setattr(registry, "_registered", {**registry._registered})
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        through_a_file(Mine(3))
    dpp.register_strategy("mine")(Mine)
    assert through_a_file([Mine(3), dpp.Guard(Mine(2))]) == [Mine(3), dpp.Guard(Mine(2))]


# --- several processes --------------------------------------------------------------------------


@pytest.mark.slow
@processes.needs_gloo
@pytest.mark.parametrize("count", [1, 2])
def test_distributed_checkpoints_take_every_model(count, tmp_path):
    out = tmp_path / "found.json"
    path = str(DRIVER.parents[1])
    found = processes.found(DRIVER, out, processes=count, PYTHONPATH=path)
    assert len(found) == count
    for of_one in found:
        assert {"own | fsdp2", "patched | ddp", "torchdeq | compiled"} <= {
            " | ".join(name.split(" | ")[1:3]) for name in of_one
        }
        assert {name: error for name, error in of_one.items() if error} == {}


@pytest.fixture
def one_process():
    """Processes of which there is one."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch is for one process")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", ["plain", "compiled", "ddp"])
@pytest.mark.parametrize("full", [False, True])
def test_distributed_checkpoints_in_one_process(one_process, wrap, full):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.nn.parallel import DistributedDataParallel

    wraps = {"plain": lambda m: m, "compiled": torch.compile, "ddp": DistributedDataParallel}
    source, target = wraps[wrap](kept()), wraps[wrap](Net())
    options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full)
    state = get_model_state_dict(source, options=StateDictOptions(full_state_dict=full))
    assert list(state) == list(Net().state_dict())
    set_model_state_dict(target, state, options=options)
    assert steps(target) == [5]


def test_a_checkpoint_cast_to_float16_loads_and_says_that_its_step_is_lost():
    memory, other = dpp.Memory(), dpp.Memory()
    memory.step = 100_000
    saved = {key: value.half() for key, value in memory.state_dict().items()}
    with pytest.warns(dpp.AssumptionWarning, match=r"dpp\.set_step"):
        other.load_state_dict(saved)
    assert other.step is None
