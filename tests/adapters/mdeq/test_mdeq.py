from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from conftest import evaluate
from deq_phantom_plugin.adapters import mdeq
from deq_phantom_plugin.adapters.mdeq import (
    MDEQ,
    PRESETS,
    MDEQConfig,
    VariationalDropout2d,
    WeightNormConv2d,
)

pytest.importorskip("torchdeq")

TWO = MDEQConfig((8, 8), (2, 4), 16, f_max_iter=12, groups=4, expansion=2)
FOUR = MDEQConfig((8, 8, 16, 16), (2, 2, 4, 4), 16, 12, groups=4, expansion=2, downsample_times=1)
TIGHT = {"f_max_iter": 200, "f_tol": 1e-13, "f_solver": "fixed_point_iter"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(config=TWO, batch=2, channels=3, times=2, **options):
    side = times * config.size_divisor
    return torch.randn(batch, channels, side, side, **options)


def contract(model):
    """Make f a contraction.

    f does not see the scale of a state, so smaller weights alone do nothing: what the last
    normalisation adds has to outweigh what it scales.
    """
    with torch.no_grad():
        for finish in model.layer.finish:
            finish[-1].weight.fill_(0.3)
            finish[-1].bias.normal_()
        for module in model.layer.modules():
            if isinstance(module, WeightNormConv2d):
                module.weight_g.mul_(0.5)
    return model


def gradients(model, x, labels=None):
    labels = torch.arange(len(x)) % 10 if labels is None else labels
    model.zero_grad()
    F.cross_entropy(model(x), labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def solver_evaluations(model):
    """Return a list that grows with each evaluation of f without grad."""
    found = []
    model.layer.register_forward_hook(
        lambda *_: None if torch.is_grad_enabled() else found.append(1)
    )
    return found


# --- architecture -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_classes", "expected"),
    [
        # As the deq-zoo's own model has; the paper rounds tiny to 170K, large to 10M.
        ("tiny", 10, 159_034),
        ("large", 10, 11_099_998),
        ("small", 1000, 16_810_536),
        ("xl", 1000, 90_467_680),
    ],
)
def test_parameter_count(name, num_classes, expected):
    with torch.device("meta"):
        model = MDEQ.from_preset(name, num_classes=num_classes)
    count = sum(p.numel() for p in model.parameters())
    print(name, count)
    assert count == expected


def test_only_the_norm_and_the_direction_are_parameters_in_f():
    model = MDEQ(TWO)
    assert not any(isinstance(m, nn.Conv2d) for m in model.layer.modules())
    names = {name.rsplit(".")[-1] for name, _ in model.layer.named_parameters()}
    assert names == {"weight_g", "weight_v", "weight", "bias"}  # the last two of GroupNorm


@torch.no_grad()
def test_the_injection_enters_the_highest_resolution_only():
    model = MDEQ(FOUR).double().eval()
    x = images(FOUR, dtype=torch.float64)
    injection = model.stem(x)
    shapes = [tuple(h.shape) for h in model.initial_state(injection)]
    assert shapes == [(2, 8, 16, 16), (2, 8, 8, 8), (2, 16, 4, 4), (2, 16, 2, 2)]
    seen = []
    for branch in model.layer.branches:
        branch[0].register_forward_pre_hook(lambda _, args: seen.append(args[1] is not None))
    model.layer(model.initial_state(injection), injection)
    assert seen == [True, False, False, False]


def test_several_blocks_a_branch():
    model = MDEQ(MDEQConfig((8, 8), (2, 4), 16, f_max_iter=4, groups=4, expansion=1, blocks=(2, 1)))
    assert [len(branch) for branch in model.layer.branches] == [2, 1]
    assert torch.isfinite(gradients(model, images())).all()


# --- weight normalisation and dropout ----------------------------------------------------------


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_weight_norm_is_pytorchs(kernel_size, stride):
    ours = WeightNormConv2d(4, 6, kernel_size, stride).double()
    theirs = nn.utils.parametrizations.weight_norm(
        nn.Conv2d(4, 6, kernel_size, stride, padding=kernel_size // 2, bias=False).double()
    )
    with torch.no_grad():
        ours.weight_g.mul_(torch.rand_like(ours.weight_g) + 0.5)
        theirs.parametrizations.weight.original0.copy_(ours.weight_g)
        theirs.parametrizations.weight.original1.copy_(ours.weight_v)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    originals = theirs.parametrizations.weight
    torch.testing.assert_close(ours.weight_g.grad, originals.original0.grad)
    torch.testing.assert_close(ours.weight_v.grad, originals.original1.grad)


def test_initial_weight_is_its_direction():
    conv = WeightNormConv2d(4, 6, 3)
    torch.testing.assert_close(conv.make(), conv.weight_v)


def test_weights_are_normalised_once_a_forward(monkeypatch):
    model = MDEQ(TWO)
    evaluations, made = [], []
    original = WeightNormConv2d.make
    monkeypatch.setattr(
        WeightNormConv2d, "make", lambda self, *args: made.append(self) or original(self, *args)
    )
    model.layer.register_forward_hook(lambda *_: evaluations.append(1))
    gradients(model, images())
    assert len(evaluations) > 12
    assert (
        len(made) == len(set(made)) == sum(isinstance(m, WeightNormConv2d) for m in model.modules())
    )


def test_a_step_changes_the_next_forward():
    model = contract(MDEQ(TWO).eval())
    x = images()
    before = evaluate(model, x)
    with torch.no_grad():
        model.layer.branches[0][0].reduce.weight_g.mul_(3)
    assert not torch.allclose(before, evaluate(model, x))


def test_dropout_mask_lasts_for_one_solve():
    model = MDEQ(TWO, dropout=0.5)
    injection = model.stem(images(batch=4))
    state = [torch.randn_like(h) for h in model.initial_state(injection)]
    func, other = model.equilibrium_func(injection), model.equilibrium_func(injection)
    first, different, again = func(state), other(state), func(state)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.allclose(first[0], different[0])
    model.eval()
    torch.testing.assert_close(
        model.equilibrium_func(injection)(state), model.equilibrium_func(injection)(state)
    )


def test_dropout_mask_drops_channels_and_keeps_the_mean():
    dropout = VariationalDropout2d(4000, 0.25)
    like = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    mask = dropout.make(like)
    assert mask.shape == (3, 4000, 1, 1)
    assert mask.dtype == torch.float64
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.75}
    assert mask.mean().item() == pytest.approx(1, abs=0.05)
    assert dropout.eval().make(like) is None
    assert VariationalDropout2d(4, 0.0).make(like) is None


def test_checkpointing_sees_its_own_forward():
    # Another forward in between takes new weights and masks; recomputation must not see them.
    model = MDEQ(TWO, dropout=0.5).double()
    x, y = images(dtype=torch.float64), images(batch=3, dtype=torch.float64)
    found = []
    for grad in ("upg", "upg(checkpoint=True)"):
        dpp.set_grad(model, grad)
        torch.manual_seed(3)
        model.zero_grad()
        loss = model(x).square().mean() + model(y).square().mean()
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found)


