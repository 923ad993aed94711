import sys

sys.path[:0] = ["lib", ".."]
from config import config, update_config  # noqa: E402
from models import mdeq  # noqa: E402
from settings import image_loss, merged  # noqa: E402


def build(tight=False):
    changes = ["DEQ.F_THRES", 60, "DEQ.B_THRES", 60] if tight else []
    cfg = merged(
        config,
        update_config,
        "experiments/cifar/cls_mdeq_TINY.yaml",
        "MODEL.DROPOUT",
        0.0,
        *changes,
    )
    model = mdeq.get_cls_net(cfg)
    return model, image_loss(model, of=lambda out: out[0])
