"""Solves in training that begin at the latest equilibrium of the same samples."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adapters.mdeq import MDEQ

SIZE = 6


class Model(nn.Module):
    """One equilibrium of a contraction, in float64."""

    def __init__(self, grad="ift(tol=1e-12, max_iter=100)", warm_start="sample", **settings):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(SIZE, SIZE).double()
        nn.init.orthogonal_(self.layer.weight)
        self.equilibrium = dpp.Equilibrium(
            **{"solver": "fixed_point", "tol": 1e-10, "max_iter": 200, **settings},
            grad=grad,
            warm_start=warm_start,
        )

    def forward(self, x, samples=None):
        return self.equilibrium(
            lambda h: torch.tanh(0.7 * self.layer(h) + x), torch.zeros_like(x), samples
        )


def data(count=12):
    return torch.randn(count, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def nfe(model):
    return int(model.equilibrium.last.nfe)


def test_a_sample_begins_where_it_was_in_whatever_batch_it_comes():
    model, x = Model(), data()
    for samples in torch.arange(12).split(4):
        model(x[samples], samples)
        assert nfe(model) > 10
    for samples in torch.randperm(12, generator=torch.Generator().manual_seed(2)).split(3):
        model(x[samples], samples.tolist())
        assert nfe(model) <= 2


def test_equilibrium_and_gradient_are_those_of_any_start():
    cold, warm, x = Model(warm_start=None), Model(), data()
    samples = torch.arange(12)
    warm(x, samples)
    with torch.no_grad():
        for model in (cold, warm):
            model.layer.weight.mul_(0.9)  # an optimiser's step
    found = [cold(x), warm(x, samples)]
    assert nfe(warm) < nfe(cold)
    torch.testing.assert_close(*found, rtol=0, atol=1e-8)
    for h in found:
        h.square().sum().backward()
    torch.testing.assert_close(cold.layer.weight.grad, warm.layer.weight.grad, rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=60)
@given(
    batches=st.lists(st.lists(st.integers(0, 7), max_size=6), max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]),
)
def test_what_is_kept_is_what_a_dictionary_would_hold(batches, dtype):
    starts, expected, count = dpp.SampleStarts(), {}, 0
    for samples in batches:
        size = len(samples)
        zeros = {"a": torch.zeros(size, 2, 3, dtype=dtype), "b": [torch.zeros(size)]}
        begin = starts.begin(samples, zeros)
        for n, sample in enumerate(samples):
            a, b = expected.get(sample, (0.0, 0.0))
            assert (begin["a"][n] == a).all()
            assert begin["b"][0][n] == b
        assert begin["a"].dtype == dtype
        state = {"a": zeros["a"].clone(), "b": [zeros["b"][0].clone()]}
        for n, sample in enumerate(samples):
            count += 1
            state["a"][n], state["b"][0][n] = float(count), -float(count)
            expected[sample] = float(count), -float(count)
        starts.keep(samples, state)
        state["a"].zero_()  # what is kept is a copy
        assert len(starts) == len(expected)
    row = 6 * torch.zeros((), dtype=dtype).element_size() + 4
    assert starts.nbytes == len(expected) * row
    starts.clear()
    assert len(starts) == 0


def test_of_another_shape_or_not_finite_a_sample_begins_where_it_would_have():
    starts = dpp.SampleStarts()
    state = torch.ones(3, 4)
    state[1, 2] = float("nan")
    starts.keep([5, 6, 7], state)
    ones = torch.ones(4)
    begin = starts.begin([7, 6, 5, 8], torch.zeros(4, 4))
    assert torch.equal(begin, torch.stack([ones, 0 * ones, ones, 0 * ones]))
    assert torch.equal(starts.begin([5], torch.zeros(1, 5)), torch.zeros(1, 5))
    assert torch.equal(starts.begin([5], [torch.zeros(1, 4)] * 2)[0], torch.zeros(1, 4))
    starts.keep([5], torch.full((1, 4), float("inf")))  # what was kept is of no use any more
    assert len(starts) == 1


def test_memory_format_and_graph_of_the_start():
    starts = dpp.SampleStarts()
    start = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    starts.keep([0, 1], torch.ones(2, 3, 4, 4))
    begin = starts.begin([1, 2], start)
    assert begin.is_contiguous(memory_format=torch.channels_last)
    assert not begin.requires_grad
    assert start.detach().count_nonzero() == 0  # the start itself is left alone


def test_evaluation_begins_cold_and_keeps_nothing():
    model, x = Model(), data()
    model(x[:4], torch.arange(4))
    model.eval()
    model(x[4:8], torch.arange(4))  # a test set counts its samples from zero as well
    assert nfe(model) > 10
    model(x[4:8])
    model.train()
    model(x[:4], torch.arange(4))
    assert nfe(model) <= 2


def test_reports_keep_nothing():
    model, x = Model(), data()

    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, torch.arange(len(x)))

    dpp.model_report(Told(), x, lambda h: h.square().mean(), ["jfb"])
    before = {number: rows[0].clone() for number, rows in model.equilibrium.starts._rows.items()}
    dpp.spectral_radius(lambda h: model(h, torch.arange(12)), x)
    after = model.equilibrium.starts._rows
    assert all(torch.equal(before[n], after[n][0]) for n in before)


def test_nothing_is_saved_copied_or_pickled():
    model, x = Model(), data()
    keys = list(model.state_dict())
    model(x, torch.arange(12))
    assert list(model.state_dict()) == keys == list(Model(warm_start=None).state_dict())
    equilibrium = model.equilibrium
    for copied in (copy.deepcopy(equilibrium), pickle.loads(pickle.dumps(equilibrium))):
        assert len(copied.starts) == 0
    assert len(equilibrium.starts) == 12
    assert "warm_start='sample'" in repr(equilibrium)
    assert "warm_start='sample'" not in repr(Model(warm_start=None).equilibrium)


@pytest.mark.parametrize(
    "samples",
    [
        None,
        [0, 1],
        [0, 1, 2, 3, 4],
        [0, 1, 2, -1],
        [0.0, 1.0, 2.0, 3.0],
        [True, False, True, True],
        torch.arange(4.0),
        torch.arange(4)[:, None],
        torch.tensor(3),
        "abcd",
        4,
    ],
)
def test_numbers_that_are_none_are_refused(samples):
    model, x = Model(), data(4)
    with pytest.raises(ValueError, match=r"(?s)samples=.* whole numbers of at least 0"):
        model(x, samples)
    starts = dpp.SampleStarts()
    with pytest.raises(ValueError, match="samples="):
        starts.keep(samples, x)
    assert len(starts) == 0


@pytest.mark.parametrize("warm_start", [True, "batch", 1, ["sample"]])
def test_settings_that_cannot_be_are_refused(warm_start):
    with pytest.raises(ValueError, match=r"warm_start=.*expected 'sample' or None"):
        dpp.Equilibrium(warm_start=warm_start)
    with pytest.raises(ValueError, match=r"warm_start=.*expected 'sample' or None"):
        MDEQ.from_preset("tiny", warm_start=warm_start)


def test_a_loop_and_strategies_that_own_the_solve_are_refused():
    with pytest.raises(ValueError, match=r"steps=3.*warm_start='sample'"):
        dpp.Equilibrium(steps=3, warm_start="sample")
    for grad in ("bptt(steps=5)", "reversible(steps=5)", "schedule({0: 'bptt(steps=5)'})"):
        with pytest.raises(ValueError, match="warm_start='sample' with"):
            Model(grad)(data(), torch.arange(12))
    model = MDEQ.from_preset("tiny", grad="bptt(steps=3)", warm_start="sample")
    with pytest.raises(ValueError, match="warm_start='sample' with"):
        model(torch.randn(2, 3, 16, 16), samples=[0, 1])


def test_inside_a_backward_pass_and_torch_func_it_is_refused():
    model, x = Model(), data(4).requires_grad_()
    for reentrant in (False, True):
        h = checkpoint(lambda x: model(x.sin(), torch.arange(4)).cos(), x, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match="a warm start inside a backward pass"):
            h.sum().backward()
    starts = dpp.SampleStarts()
    with pytest.raises(ValueError, match=r"inside torch\.func"):
        torch.vmap(lambda h: starts.begin([0, 1, 2, 3], h))(torch.zeros(2, 4, SIZE))


def test_mdeq_begins_at_the_states_of_the_same_images():
    torch.manual_seed(0)
    settings = {"f_solver": "broyden_fast", "f_max_iter": 5}
    model = MDEQ.from_preset("tiny", grad="npg", warm_start="sample", **settings)
    images = torch.randn(4, 3, 16, 16)
    residuals = []
    for _ in range(4):
        model(images, samples=torch.arange(4))
        residuals.append(float(model.last.residual.max()))
    assert residuals[-1] < 0.5 * residuals[0]
    kept = [rows for _, rows in sorted(model.starts._rows.items())]
    for branch, state in enumerate(model.last.equilibrium):
        assert torch.equal(torch.stack([rows[branch] for rows in kept]), state)
    with pytest.raises(ValueError, match="samples=None"):
        model(images)
    assert model(torch.zeros(0, 3, 16, 16), samples=[]).shape == (0, 10)
    model.eval()
    model(images)
    cold = MDEQ.from_preset("tiny", grad="npg", **settings)
    cold.load_state_dict(model.state_dict())
    cold.eval()
    assert torch.equal(cold(images), model(images))
    assert len(pickle.loads(pickle.dumps(model)).starts) == 0


def test_under_torchdeq_by_hand():
    from torchdeq import get_deq

    dpp.enable("torchdeq")
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    deq = get_deq(f_solver="anderson_fast", f_max_iter=40, f_tol=1e-5, grad="npg")
    starts, taken = dpp.SampleStarts(), []
    for _ in range(2):
        begin = starts.begin([3, 1, 2, 0], torch.zeros(4, 8))
        states, info = deq(lambda h: torch.tanh(0.5 * layer(h) + x), begin)
        starts.keep([3, 1, 2, 0], states[-1])
        taken.append(int(info["nstep"].max()))
    assert taken[1] < taken[0]
