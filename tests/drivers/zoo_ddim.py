import sys
from argparse import Namespace
from types import ModuleType

import torch
import yaml
from settings import deq_args

# Its files import a logger and a drawing program that training has no use for.
sys.modules["wandb"] = ModuleType("wandb")
sys.modules["turtle"] = ModuleType("turtle")
sys.modules["turtle"].pd = None
from functions.latent_space_opt_sddim import DEQLatentSpaceOpt  # noqa: E402
from models.diffusion import Model  # noqa: E402

STEPS = 4


def build():
    with open("configs/cifar10_ls_opt.yml") as file:
        config = yaml.safe_load(file)
    config["model"].update(ch=32, ch_mult=[1, 1], num_res_blocks=1, attn_resolutions=[8])
    config["data"].update(image_size=16)
    unet = Model(Namespace(**{key: Namespace(**value) for key, value in config.items()}))
    model = DEQLatentSpaceOpt(deq_args("--f_max_iter", "15"), unet.requires_grad_(False))
    target, latent = torch.randn(3, 16, 16), torch.randn(1, 3, 16, 16)
    model.latent = torch.nn.Parameter(latent.repeat(STEPS + 1, 1, 1, 1))
    unet.train = lambda mode=True: unet  # it stays in evaluation, as in its own script
    unet.eval()
    noise = torch.linspace(1e-4, 0.02, 1000)
    seq = range(0, 1000, 1000 // STEPS)
    injection = model.get_ddim_injection(model.latent, seq, noise, 1)
    return model, lambda: (model(model.latent, injection)[-1] - target).square().mean()
