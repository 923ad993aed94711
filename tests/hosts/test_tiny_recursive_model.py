"""tiny-recursive-model with the gradient of its refinement loop by name."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import deq_phantom_plugin as dpp
from deq_phantom_plugin.hosts import registry as hosts
from host_cases import TinyRecursiveCase, without

if TinyRecursiveCase.missing:
    pytest.skip(TinyRecursiveCase.missing, allow_module_level=True)

from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel, Trainer

TOKENS, LENGTH, WIDTH, BLOCKS = 5, 4, 6, 4
SEQ = torch.tensor([[1, 0, 3, 2], [4, 4, 0, 1], [2, 0, 1, 1]])
LABELS = torch.tensor([[1, 2, 3, 2], [4, 3, 0, 1], [2, 2, 1, 1]])


@pytest.fixture(autouse=True)
def _enabled():
    dpp.enable("tiny_recursive_model")


def make(grad=None, **settings):
    torch.manual_seed(0)
    named = {} if grad is None else {"grad": grad}
    model = TinyRecursiveModel(
        dim=WIDTH,
        num_tokens=TOKENS,
        network=MLPMixer1D(dim=WIDTH, depth=1, seq_len=LENGTH + settings.get("registers", 0)),
        num_refinement_blocks=BLOCKS,
        num_latent_refinements=2,
        num_register_tokens=settings.get("registers", 0),
        **named,
    )
    return model.double().train()


def supervised(model, supervisions=2):
    """Losses and gradients of a few supervision steps, the state carried from one to the next."""
    state, found = model.get_initial(), []
    for _ in range(supervisions):
        model.zero_grad()
        loss, _, *state, _, _ = model(SEQ, *state, labels=LABELS)
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    return found


def assert_equal(found, expected):
    for (loss, grads), (own_loss, own_grads) in zip(found, expected, strict=True):
        assert torch.equal(loss, own_loss)
        assert grads.keys() == own_grads.keys()
        for name in grads:
            assert torch.equal(grads[name], own_grads[name]), name


def with_graph(k, monkeypatch):
    """What its own code does if the last k of its blocks, and not only the last, have a graph."""
    dpp.disable()
    real, made = torch.no_grad, []

    def no_grad():
        made.append(1)
        number = (len(made) - 1) % (BLOCKS - 1)  # asked for once in each block but the last
        return real() if number < BLOCKS - k else contextlib.nullcontext()

    model = make()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "no_grad", no_grad)
        found = supervised(model)
    dpp.enable("tiny_recursive_model")
    return found


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("grad", [None, "tbptt(k=1)", "jfb", "upg(k=1, lam=1.0)"])
def test_its_own_training_bit_for_bit(grad, registers):
    dpp.disable()
    own = supervised(make(registers=registers))
    dpp.enable("tiny_recursive_model")
    assert_equal(supervised(make(grad, registers=registers)), own)


@pytest.mark.parametrize(
    ("grad", "k"),
    [("tbptt(k=2)", 2), ("tbptt(k=3)", 3), ("tbptt(k='all')", 4), ("bptt", 4), ("tbptt(k=9)", 4)],
)
def test_backpropagation_is_its_code_with_less_of_no_grad(grad, k, monkeypatch):
    expected = with_graph(k, monkeypatch)
    found = supervised(make(grad))
    assert_equal(found, expected)
    assert ("output_init_embed" in found[0][1]) == (k == BLOCKS)  # learned where all have a graph
    with pytest.raises(AssertionError):
        assert_equal(found, with_graph(k - 1, monkeypatch))


def reference(model, terms=None, lam=1.0):
    """The gradient by a dense Jacobian at the end of the loop, of a Neumann series or a solve."""
    state = model.get_initial()
    block = lambda state: model.refine_latent_then_output_once(inputs, *state)  # noqa: E731
    inputs, _ = model.embed_inputs_with_registers(SEQ)
    with torch.no_grad():
        for _ in range(BLOCKS - (terms is None)):  # ift begins one evaluation before the end
            state = block(state)
        end = state if terms is not None else block(state)
    shapes = [leaf.shape for leaf in state]

    def flat(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        return torch.cat(
            [leaf.flatten() for leaf in block(tuple(map(torch.Tensor.view, parts, shapes)))]
        )

    joint = torch.cat([leaf.flatten() for leaf in state])
    J = jacobian(flat, joint).detach()
    leaves = [leaf.clone().requires_grad_() for leaf in end]
    model.zero_grad()
    model.deep_refinement = lambda *args: tuple(leaves)
    model(SEQ, *model.get_initial(), labels=LABELS)[0].backward()  # of what is after the loop
    del model.deep_refinement
    v = torch.cat([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
    v, eye = v.flatten(), torch.eye(J.shape[0], dtype=J.dtype)
    if terms is None:
        g = torch.linalg.solve(eye - J.T, v)
    else:
        damped = (1 - lam) * eye + lam * J.T
        g = lam * sum(torch.linalg.matrix_power(damped, n) @ v for n in range(terms))
    flat(joint).backward(g)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("grad", "arguments"),
    [
        ("ift(tol=1e-12, max_iter=200)", {}),
        ("exact", {}),
        ("npg(k=1, lam=1.0)", {"terms": 1}),
        ("npg(k=4, lam=0.6)", {"terms": 4, "lam": 0.6}),
    ],
)
def test_implicit_gradients_against_a_dense_jacobian(grad, arguments):
    expected = reference(make(), **arguments)
    ((_, found),) = supervised(make(grad), supervisions=1)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-10)
    other = reference(make(), **({"terms": 9} if not arguments else {}))
    assert any(not torch.allclose(found[name], other[name], rtol=1e-3) for name in found)


class Grids(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        labels = torch.randint(TOKENS, (LENGTH,), generator=draw)
        return labels * (torch.rand(LENGTH, generator=draw) < 0.6), labels


def trained(grad):
    """Its own Trainer, which averages weights and drops samples that have halted."""
    model = make(grad).float()
    trainer = Trainer(
        model,
        Grids(),
        learning_rate=0.3,
        weight_decay=0.0,
        batch_size=4,
        epochs=2,
        max_recurrent_steps=3,
        warmup_steps=1,
        halt_prob_thres=0.499,
        cpu=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    seq, labels = next(iter(trainer.dataloader))
    return weights, trainer.ema_model.predict(seq)[0], labels


def test_its_trainer_runs():
    missing = without("accelerate", "ema_pytorch")
    if missing:
        pytest.skip(missing)
    dpp.disable()
    own, predicted, _ = trained(None)
    dpp.enable("tiny_recursive_model")
    named, same, labels = trained("tbptt(k=1)")
    assert all(torch.equal(own[name], named[name]) for name in own)
    assert torch.equal(predicted, same)
    for grad in ("npg(k=3, lam=0.5)", "ift", "tbptt(k='all')", "ift(warm_start=True)"):
        other, answer, _ = trained(grad)
        assert all(torch.isfinite(weight).all() for weight in other.values())
        assert any(not torch.equal(own[name], other[name]) for name in own)
        assert answer.shape == labels.shape


def test_deep_supervision_with_a_schedule_a_monitor_and_a_report():
    model, logged = make("schedule({0: 'tbptt(k=1)', 2: \"tbptt(k='all')\"})"), []
    first, all_of_it = (supervised(make(g)) for g in ("tbptt(k=1)", "tbptt(k='all')"))
    dpp.set_step(model, 1)
    assert_equal(supervised(model), first)
    dpp.set_step(model, 2)
    assert_equal(supervised(model), all_of_it)
    dpp.set_grad(model, "npg(k=3, lam=0.5)")
    with dpp.monitor(model, lambda values, step: logged.append(values), every=1):
        supervised(model, supervisions=3)
    names = {name.rpartition("/")[2] for values in logged for name in values}
    assert {"forward_residual", "spectral_radius", "cosine"} <= names
    inputs = {"seq": SEQ, "labels": LABELS}
    inputs["outputs"], inputs["latents"] = model.get_initial()
    report = dpp.model_report(model, inputs, lambda returned: returned[0], ["bptt(steps=4)"])
    (measured,) = report.reports
    assert measured.nfe == BLOCKS
    assert all(name in str(report) for name in ("npg(k=3", "bptt(steps=4)", "rho"))


def test_without_a_name_nothing_is_added():
    keys = set(make().state_dict())
    dpp.disable()
    assert set(make().state_dict()) == keys
    dpp.enable("tiny_recursive_model")
    named = make("npg")
    named.load_state_dict(make().state_dict())  # a checkpoint of its own
    dpp.set_grad(named, None)
    dpp.disable()
    own = supervised(make())
    dpp.enable("tiny_recursive_model")
    assert_equal(supervised(named), own)


def test_evaluation():
    model = make("npg(k=3, lam=0.5)").eval()
    with torch.no_grad():
        own = make().eval()(SEQ, *model.get_initial())
    with pytest.warns(dpp.AssumptionWarning, match="in evaluation mode"):
        outputs = model(SEQ, *model.get_initial())
    for a, b in zip(outputs, own, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model.predict(SEQ)[0], make().eval().predict(SEQ)[0])
    dpp.set_grad(model, "npg(k=3, lam=0.5)", in_eval=True)
    trained = make("npg(k=3, lam=0.5)")
    assert_equal(supervised(model), supervised(trained))


def test_bad_input():
    with pytest.raises(ValueError, match="did you mean 'npg'"):
        make("npgg")
    model = make("npg")
    with pytest.raises(ValueError, match="did you mean 'upg'"):
        dpp.set_grad(model, "ugp")
    assert model.grad == dpp.get_strategy("npg")
    dpp.disable()
    with pytest.raises(TypeError, match="grad"):
        make("npg")
    dpp.enable("tiny_recursive_model")
    narrow = nn.Linear(WIDTH, WIDTH + 1).double()
    model.network = narrow
    with pytest.raises((ValueError, RuntimeError), match=r"shape|size|match"):
        supervised(model)


def test_an_unknown_version_stays_as_it_is(monkeypatch):
    dpp.disable()
    host, original = hosts._get("tiny_recursive_model"), TinyRecursiveModel.deep_refinement
    monkeypatch.setattr(type(host), "version", lambda self: "0.1.0")
    with pytest.warns(UserWarning, match=r"0\.1\.0"):
        dpp.enable("tiny_recursive_model")
    assert TinyRecursiveModel.deep_refinement is original
    dpp.enable("tiny_recursive_model", force=True)
    assert TinyRecursiveModel.deep_refinement is not original


def test_a_loop_of_another_length_is_backpropagated_as_a_whole():
    model, longer = make("bptt"), make()
    model.num_refinement_blocks = longer.num_refinement_blocks = BLOCKS + 2
    dpp.set_grad(longer, "bptt")
    expected = supervised(longer)
    assert_equal(supervised(model), expected)
    state = model.get_initial()
    trained = model(SEQ, *state, labels=LABELS)[0]
    with torch.no_grad():  # its own code, which reads the number of blocks in each call
        torch.testing.assert_close(model(SEQ, *state, labels=LABELS)[0], trained.detach())
    model.grad = chosen = dpp.get_strategy("tbptt(k=1)")  # written by hand: it stays
    model.num_refinement_blocks = BLOCKS
    supervised(model)
    assert model.grad is chosen