# --- copies ------------------------------------------------------------------------------------


def test_state_dict_round_trip():
    model = MDEQ(TWO)
    gradients(model, images())
    state = model.state_dict()
    twin = MDEQ(TWO, grad="npg")
    twin.load_state_dict(state, strict=True)
    x = images()
    torch.testing.assert_close(evaluate(model, x), evaluate(twin, x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_after_a_forward(copied):
    model = MDEQ(TWO, dropout=0.2)
    x = images()
    model(x).sum().backward()
    twin = copied(model)
    assert twin.last is None
    assert model.last is not None
    torch.testing.assert_close(evaluate(model, x), evaluate(twin, x), rtol=0, atol=0)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert not torch.equal(next(twin.parameters()), next(model.parameters()))


def test_deepcopy_with_torchdeqs_own_gradient():
    model = MDEQ(TWO, grad=5, tau=0.5)
    model(images())
    copy.deepcopy(model)(images()).sum().backward()


# --- formats -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
@pytest.mark.parametrize("grad", ["upg", "npg", "ift(tol=1e-2)", 5])
def test_channels_last_reaches_f(grad):
    model = MDEQ(TWO, grad=grad).to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    seen = []
    for branch in model.layer.branches:
        branch.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
    logits = model(x)
    logits.sum().backward()
    assert seen
    assert all(seen)
    assert all(
        h.is_contiguous(memory_format=torch.channels_last)
        for h in model.initial_state(model.stem(x))
    )
    weight = model.layer.branches[0][0].reduce.make()
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_changes_nothing():
    model = MDEQ(TWO).double()
    x = images(dtype=torch.float64)
    expected = gradients(model, x)
    model = model.to(memory_format=torch.channels_last)
    found = gradients(model, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("grad", ["upg", "npg", "ift(tol=1e-1)"])
def test_autocast(grad):
    model = contract(MDEQ(TWO, grad=grad))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images())
        assert model.last.equilibrium[0].dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_f_stays_on_one_device():
    with torch.device("meta"):
        model = MDEQ(FOUR, dropout=0.5)
        injection = model.stem(images(FOUR))
    func, state = model.equilibrium_func(injection), model.initial_state(injection)
    assert {h.device.type for h in state + func(state)} == {"meta"}
    assert {m.make(injection).device.type for m in model._once_per_solve()} == {"meta"}


def test_inference_mode():
    model = MDEQ(TWO).eval()
    with torch.inference_mode():
        model(images())
    assert model.spectral_radius(tol=0.1).shape == (2,)


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 3), (4, 12, 1), (2, 2, 3)])
def test_any_fitting_size(height, width, channels):
    model = MDEQ(TWO, num_classes=7, in_channels=channels)
    assert model(torch.randn(3, channels, height, width)).shape == (3, 7)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 8, 8), r"shape \(3, 8, 8\); expected \(batch, 3, height, width\)"),
        ((2, 1, 8, 8), r"shape \(2, 1, 8, 8\); expected \(batch, 3,"),
        ((2, 3, 8, 9), r"images are 8 x 9; expected both sides to be positive multiples of 2 "),
        ((2, 3, 0, 8), r"images are 0 x 8"),
    ],
)
def test_unfitting_images(shape, message):
    with pytest.raises(ValueError, match=message):
        MDEQ(TWO)(torch.zeros(shape))


