from models.mdeq import MDEQClsNet
from settings import deq_args, image_loss


def build():
    model = MDEQClsNet(deq_args("--f_max_iter", "10", "--norm_type", "weight_norm"))
    return model, image_loss(model, classes=1000, side=64, of=lambda out: out[-1])
