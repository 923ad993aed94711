import torch
from models.deq_transformer import DEQTransformerLM
from settings import deq_args


def build():
    args = deq_args("--f_max_iter", "10")
    args.mem = False
    model = DEQTransformerLM(args, 50, 2, 2, 16, 8, 32, 0.0, 0.0, tgt_len=8, mem_len=8, d_embed=16)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.05)
    data = torch.randint(50, (3, 8))
    return model, lambda: model(data, data, [])[0].mean()
