import torch
from core.deq_flow import DEQFlow
from settings import deq_args


def build():
    args = deq_args("--f_max_iter", "6")
    vars(args).update(
        tiny=True,
        large=False,
        huge=False,
        gigantic=False,
        gma=False,
        mixed_precision=False,
        all_grad=True,
        old_version=False,
        dropout=0.0,
    )
    model = DEQFlow(args)
    one, two = 255 * torch.rand(2, 1, 3, 128, 128)
    flow = torch.randn(1, 2, 128, 128)

    def fc_loss(predictions, target, valid):
        error = (predictions[-1] - target).abs()
        return error.mean(), error.mean(1).detach()

    return model, lambda: _loss(model, one, two, flow, fc_loss)


def _loss(model, one, two, flow, fc_loss):
    return model(one, two, flow_gt=flow, fc_loss=fc_loss)[0]