def test_size_divisors_of_the_presets():
    assert {name: config.size_divisor for name, config in PRESETS.items()} == {
        "tiny": 2,
        "small": 32,
        "large": 8,
        "xl": 32,
    }


def test_unknown_preset():
    with pytest.raises(
        ValueError, match=r"'smal' .did you mean 'small'.*there are 'tiny', 'small',"
    ):
        MDEQ.from_preset("smal")
    with pytest.raises(ValueError, match=r"unknown preset 5; there are"):
        MDEQ.from_preset(5)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": (8,)},
        {"head_channels": (2,)},
        {"blocks": (1, 0)},
        {"groups": 3},
        {"channels": (8, 9)},
        {"downsample_times": 3},
        {"dropout": 1.0},
    ],
)
def test_config_that_cannot_be(changes):
    arguments = {"channels": (8, 8), "head_channels": (2, 4), "final_channels": 8, "f_max_iter": 4}
    with pytest.raises(ValueError, match=next(iter(changes))):
        MDEQConfig(**{**arguments, "groups": 4, **changes})


def test_unknown_gradient_names_the_valid_ones():
    with pytest.raises(ValueError, match="upg"):
        MDEQ(TWO, grad="upgg")


def test_without_torchdeq(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    with pytest.raises(ImportError, match=r'pip install "deq-phantom-plugin\[vision\]"'):
        MDEQ(TWO)


def test_published_settings_and_overrides():
    model = MDEQ.from_preset("tiny")
    assert (model.deq.f_max_iter, model.deq.f_tol, model.deq.f_stop_mode) == (22, 1e-3, "rel")
    assert model.deq.f_solver.__name__ == "broyden_solver"
    assert model.config.dropout == 0
    settings = {"f_solver": "anderson", "f_max_iter": 7, "dropout": 0.25, "core": "indexing"}
    given = dict(settings)
    model = MDEQ.from_preset("tiny", **settings)
    assert settings == given
    assert (model.deq.f_max_iter, type(model.deq).__name__) == (7, "DEQIndexing")
    assert model.deq.f_solver.__name__ == "anderson_solver"
    assert model.config.dropout == 0.25
    assert PRESETS["tiny"].dropout == 0


@pytest.mark.parametrize(
    "grad", ["npg(k=3)", {"name": "upg", "k": 2}, dpp.JFB(), 2, ["jfb", "upg(k=2)"], [1, 2]]
)
@pytest.mark.parametrize("core", ["indexing", "sliced"])
def test_all_kinds_of_gradients(grad, core):
    model = MDEQ(TWO, grad=grad, n_states=2, core=core, f_tol=0.0)
    logits = model(images(), all_states=True)
    assert [tuple(each.shape) for each in logits] == [(2, 10)] * 2
    sum(each.square().mean() for each in logits).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert len(evaluate(model, images(), all_states=True)) == 1


def test_torchdeqs_implicit_gradient_is_still_there():
    assert torch.isfinite(gradients(MDEQ(TWO, grad=1, ift=True, b_max_iter=5), images())).all()


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TWO, FOUR], ids=["two branches", "four branches"])
def test_strategies_agree_on_a_contraction(config):
    model = contract(MDEQ(config, grad="ift(tol=1e-12, max_iter=200)", **TIGHT).double())
    x = images(config, batch=3, dtype=torch.float64)
    exact = gradients(model, x)
    assert (model.spectral_radius() < 0.9).all()
    assert (model.last.residual < 1e-10).all()
    cosines = {}
    for grad in ("jfb", "upg(k=5, lam=0.5)", "npg(k=5, lam=0.5)", "upg(k=60)", "npg(k=60)"):
        assert dpp.set_grad(model, grad) == 1
        cosines[grad] = F.cosine_similarity(gradients(model, x), exact, dim=0).item()
    print(cosines)
    assert cosines["jfb"] > 0.8
    assert cosines["upg(k=5, lam=0.5)"] > 0.9
    assert cosines["upg(k=5, lam=0.5)"] == pytest.approx(cosines["npg(k=5, lam=0.5)"], abs=1e-9)
    assert cosines["upg(k=60)"] == pytest.approx(1, abs=1e-8)
    assert cosines["npg(k=60)"] == pytest.approx(1, abs=1e-8)


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
@pytest.mark.parametrize("name", ["tiny", pytest.param("large", marks=pytest.mark.slow)])
@pytest.mark.parametrize("grad", ["upg", "npg", "jfb", "ift(max_iter=3, tol=1e9)"])
def test_presets_train(name, grad):
    model = MDEQ.from_preset(name, grad=grad, f_max_iter=3)
    assert torch.isfinite(gradients(model, torch.randn(2, 3, 8, 8))).all()
    assert (gradients(model, torch.randn(2, 3, 8, 8)) != 0).double().mean() > 0.5


