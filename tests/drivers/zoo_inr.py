import torch
from modules.modeling_utils import construct_model_args, get_model
from settings import deq_args


def build():
    args = deq_args("--f_max_iter", "10")
    settings = construct_model_args(
        "implicit", args, 1, 2, 16, 3, input_scale=16.0, use_implicit=True, filter_type="fourier"
    )
    model = get_model(settings)
    x = torch.rand(1, 40, 2)
    y = torch.rand(1, 40, 3)
    return model, lambda: (model(x)["output"] - y).square().mean()
