"""`SetStep` in a Lightning `Trainer`: what it trains is what a loop by hand trains."""

from __future__ import annotations

import copy
import itertools
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp

L = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import (  # noqa: E402
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.core.saving import load_hparams_from_yaml  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, Logger  # noqa: E402

from deq_phantom_plugin.integrations.lightning import MEMORY, SetStep  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

BATCHES, BATCH, RATE = 5, 4, 0.1
SCHEDULE = "schedule({0: 'jfb', 0.5: 'npg'})"
WARM = "schedule({0: 'jfb', 2: 'ift(tol=1e-3, warm_start=True)'})"


def rows():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCHES * BATCH, size, generator=generator) for size in (3, 1)]


class Net(nn.Module):
    """An equilibrium between two linear layers."""

    def __init__(self, grad, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.inner, self.out = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        nn.init.orthogonal_(self.inner.weight, 0.5)
        self.deq = dpp.Equilibrium(grad=grad, **settings)

    def forward(self, x):
        u = self.inject(x)
        return self.out(self.deq(lambda h: torch.tanh(self.inner(h) + u), torch.zeros_like(u)))


class Lit(L.LightningModule):
    """The same in Lightning; remembers of which step each batch was."""

    def __init__(self, grad="upg", rate=RATE, size=BATCH, settings=None):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.rate, self.size = Net(grad, **(settings or {})), rate, size
        self.told = []

    @property
    def memory(self):
        return self.net.deq.memory

    def training_step(self, batch, index):
        self.told.append((self.memory.step, self.memory.total))
        return loss_of(self.net, *batch)

    def validation_step(self, batch, index):
        self.log("loss", loss_of(self.net, *batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), self.rate, momentum=0.9)

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(*rows())
        return torch.utils.data.DataLoader(data, self.size)

    val_dataloader = train_dataloader


class OneBatch(Lit):
    """Sees the same batch in every step, as a graph does: warm starts are of use."""

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(*(x[:BATCH] for x in rows()))
        return torch.utils.data.DataLoader(data, self.size)


def loss_of(net, x, y):
    return (net(x) - y).square().mean()


@pytest.fixture
def trainer(tmp_path):
    """Make a quiet Trainer, with a `SetStep` unless told otherwise."""

    def make(*callbacks, step=None, **settings):
        settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **settings}
        return L.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[step or SetStep(), *callbacks],
            **settings,
        )

    return make


def steps(model):
    return [step for step, _ in model.told]


def by_hand(net, plan, total, context=torch.enable_grad):
    """Train by a loop: `plan` has the number of batches of each step."""
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9)
    batches = itertools.cycle(zip(*(x.split(BATCH) for x in rows()), strict=True))
    for step, accumulate in enumerate(plan):
        dpp.set_step(net, step, total=total)
        optimizer.zero_grad()
        for x, y in itertools.islice(batches, accumulate):
            with context():
                loss = loss_of(net, x, y)
            (loss / max(plan)).backward()
        optimizer.step()
    return net


def assert_same(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)


# --- the step ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulate", "plan"), [(1, [1] * 10), (2, [2, 2, 1] * 2), (3, [3, 2] * 2)]
)
def test_training_is_that_of_a_loop_by_hand(trainer, accumulate, plan):
    model = Lit(SCHEDULE)
    trainer(accumulate_grad_batches=accumulate).fit(model)
    assert steps(model) == [step for step, size in enumerate(plan) for _ in range(size)]
    assert {total for _, total in model.told} == {len(plan)}
    assert_same(model.net, by_hand(Net(SCHEDULE), plan, len(plan)))
    # The stages differ, so that another step would be seen.
    late = by_hand(Net(SCHEDULE), plan, 10 * len(plan))
    assert not torch.allclose(late.inner.weight, model.net.inner.weight, rtol=1e-5)


def test_the_length_of_training(trainer):
    for settings, total in (
        ({"max_steps": 7}, 7),
        ({"max_epochs": 1}, 5),
        ({"max_epochs": -1, "max_steps": 3}, 3),
        ({"limit_train_batches": 2}, 4),
        ({"step": SetStep(total=100)}, 100),
    ):
        model = Lit("jfb")
        trainer(**settings).fit(model)
        assert {told for _, told in model.told} == {total}, settings


def test_the_length_where_batches_to_accumulate_change(trainer):
    model = Lit("jfb")
    trainer(GradientAccumulationScheduler({0: 1, 1: 2})).fit(model)
    assert steps(model) == [0, 1, 2, 3, 4, 5, 5, 6, 6, 7]
    assert {total for _, total in model.told} == {8}


class ByHand(Lit):
    """Two optimisers, as adversarial training has them."""

    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.parameters(), self.rate) for _ in range(2)]

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False


