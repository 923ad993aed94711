import functools
import sys

import torch

sys.path.insert(0, "..")
from lib.solvers import anderson, broyden
from models.deq_transformer import DEQTransformerLM


def build():
    model = DEQTransformerLM(
        50,
        2,
        2,
        2,
        16,
        8,
        32,
        0.0,
        0.0,
        tgt_len=8,
        mem_len=8,
        pretrain_steps=0,
        d_embed=16,
        f_solver=anderson,
        b_solver=broyden,
        stop_mode="rel",
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.05)
    model.b_solver = functools.partial(broyden, eps=1e-9)  # so that it can be a reference
    data = torch.randint(50, (8, 3))

    def loss():
        out = model(data, data, [], train_step=5, f_thres=60, b_thres=60, compute_jac_loss=False)
        return out[0].mean()

    return model, loss
