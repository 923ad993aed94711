import functools
import sys

sys.path[:0] = ["lib", ".."]
from config import config, update_config  # noqa: E402
from models import mdeq  # noqa: E402
from settings import contracting, image_loss, merged  # noqa: E402


def build():
    cfg = merged(
        config,
        update_config,
        "experiments/cifar/cls_mdeq_TINY.yaml",
        "MODEL.DROPOUT",
        0.0,
        "DEQ.F_THRES",
        40,
        "DEQ.B_THRES",
        150,
    )
    model = contracting(mdeq.get_cls_net(cfg))
    model.b_solver = functools.partial(model.b_solver, eps=1e-9)  # so that it can be a reference
    return model, image_loss(model, of=lambda out: out[0])