def test_optimisers_by_hand_each_count(trainer):
    model = ByHand("jfb")
    trainer(max_epochs=1).fit(model)
    assert model.told == [(2 * (i // 2), None) for i in range(2 * BATCHES)]
    model = ByHand("jfb")
    trainer(max_steps=6).fit(model)
    assert {total for _, total in model.told} == {6}


def test_what_is_no_number_is_refused():
    for name in ("total", "monitor"):
        for value in (0, -1, 1.5, True, "3"):
            with pytest.raises(ValueError, match=f"{name}={value!r}; expected a whole number"):
                SetStep(**{name: value})


# --- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [SCHEDULE, WARM, "auto(every=4, cosine=0.9)"])
def test_a_run_that_is_resumed_goes_on_as_one_that_was_not(trainer, tmp_path, grad):
    whole = OneBatch(grad)
    # Here an epoch is a step.
    trainer(step=SetStep(total=8), max_epochs=8).fit(whole)
    first, second = OneBatch(grad), OneBatch(grad)
    begun = trainer(step=SetStep(total=8), max_epochs=5)
    begun.fit(first)
    begun.save_checkpoint(tmp_path / "a.ckpt")
    trainer(max_epochs=8).fit(second, ckpt_path=tmp_path / "a.ckpt")
    assert steps(first) + steps(second) == steps(whole) == list(range(8))
    for a, b in zip(second.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(a, b)
    kept, wanted = (dpp.memory_state_dict(model) for model in (second, whole))
    assert str(kept) == str(wanted)


def test_warm_starts_come_from_the_checkpoint(trainer, tmp_path):
    begun = trainer(max_epochs=4)
    begun.fit(OneBatch(WARM))
    begun.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint[MEMORY]["net.deq.memory"]["warm_starts"]
    found = []
    for kept in (True, False):
        if not kept:
            del checkpoint[MEMORY]
        torch.save(checkpoint, tmp_path / "b.ckpt")
        model = OneBatch(WARM)
        trainer(max_epochs=5).fit(model, ckpt_path=tmp_path / "b.ckpt")
        assert steps(model) == [4]
        found.append(model.net.inner.weight.detach())
    assert not torch.equal(*found)
    assert torch.allclose(*found, atol=1e-3)  # within the solve's tol


def test_other_processes_take_histories_alone(trainer, tmp_path, monkeypatch):
    begun = trainer(max_epochs=4)
    model = OneBatch("auto(every=2, cosine=0.9)")
    begun.fit(model)
    begun.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (kept,) = checkpoint[MEMORY].values()
    assert kept["histories"]
    kept |= {"warm_starts": {"adjoint_0": torch.ones(4, 5)}, "failures": {"adjoint": 2}}
    resumed = trainer()
    monkeypatch.setattr(type(resumed), "global_rank", 1)
    resumed.state.fn = "fit"
    other = OneBatch("auto(every=2, cosine=0.9)")
    resumed.callbacks[0].on_load_checkpoint(resumed, other, checkpoint)
    (found,) = dpp.memory_state_dict(other).values()
    assert found == {"histories": kept["histories"], "warm_starts": {}, "failures": {}}


def test_evaluation_loads_no_memory(trainer, tmp_path):
    begun = trainer(max_epochs=4)
    begun.fit(OneBatch(WARM))
    begun.save_checkpoint(tmp_path / "a.ckpt")
    plain = Lit("jfb")
    trainer().validate(plain, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert not dpp.memory_state_dict(plain)["net.deq.memory"]["warm_starts"]


@pytest.mark.parametrize(
    "grad",
    ["upg(k=3, lam=0.7)", dpp.UPG(3, 0.7), {"name": "upg", "k": 3}, dpp.Guard("ift"), WARM],
    ids=str,
)
def test_grad_is_a_hyperparameter_that_is_loaded_again(trainer, tmp_path, grad):
    model = Lit(grad)
    begun = trainer(max_steps=1)
    begun.fit(model)
    begun.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["grad"] == grad
    again = Lit.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.hparams.grad == grad
    assert again.net.deq.grad == dpp.get_strategy(grad)
    assert_same(again, model)
    other = Lit.load_from_checkpoint(tmp_path / "a.ckpt", grad="npg")
    assert other.net.deq.grad == dpp.NPG()


@pytest.mark.parametrize("grad", ["upg(k=3, lam=0.7)", WARM])
def test_a_spec_is_in_the_file_of_hyperparameters(trainer, tmp_path, grad):
    logger = CSVLogger(tmp_path)
    trainer(max_steps=1, logger=logger).fit(Lit(grad))
    assert load_hparams_from_yaml(f"{logger.log_dir}/hparams.yaml")["grad"] == grad


# --- the monitor -------------------------------------------------------------------------------


class Log(Logger):
    """Remembers what it is told of equilibria."""

    name, version = "log", 0

    def __init__(self):
        super().__init__()
        self.found = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if any("spectral_radius" in name for name in metrics):
            self.found.append((step, metrics))


def test_the_monitor_logs_into_every_logger(trainer):
    logs = [Log(), Log()]
    model = Lit("upg")
    fitted = trainer(step=SetStep(monitor=2), max_epochs=1, logger=logs, accumulate_grad_batches=2)
    fitted.fit(model)
    alone = Net("upg")
    wanted = []
    with dpp.monitor(alone, lambda numbers, step: wanted.append((step, dict(numbers))), 2):
        by_hand(alone, [2, 2, 1], 3)
    assert [step for step, _ in wanted] == [0, 2]
    for log in logs:
        assert [step for step, _ in log.found] == [0, 2]
        for (_, found), (_, numbers) in zip(log.found, wanted, strict=True):
            assert found == {f"net.{name}": pytest.approx(x, 1e-4) for name, x in numbers.items()}
    assert not model.net.deq.observers  # it has ended with the training
    assert_same(model.net, by_hand(Net("upg"), [2, 2, 1], 3))


def test_the_monitor_ends_with_an_exception(trainer):
    model = Lit("upg")
    model.configure_gradient_clipping = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer(step=SetStep(monitor=1), logger=Log(), gradient_clip_val=1.0).fit(model)
    assert not model.net.deq.observers


def test_a_monitor_without_a_logger_is_refused(trainer):
    with pytest.raises(ValueError, match="monitor=5 in a Trainer without a logger"):
        trainer(step=SetStep(monitor=5)).fit(Lit())


# --- what else a Trainer does ------------------------------------------------------------------


def test_validation_before_the_first_step_changes_nothing(trainer):
    """In inference mode, whose tensors autograd does not take, and in the check of `fit`."""
    for grad in ("upg", "ift(warm_start=True)", "npg(lam='adaptive')"):
        found = []
        for sanity in (0, 2):
            model = Lit(grad)
            if sanity:
                trainer().validate(model, verbose=False)
            trainer(num_sanity_val_steps=sanity).fit(model)
            found.append(model.net)
        for a, b in zip(*(net.parameters() for net in found), strict=True):
            assert torch.equal(a, b)


class Forces(Lit):
    """Wants gradients in validation."""

    def validation_step(self, batch, index):
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            (self.forces,) = torch.autograd.grad(self.net(x).sum(), x)


def test_gradients_in_validation_need_inference_mode_off(trainer):
    model = Forces("npg", settings={"grad_in_eval": True})
    with pytest.raises(RuntimeError, match=r"inference_mode.*Trainer\(inference_mode=False\)"):
        trainer().validate(model, verbose=False)
    trainer(inference_mode=False).validate(model, verbose=False)
    assert model.forces.abs().sum() > 0
    del model.forces
    trainer(max_steps=1).fit(model)  # where Lightning takes no inference mode
    assert model.forces.abs().sum() > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision_is_that_of_a_loop_by_hand(trainer, precision):
    model = Lit("ift(tol=1e-2)", settings={"tol": 1e-2})
    trainer(precision=precision, max_steps=4).fit(model)
    net = Net("ift(tol=1e-2)", tol=1e-2)
    if precision == "64-true":
        trained = by_hand_in_64_bits(net.double(), 4)
    else:
        trained = by_hand(net, [1] * 4, 4, lambda: torch.autocast("cpu", torch.bfloat16))
    assert_same(model.net, trained)


def by_hand_in_64_bits(net, count):
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9)
    parts = [x.double().split(BATCH) for x in rows()]
    for x, y in itertools.islice(zip(*parts, strict=True), count):
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        optimizer.step()
    return net


def test_clipping_and_anomaly_detection(trainer):
    model, plain = Lit(WARM), Lit(WARM)
    trainer(detect_anomaly=True, gradient_clip_val=0.05).fit(model)
    trainer(gradient_clip_val=0.05).fit(plain)
    assert_same(model.net, plain.net)
    free = by_hand(Net(WARM), [1] * 10, 10)
    assert not torch.allclose(free.inner.weight, model.net.inner.weight, rtol=1e-4)


def test_a_compiled_module(trainer):
    model = Lit(SCHEDULE)
    trainer().fit(torch.compile(model, backend="eager"))
    assert steps(model) == list(range(10))
    assert_same(model.net, by_hand(Net(SCHEDULE), [1] * 10, 10))


class Averaged(WeightAveraging):
    """Keeps what the average was at the end."""

    def on_train_end(self, trainer, module):
        self.average = copy.deepcopy(self._average_model.module.net)
        super().on_train_end(trainer, module)


def test_averages_of_weights(trainer, tmp_path):
    averaged, model = Averaged(), Lit(SCHEDULE)
    saved = ModelCheckpoint(tmp_path, "a", every_n_train_steps=10)
    trainer(averaged, saved, enable_checkpointing=True).fit(model)
    seen, wanted = [], Net(SCHEDULE)
    for step in range(1, 11):
        net = by_hand(Net(SCHEDULE), [1] * step, 10)
        seen.append([p.detach() for p in net.parameters()])
    for p, values in zip(wanted.parameters(), zip(*seen, strict=True), strict=True):
        p.data = torch.stack(values).mean(0)
    assert_same(averaged.average, wanted)
    assert_same(model.net, wanted)  # what Lightning leaves in the model
    resumed = Lit(SCHEDULE)
    trainer(Averaged(), max_epochs=3).fit(resumed, ckpt_path=tmp_path / "a.ckpt")
    assert steps(resumed) == list(range(10, 15))


def test_stochastic_weight_averaging(trainer):
    model = Lit(SCHEDULE)
    trainer(StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)).fit(model)
    assert steps(model) == list(range(10))


@pytest.mark.parametrize("grad", [SCHEDULE, WARM])
def test_finders_leave_training_as_it_is_without_them(trainer, grad):
    """They train, rewind, and call no callback but their own meanwhile."""
    finder = LearningRateFinder(num_training_steps=6, update_attr=False, early_stop_threshold=None)
    model, plain = Lit(grad), Lit(grad)
    found = trainer(finder, max_steps=10, enable_checkpointing=True)
    found.fit(model)
    trainer(max_steps=10).fit(plain)
    trial = steps(model)[:-10]
    assert trial == [0] * len(trial) != []
    assert model.told[-10:] == plain.told
    assert_same(model.net, plain.net)


def test_a_finder_of_batch_sizes(trainer):
    finder = BatchSizeFinder(init_val=2, max_trials=1, steps_per_trial=2, batch_arg_name="size")
    model = Lit(SCHEDULE)
    trainer(finder, max_steps=4).fit(model)
    assert steps(model)[-4:] == list(range(4))


def test_fractions_of_training_in_a_finder_need_the_total(trainer):
    finder = [LearningRateFinder(num_training_steps=2, update_attr=False)]
    with pytest.raises(ValueError, match="is a fraction of training, and nobody has told"):
        trainer(*finder).fit(Lit(SCHEDULE))
    trainer(*finder, step=SetStep(total=10)).fit(Lit(SCHEDULE))


class Late(Lit):
    """Makes its layers when the Trainer asks for them."""

    def __init__(self):
        super().__init__()
        del self.net
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Net(SCHEDULE)


def test_a_model_that_is_configured_late(trainer):
    model = Late()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="lightning")
        trainer().fit(model)
    assert steps(model) == list(range(10))
    assert_same(model.net, by_hand(Net(SCHEDULE), [1] * 10, 10))


def test_the_package_by_its_old_name(tmp_path):
    old = pytest.importorskip("pytorch_lightning")

    class Old(old.LightningModule):
        save = told = None

        def __init__(self):
            super().__init__()
            self.net, self.told = Net(SCHEDULE), []

    for name in ("training_step", "configure_optimizers", "train_dataloader", "memory"):
        setattr(Old, name, Lit.__dict__[name])
    Old.rate, Old.size = RATE, BATCH
    model = Old()
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    fitted = old.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[SetStep()],
        default_root_dir=tmp_path,
        **settings,
    )
    fitted.fit(model)
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    assert MEMORY in torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert_same(model.net, by_hand(Net(SCHEDULE), [1] * 10, 10))


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("()", 'lightning is not installed: pip install "deq-phantom-plugin[lightning]"'),
        ("('pytorch_lightning',)", "of pytorch_lightning"),
    ],
)
def test_without_the_package_the_error_says_how_to_get_it(there, said):
    code = (
        "import sys, importlib.util as util, types\n"
        "import deq_phantom_plugin\n"
        "assert 'lightning' not in sys.modules\n"
        f"there, find = {there}, util.find_spec\n"
        "import deq_phantom_plugin._plumbing.extras as extras\n"
        "names = ('lightning', 'pytorch_lightning')\n"
        "for name in set(names) - set(there): sys.modules[name] = None\n"
        "for name in there:\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].Callback = type('Callback', (), {'__module__': name})\n"
        "    sys.modules[name].__spec__ = types.SimpleNamespace(name=name)\n"
        "from deq_phantom_plugin.integrations.lightning import SetStep\n"
        "print('of', SetStep.__mro__[1].__module__)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert said in ended.stdout + ended.stderr