def test_a_batch_is_learnt():
    model = MDEQ(TWO, grad="npg")
    x, labels = images(batch=8, times=4), torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


# --- what a solve tells ------------------------------------------------------------------------


def test_nothing_is_known_before_a_forward():
    model = MDEQ(TWO)
    assert model.last is None
    with pytest.raises(RuntimeError, match="call the model on a batch first"):
        model.spectral_radius()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("solver", ["broyden", "fixed_point_iter", "simple_fixed_point_iter"])
def test_nfe_counts_the_solver(solver, training):
    model = contract(MDEQ(TWO, f_solver=solver)).train(training)
    evaluations = solver_evaluations(model)
    with torch.set_grad_enabled(training):
        model(images())
    assert model.last.nfe == len(evaluations) > 1
    assert model.last.nfe.dtype == torch.int64


def test_residual_is_that_of_the_equilibrium():
    model = MDEQ(TWO, grad="npg", f_max_iter=4).double().train()
    x = images(batch=3, dtype=torch.float64)
    model(x)
    last = model.last
    assert last.residual.shape == (3,)
    func = model.equilibrium_func(last.injection, last.shared)
    with torch.no_grad():
        flat = [
            torch.cat([h.flatten(1) for h in state], 1)
            for state in (last.equilibrium, func(last.equilibrium))
        ]
    expected = (flat[1] - flat[0]).norm(dim=1) / flat[1].norm(dim=1)
    torch.testing.assert_close(last.residual, expected, rtol=1e-6, atol=0)


def test_a_strategy_that_owns_the_solve_has_a_residual_too():
    model = contract(MDEQ(TWO, grad="bptt(steps=6)"))
    gradients(model, images())
    assert model.last.nfe == 6
    assert model.last.residual.shape == (2,)
    assert (model.last.residual > 0).all()


