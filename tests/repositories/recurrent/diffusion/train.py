"""Trains for an epoch of three steps."""

from copy import deepcopy

import torch
from accelerate import Accelerator
from models import DiT_models
from tap import Tap


class Args(Tap):
    model: str = "tiny"
    image_size: int = 64
    feature_path: str = ""
    output_dir: str = "results"
    name: str = ""
    fixed_point: bool = False
    fixed_point_pre_post_timestep_conditioning: bool = False
    epochs: int = 2
    global_batch_size: int = 512
    num_workers: int = 4

    def process_args(self):
        assert self.name


def update_ema(ema, model):
    for mean, p in zip(ema.parameters(), model.parameters(), strict=True):
        mean.data.lerp_(p.data, 0.1)


def main(args):
    model = DiT_models[args.model](
        input_size=args.image_size // 8,
        num_classes=3,
        fixed_point=args.fixed_point,
    )
    ema = deepcopy(model)
    accelerator = Accelerator()
    loader = [torch.randn(args.global_batch_size, 4, 2, 2) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    train_steps = 0
    for _ in range(args.epochs):
        for x in loader:
            t = torch.randint(0, 100, (len(x),))
            optimizer.zero_grad()
            loss_dict = {"loss": model(x, t, t % 3).square().mean()}
            accelerator.backward(loss_dict["loss"])
            optimizer.step()
            update_ema(ema, model)
            train_steps += 1
    accelerator.end_training()


if __name__ == "__main__":
    main(Args(explicit_bool=True).parse_args())
