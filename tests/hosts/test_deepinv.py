"""deepinv's equilibrium reconstructions with strategies by name; `make test-deepinv`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deq_phantom_plugin as dpp
from host_cases import DeepInvCase

if DeepInvCase.missing:
    pytest.skip(DeepInvCase.missing, allow_module_level=True)

import deepinv
from deepinv.optim import ADMM, DRS, HQS, PGD, DEQConfig

PHYSICS = deepinv.physics.Denoising()


@pytest.fixture(autouse=True)
def _enabled():
    dpp.enable("deepinv")


def make(algorithm=PGD, seed=0, **settings):
    torch.manual_seed(seed)
    prior = deepinv.optim.PnP(denoiser=DeepInvCase.Denoiser())
    options = {"stepsize": 0.8, "max_iter": 300, "thres_conv": 1e-15, "early_stop": True}
    model = algorithm(
        prior=prior,
        data_fidelity=deepinv.optim.L2(),
        trainable_params=["stepsize"],
        DEQ=DEQConfig(**settings),
        **options,
    )
    return model.double().train()


def gradient(model):
    y = torch.linspace(0, 1, 32, dtype=torch.float64).view(2, 1, 4, 4)
    model.zero_grad()
    x = model(y, PHYSICS)
    x.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return x.detach(), torch.cat([g.flatten() for g in found.values()])


def test_jacobian_free_is_jfb():
    x, expected = gradient(make(jacobian_free=True))
    value, found = gradient(make(grad="jfb"))
    torch.testing.assert_close(value, x)
    torch.testing.assert_close(found, expected)


def test_its_implicit_gradient_is_ift():
    # Its backward iteration stops at the threshold of the forward one, or at its most iterations.
    _, expected = gradient(make(max_iter_backward=300))
    for grad in ("ift(tol=1e-12, max_iter=200)", "exact"):
        _, found = gradient(make(grad=grad))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("algorithm", [PGD, HQS, DRS, ADMM])
def test_algorithms_with_and_without_a_dual_variable(algorithm):
    x, exact = gradient(make(algorithm, grad="exact"))
    value, found = gradient(make(algorithm, grad="ift(tol=1e-12, max_iter=300)"))
    torch.testing.assert_close(value, x)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)
    _, phantom = gradient(make(algorithm, grad="upg(k=200, lam=0.9)"))
    torch.testing.assert_close(phantom, exact, rtol=1e-4, atol=1e-6)


def test_settings_fill_in_what_a_spec_leaves_out():
    config = DEQConfig(grad="ift", anderson_acceleration_backward=True, max_iter_backward=7)
    assert config.grad == dpp.IFT(solver="anderson", max_iter=7)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="grad='upg' beside jacobian_free=True"):
        DEQConfig(jacobian_free=True, grad="upg")
    with pytest.raises(ValueError, match="did you mean 'upg'"):
        DEQConfig(grad="ugp")
    dpp.disable("deepinv")
    with pytest.raises(TypeError, match="grad"):
        DEQConfig(grad="upg")


def test_models_that_share_a_config_are_switched_one_by_one():
    config = DEQConfig(grad="jfb")
    models = [make(), make()]
    for model in models:
        model.DEQ_config = config
    dpp.set_grad(models[0], "upg(k=2)")
    assert models[1].DEQ_config.grad == dpp.JFB()
    assert models[0].DEQ_config.grad == dpp.UPG(2)


def test_evaluation_is_deepinvs_own():
    model = make(grad="upg")
    y = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        named = model.eval()(y, PHYSICS)
        dpp.disable("deepinv")
        torch.testing.assert_close(model(y, PHYSICS), named)


@pytest.mark.parametrize("grad", ["jfb", "upg", "npg", "ift"])
def test_a_denoiser_learns(grad):
    skimage = pytest.importorskip("sklearn.datasets")
    picture = torch.tensor(skimage.load_sample_image("china.jpg")).float().mean(dim=2) / 255
    patches = picture.unfold(0, 32, 32).unfold(1, 32, 32).reshape(-1, 1, 32, 32)[:16].double()
    torch.manual_seed(0)
    noisy = patches + 0.1 * torch.randn_like(patches)
    model = make(grad=grad)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(noisy, PHYSICS), patches)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_example_denoises(capsys):
    from conftest import load_example

    pytest.importorskip("sklearn")
    example = load_example("deepinv_denoise")
    table = example.main(["--steps", "2", "--batch", "2", "--grad", "own", "upg"])
    assert [row.split("  ")[0] for row in table.splitlines()[2:]] == [
        "the noisy image",
        "own",
        "upg",
    ]
    with pytest.raises(SystemExit):
        example.main(["--grad", "ugp"])
    assert "did you mean 'upg'" in capsys.readouterr().err
