"""One small model for each host, for the tests that all hosts share."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import why_not
from deq_phantom_plugin.adapters.ignn import IGNNConv
from deq_phantom_plugin.hosts.hrm_text import HrmText
from deq_phantom_plugin.patching import Equilibrium
from deq_phantom_plugin.testing import HostCase


def without(*packages: str) -> str:
    """Return which packages are missing or broken, in words."""
    return "; ".join(why for why in map(why_not, packages) if why)


class TorchDEQCase(HostCase):
    name = "torchdeq"
    copies_observers = True  # its hooks are those of modules
    missing = without("torchdeq")
    own = 2
    patched = (
        ("torchdeq.core.DEQSliced", "__init__"),
        ("torchdeq.core.DEQSliced", "forward"),
        ("torchdeq.core.DEQIndexing", "forward"),
        ("torchdeq.utils.arg_utils.add_deq_args", "__code__"),
    )

    class Model(nn.Module):
        def __init__(self, grad: Any, inside: nn.Module | None) -> None:
            super().__init__()
            from torchdeq import get_deq

            self.weight = nn.Linear(5, 5)
            self.inject = nn.Linear(3, 5)
            self.inside = inside or nn.Identity()
            self.deq = get_deq(grad=grad, f_max_iter=80, f_tol=1e-13, f_solver="fixed_point_iter")

        def forward(self, x: Tensor) -> Tensor:
            z = self.inject(x)
            states, _ = self.deq(
                lambda h: torch.tanh(0.7 * self.inside(self.weight(h)) + z), torch.zeros_like(z)
            )
            return states[-1]

    def model(self, grad: Any, inside: nn.Module | None = None) -> nn.Module:
        torch.manual_seed(0)
        return self.Model(grad, inside).double().train()

    def loss(self, model: nn.Module) -> Tensor:
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
        return (model(x) * torch.linspace(0, 1, 5, dtype=torch.float64)).square().sum()


class HrmTextCase(HostCase):
    name = "hrm_text"
    missing = (
        HrmText().why_broken() if HrmText().installed() else "no Transformers that has hrm_text"
    )
    exact, precision = "ift(tol=1e-6, max_iter=400)", 1e-4  # the model normalises in float32
    channels, width, steps = 4, 8, 3
    own = None
    patched = (
        ("transformers.models.hrm_text.modeling_hrm_text.HrmTextModel", "forward"),
        ("transformers.models.hrm_text.modeling_hrm_text.HrmTextModel", "__init__"),
        ("transformers.models.hrm_text.modeling_hrm_text.HrmTextStack", "forward"),
        ("transformers.models.hrm_text.modeling_hrm_text.HrmTextPreTrainedModel", "set_grad"),
    )

    @staticmethod
    def config(**settings: Any) -> Any:
        from transformers import HrmTextConfig

        sizes = {
            "vocab_size": 11,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 4,
            "H_cycles": 2,
            "L_cycles": 3,
            "initializer_range": 0.3,
            "max_position_embeddings": 16,
            "attn_implementation": "eager",
        }
        return HrmTextConfig(**{**sizes, **settings})

    def model(self, grad: Any, inside: nn.Module | None = None) -> nn.Module:
        from transformers import HrmTextForCausalLM

        torch.manual_seed(0)
        model = HrmTextForCausalLM(self.config()).double().train()
        if inside is not None:
            layer = model.model.L_module.layers[0]
            layer.mlp = nn.Sequential(layer.mlp, inside.double())
        if grad is not None:
            dpp.set_grad(model, grad)
        return model

    def loss(self, model: nn.Module) -> Tensor:
        ids = torch.tensor([[1, 5, 3, 2], [4, 4, 9, 10]])
        return model(ids, labels=ids).loss


class TinyRecursiveCase(HostCase):
    name = "tiny_recursive_model"
    missing = without("tiny_recursive_model")
    channels, steps, calls = 4, 4, 3
    patched = (
        ("tiny_recursive_model.trm.TinyRecursiveModel", "__init__"),
        ("tiny_recursive_model.trm.TinyRecursiveModel", "deep_refinement"),
    )

    class Network(nn.Module):
        """A contraction, so that the loop's end is near an equilibrium."""

        def __init__(self, width: int, inside: nn.Module | None) -> None:
            super().__init__()
            self.mix, self.inside = nn.Linear(width, width), inside or nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(0.4 * self.inside(self.mix(x)))

    def model(self, grad: Any, inside: nn.Module | None = None) -> nn.Module:
        from tiny_recursive_model import TinyRecursiveModel

        torch.manual_seed(0)
        network = self.Network(self.width, inside)
        named = {} if grad is None else {"grad": grad}
        model = TinyRecursiveModel(
            dim=self.width,
            num_tokens=7,
            network=network,
            num_refinement_blocks=self.steps,
            num_latent_refinements=self.calls - 1,
            **named,
        )
        return model.double().train()

    def loss(self, model: nn.Module) -> Tensor:
        tokens = torch.tensor([[1, 5, 3, 2], [4, 4, 6, 0], [2, 0, 1, 1]])
        carried = [vector.expand(*tokens.shape, -1) for vector in model.get_initial()]
        return model(tokens, *carried, labels=tokens)[0]


