"""Buffers of modules in F: trials put them back, and lent ones stay with whom they belong to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.trial import Trial

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        with torch.no_grad():
            self.linear.weight.mul_(0.3)

    def forward(self, h):
        return torch.tanh(0.3 * self.norm(self.linear(h)) + X)


def lent():
    """A block, and the parameters and buffers that another one lends to it."""
    student = Block()
    teacher = copy.deepcopy(student)
    parameters = {k: v.detach().clone().requires_grad_() for k, v in teacher.named_parameters()}
    return student, {**parameters, **{k: v.clone() for k, v in teacher.named_buffers()}}


def identities(module):
    return [id(buffer) for buffer in module.buffers()]


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(tensors, before):
    assert tensors.keys() == before.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name


def settled(func, steps=60):
    h = torch.zeros(8, 4)
    with torch.no_grad():
        for _ in range(steps):
            h = func(h)
    return h


# --- buffers that are lent -----------------------------------------------------------------------

# What docs/concepts/assumptions.md says each strategy evaluates, forward and backward together.
UPDATES = {
    "jfb": 1,
    "npg": 1,
    "ift": 1,
    "exact": 1,
    "upg(k=3)": 3,
    "upg(k=3, lam='adaptive')": 4,
    "bptt(steps=4)": 4,
    "ift(higher_order=True)": 2,
    "guard('ift')": 2,
    "guard('ift(max_iter=1)', \"fallback('upg(k=3)')\", adjoint_tol=1e-9)": 2,
}


@pytest.mark.filterwarnings("ignore:the samples of the batch depend on one another")
@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.ConvergenceWarning")
@pytest.mark.parametrize("batch_dim", ["auto", None])
@pytest.mark.parametrize("spec", UPDATES)
def test_a_module_that_borrows_keeps_its_own_and_the_lender_counts(spec, batch_dim):
    student, state = lent()
    func = lambda h: functional_call(student, state, (h,))  # noqa: E731
    h = settled(func)
    own, before = identities(student), copied(student.state_dict())
    attached = dpp.attach(func, h, spec, dpp.Context(batch_dim=batch_dim))
    attached.square().sum().backward()
    assert identities(student) == own
    assert_equal(student.state_dict(), before)
    assert int(state["norm.num_batches_tracked"]) == 60 + UPDATES[spec]


def radius(func, h):
    dpp.spectral_radius(func, h)


def report(func, h):
    weight = torch.ones(4, requires_grad=True)
    dpp.gradient_report(lambda h: func(h) * weight, h, lambda h: h.square().sum(), [weight])


@pytest.mark.filterwarnings("ignore::deq_phantom_plugin.AssumptionWarning")
@pytest.mark.parametrize("measure", [radius, report])
@pytest.mark.parametrize("both", [False, True])
def test_measurements_leave_lender_and_borrower_as_they_were(measure, both):
    """`both`: F is an ensemble, and runs the module with the lent buffers and with its own."""
    student, state = lent()
    own = identities(student)

    def func(h):
        out = functional_call(student, state, (h,))
        return 0.5 * (out + student(h)) if both else out

    h = settled(func)
    before, before_lent = copied(student.state_dict()), copied(state)
    measure(func, h)
    assert identities(student) == own
    assert_equal(student.state_dict(), before)
    assert_equal(state, before_lent)


def test_lent_buffers_inside_a_module():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.state = lent()

        def forward(self, h):
            return functional_call(self.student, self.state, (h,)) + self.student(h)

    pair = Pair()
    own = identities(pair.student)
    before, before_lent = copied(pair.student.state_dict()), copied(pair.state)
    with Trial(X) as trial:
        pair(X)
        assert trial.has_changed_buffers
    assert identities(pair.student) == own
    assert_equal(pair.student.state_dict(), before)
    assert_equal(pair.state, before_lent)


def test_lent_buffers_that_do_not_change_are_no_change():
    """The module holds others before and after, which is not its doing."""
    student, state = lent()
    student.eval()
    with torch.no_grad():
        state["norm.running_mean"] += 1
    with Trial(X) as trial:
        functional_call(student, state, (X,))
    assert not trial.has_changed_buffers


# --- buffers that a module replaces --------------------------------------------------------------


class Replaces(nn.Module):
    """Puts a new tensor in the place of its buffer, and takes turns with two others."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("one", torch.zeros(4))
        self.register_buffer("two", torch.ones(4))
        self.register_buffer("late", None)

    def forward(self, x):
        self.mean = 0.9 * self.mean + x.detach().mean(0)
        self.one, self.two = self.two, self.one
        self.late = self.mean.clone()
        return x + self.one


class Parent(nn.Module):
    """Puts a new tensor in the place of its child's buffer, behind the child's run."""

    def __init__(self):
        super().__init__()
        self.child = Replaces()

    def forward(self, x):
        x = self.child(x)
        self.child.mean = self.child.mean + 1
        return x


@pytest.mark.parametrize("make", [Replaces, Parent])
@pytest.mark.parametrize("runs", [1, 2, 3])
def test_a_module_that_replaces_its_buffers_gets_the_first_ones_back(make, runs):
    module = make()
    held = {name: buffer for m in module.modules() for name, buffer in m._buffers.items()}
    values = {name: None if b is None else b.clone() for name, b in held.items()}
    with Trial(X) as trial:
        for _ in range(runs):
            module(X)
        assert trial.has_changed_buffers
    for m in module.modules():
        for name, buffer in m._buffers.items():
            assert buffer is held[name], name
            assert buffer is None or torch.equal(buffer, values[name]), name


def test_after_an_exception_in_f_too():
    class Fails(Replaces):
        def forward(self, x):
            super().forward(x)
            raise ZeroDivisionError

    module, after = Fails(), Replaces()
    mean = module.mean
    with pytest.raises(ZeroDivisionError), Trial(X):
        module(X)
    assert module.mean is mean
    assert torch.equal(mean, torch.zeros(4))
    after(X)
    assert not torch.equal(after.mean, torch.zeros(4))  # nothing goes on noting


def test_a_buffer_that_two_modules_share():
    """It gets the value from before the first of them, in whatever order they ran."""
    one, two = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    two.running_mean = one.running_mean
    with Trial(X):
        two(one(X + 3) + 5)
    assert two.running_mean is one.running_mean
    assert torch.equal(one.running_mean, torch.zeros(4))


def test_reversible_leaves_lent_statistics_as_the_forward_pass_made_them():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    with torch.no_grad():
        net[0].weight.mul_(0.1)
        net[1].weight.fill_(0.1)
    lent = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    x, own = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), net[1].running_mean
    attached = dpp.attach(
        lambda h: torch.tanh(torch.func.functional_call(net, lent, (h,)) + x),
        torch.zeros(5, 3, dtype=torch.float64),
        "reversible(steps=4)",
        dpp.Context(batch_dim=None),
    )
    after = {name: tensor.clone() for name, tensor in lent.items()}
    assert after["1.num_batches_tracked"] == 8
    attached.sum().backward()
    assert all(torch.equal(lent[name], after[name]) for name in lent)
    assert net[1].running_mean is own
    assert net[1].num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_module_inside_f():
    """Its buffers are in a mapping of another type. What PyTorch's hooks see of it is put back."""
    scripted = torch.jit.script(nn.Linear(3, 3))
    wanted = torch.linalg.eigvals(scripted.weight.detach()).abs().max()
    found = dpp.spectral_radius(lambda h: scripted(h), torch.zeros(2, 3))
    torch.testing.assert_close(found, wanted.expand(2), rtol=1e-2, atol=0)