def test_nothing_kept_carries_a_graph():
    model = MDEQ(TWO, dropout=0.2)
    injections = []
    model.layer.register_forward_pre_hook(lambda _, args: injections.append(weakref.ref(args[1])))
    loss = model(images()).sum()
    last = model.last
    kept = [last.residual, last.nfe, last.injection, *last.equilibrium, *last.shared]
    assert not any(tensor.requires_grad for tensor in kept if tensor is not None)
    del loss
    gc.collect()
    assert injections[-1]() is None


@pytest.mark.parametrize("lam", [None, 0.5])
def test_spectral_radius_is_that_of_the_dense_jacobian(lam):
    model = MDEQ(TWO, dropout=0.3).double()
    x = images(batch=2, times=1, dtype=torch.float64)
    loss = model(x).sum()
    radius = model.spectral_radius(lam, tol=1e-8, max_iter=2000)
    assert radius.shape == (2,)
    assert not radius.requires_grad
    loss.backward()  # still possible
    last = model.last
    func = model.equilibrium_func(last.injection, last.shared)
    blocks = torch.autograd.functional.jacobian(
        lambda *state: tuple(func(list(state))), tuple(last.equilibrium)
    )
    for sample in range(2):
        dense = torch.cat(
            [
                torch.cat(
                    [
                        block[sample, :, :, :, sample].reshape(
                            last.equilibrium[i][0].numel(), last.equilibrium[j][0].numel()
                        )
                        for j, block in enumerate(row)
                    ],
                    dim=1,
                )
                for i, row in enumerate(blocks)
            ]
        )
        if lam is not None:
            dense = lam * dense + (1 - lam) * torch.eye(len(dense), dtype=dense.dtype)
        expected = torch.linalg.eigvals(dense).abs().max()
        torch.testing.assert_close(radius[sample], expected, rtol=1e-5, atol=0)


def test_public_names():
    assert set(mdeq.__all__) >= {"MDEQ", "MDEQConfig", "PRESETS"}
    assert all(hasattr(mdeq, name) for name in mdeq.__all__)


def test_damped_steps_in_eval_mode_are_those_of_upg_and_only_there():
    model = contract(MDEQ(TWO).eval())
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        plain = model(x)
        state, func = (
            model.last.equilibrium,
            model.equilibrium_func(model.last.injection, model.last.shared),
        )
        nfe = int(model.last.nfe)
        for _ in range(3):
            state = [0.3 * h + 0.7 * new for h, new in zip(state, func(state), strict=True)]
        expected = model.head(state)
        model.eval_steps, model.eval_lam = 3, 0.7
        torch.testing.assert_close(model(x), expected)
        assert int(model.last.nfe) == nfe + 3
        assert not torch.equal(model(x), plain)
    model.train()
    counts = []
    for model.eval_steps in (0, 3):
        model(x)
        counts.append(int(model.last.nfe))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_steps": -1}, "eval_steps=-1; expected a whole number of at least 0"),
        ({"eval_steps": 0.5}, "eval_steps=0.5"),
        ({"eval_lam": 0.0}, r"eval_lam=0.0; expected a damping factor in \(0, 1\]"),
    ],
)
def test_damped_steps_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        MDEQ(TWO, **settings)


# --- no images ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:h is no equilibrium")
@pytest.mark.parametrize("grad", ["upg", "npg", "ift", "shine", "bptt(steps=2)", [1]])
def test_no_images_have_no_logits_and_gradients_of_zero(grad):
    model = MDEQ(TWO, grad=grad, dropout=0.1, f_solver="broyden_fast")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits = model(images(batch=0))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert model.last.residual.shape == (0,)
    for name, buffer in model.named_buffers():
        if "num_batches" not in name:
            torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)
    assert evaluate(model, images(batch=0)).shape == (0, 10)
    with pytest.raises(RuntimeError, match="had no images"):
        model.spectral_radius()
    assert torch.isfinite(model.train()(images())).all()


def test_no_images_have_as_many_states_and_no_regulariser():
    model = MDEQ(TWO, grad=["upg", "npg"], n_states=2)
    none = images(batch=0)
    assert [states.shape for states in model(none, all_states=True)] == [(0, 10)] * 2
    logits, penalty = model(none, jac_reg=dpp.JacobianRegularization(1.0))
    assert logits.shape == (0, 10)
    assert penalty == 0