class SilvaCase(HostCase):
    name = "silva"
    remembers = False
    missing = without("silva_networks")
    own = "phantom"
    patched = (
        ("silva_networks.solvers.SolverConfig", "__post_init__"),
        ("silva_networks.solvers.solve_equilibrium", "__code__"),
        ("silva_networks.deq_engine.SILVADEQEngine", "forward"),
    )

    class Model(nn.Module):
        """Two tensors, as a pair."""

        def __init__(self, grad: Any, inside: nn.Module | None = None, **settings: Any) -> None:
            super().__init__()
            from silva_networks import SolverConfig
            from silva_networks.deq_engine import SILVADEQEngine

            self.weight = nn.Linear(5, 5)
            self.other = nn.Linear(2, 5)
            self.inject = nn.Linear(3, 5)
            self.inside = inside or nn.Identity()
            settings = {"max_iter": 200, "tol": 1e-14, "backward_mode": grad, **settings}
            self.engine = SILVADEQEngine(SolverConfig(**settings))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.inject(x)

            def transition(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                a, b = state
                new = torch.tanh(0.5 * self.inside(self.weight(a)) + 0.3 * self.other(b) + z)
                return new, torch.tanh(b @ self.other.weight.T[:, :2] * 0.3 + new[:, :2])

            start = (torch.zeros_like(z), torch.zeros_like(z[:, :2]))
            tensors = (*self.parameters(),)
            return self.engine(transition, start, params=tensors, tensors=(z,))

    def model(self, grad: Any, inside: nn.Module | None = None) -> nn.Module:
        torch.manual_seed(0)
        return self.Model(grad, inside).double().train()

    def loss(self, model: nn.Module) -> Tensor:
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
        a, b = model(x)
        return a.square().sum() + (a[:, :2] * b).sum()


class DeepInvCase(HostCase):
    name = "deepinv"
    missing = without("deepinv") and f"{without('deepinv')}; `make test-deepinv`"
    own = None
    patched = (
        ("deepinv.optim.optimizers.DEQConfig", "__init__"),
        ("deepinv.optim.optimizers.BaseOptim", "DEQ_additional_step"),
    )
    owns_solve = False
    width = 4
    pickles = False  # its metrics hold a lambda

    class Denoiser(nn.Module):
        def __init__(self, inside: nn.Module | None = None) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)
            self.inside = inside or nn.Identity()

        def forward(self, x: Tensor, sigma: Any, **kwargs: Any) -> Tensor:
            return 0.5 * x + 0.2 * torch.tanh(self.inside(self.conv(x)))

    def inside(self, kind: str) -> nn.Module:
        return nn.BatchNorm2d(1) if kind == "batch norm" else super().inside(kind)

    def model(self, grad: Any, inside: nn.Module | None = None) -> nn.Module:
        import deepinv
        from deepinv.optim import PGD, DEQConfig

        torch.manual_seed(0)
        settings = {} if grad is None else {"grad": grad}
        return (
            PGD(
                prior=deepinv.optim.PnP(denoiser=self.Denoiser(inside)),
                data_fidelity=deepinv.optim.L2(),
                stepsize=0.8,
                max_iter=60,
                thres_conv=1e-14,
                early_stop=True,
                DEQ=DEQConfig(**settings),
                trainable_params=["stepsize"],
            )
            .double()
            .train()
        )

    def loss(self, model: nn.Module) -> Tensor:
        y = torch.linspace(0, 1, 32, dtype=torch.float64).view(2, 1, 4, 4)
        return model(y, self.physics).square().sum()

    @functools.cached_property
    def physics(self) -> nn.Module:
        """One for all steps: what is found out about F is asked anew for another."""
        import deepinv

        return deepinv.physics.Denoising()


class IgnnCase(HostCase):
    """Takes names by itself; there is nothing to hook."""

    name = "ignn"
    own = "jfb"

    def model(self, grad: Any, inside: nn.Module | None = None) -> nn.Module:
        torch.manual_seed(0)
        activation = nn.Sequential(inside or nn.Identity(), nn.Tanh())
        return IGNNConv(3, 5, 0.7, grad, activation, f_max_iter=40).double().train()

    def loss(self, model: nn.Module) -> Tensor:
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
        edges = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
        return (model(x, edges) * torch.linspace(0, 1, 5, dtype=torch.float64)).square().sum()


class PatchedCase(HostCase):
    """What `deq-phantom patch` makes of a model with a solve of its own; nothing to hook."""

    name = "own"
    own = "jfb"

    class Model(nn.Module):
        def __init__(self, grad: Any, inside: nn.Module | None) -> None:
            super().__init__()
            self.weight = nn.Linear(5, 5)
            self.inject = nn.Linear(3, 5)
            self.inside = inside or nn.Identity()
            self.equilibrium = Equilibrium(grad)

        def forward(self, x: Tensor) -> Tensor:
            z = self.inject(x)
            start = h = torch.ones_like(z)

            def func(h: Tensor) -> Tensor:
                return torch.tanh(0.7 * self.inside(self.weight(h)) + z)

            with torch.no_grad():
                for _ in range(60):
                    h = func(h)
            return self.equilibrium(func, h, start)

    def model(self, grad: Any, inside: nn.Module | None = None) -> nn.Module:
        torch.manual_seed(0)
        return self.Model(grad, inside).double().train()

    def loss(self, model: nn.Module) -> Tensor:
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
        return (model(x) * torch.linspace(0, 1, 5, dtype=torch.float64)).square().sum()


class OwnCase(PatchedCase):
    """A model that solves by `dpp.Equilibrium`; nothing to hook."""

    class Model(PatchedCase.Model):
        def __init__(self, grad: Any, inside: nn.Module | None) -> None:
            super().__init__(grad, inside)
            self.equilibrium = dpp.Equilibrium("fixed_point", grad, max_iter=60, tol=0.0)

        def forward(self, x: Tensor) -> Tensor:
            z = self.inject(x)
            return self.equilibrium(
                lambda h: torch.tanh(0.7 * self.inside(self.weight(h)) + z), torch.ones_like(z)
            )


CASES = [TorchDEQCase(), HrmTextCase(), TinyRecursiveCase(), SilvaCase(), DeepInvCase()]
