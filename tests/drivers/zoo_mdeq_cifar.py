import sys

sys.path.insert(0, "mdeq")
from config import config
from models import mdeq
from settings import deq_args, image_loss


def build():
    config.defrost()
    config.merge_from_file("configs/small.yaml")
    model = mdeq.get_cls_net(config, deq_args("--f_max_iter", "10"))
    return model, image_loss(model, of=lambda out: out[-1])
