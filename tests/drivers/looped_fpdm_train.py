"""Runs the training script of fixed-point-diffusion-models, in its folder, for three steps.

    python looped_fpdm_train.py [--grad SPEC]

What it imports and is not installed, or wants a GPU, are stand-ins. Prints losses, gradients, and
what its loop was told.
"""

import importlib.util
import json
import os
import random
import runpy
import sys
import tempfile
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

sys.path.insert(0, os.getcwd())


class Tap:
    """As much of typed-argument-parser as the script uses."""

    def __init__(self, explicit_bool):
        pass

    def parse_args(self):
        for option, text in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
            name = option.removeprefix("--")
            default = getattr(self, name)  # an option that there is not is refused
            setattr(self, name, text if default is None else type(default)(text))
        self.process_args()
        return self

    def save(self, path):
        pass


class Accelerator:
    """Of accelerate, in one process on the CPU."""

    device, is_main_process, num_processes = torch.device("cpu"), False, 1
    told: ClassVar = []

    def __init__(self, **settings):
        pass

    def prepare(self, model, *others):
        self.model = model
        return model, *others

    def backward(self, loss):
        loss.backward()
        grads = [float(p.grad.double().abs().sum()) for p in self.model.parameters()]
        memory = self.model.loop.memory if hasattr(self.model, "loop") else None
        step = [memory.step, memory.total] if memory else None
        self.told.append({"loss": float(loss), "grads": grads, "step": step})

    def end_training(self):
        pass


def module(name, **content):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)


def main():
    from looped_models import MODELS

    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    MODELS["fpdm"].prepare()
    import models

    models.DiT_models["tiny"] = lambda **settings: models.DiT(
        depth=1, hidden_size=8, patch_size=4, num_heads=2, **settings
    )
    module("tap", Tap=Tap)
    nothing = lambda **settings: None  # noqa: E731
    module("accelerate", Accelerator=Accelerator, DistributedDataParallelKwargs=nothing)
    module("accelerate.utils", ProjectConfiguration=nothing)
    if importlib.util.find_spec("tqdm") is None:
        module("tqdm", tqdm=lambda: types.SimpleNamespace(update=lambda: None))
    torch.cuda.is_available = lambda: True  # which it asks for
    folder = Path(tempfile.mkdtemp())
    for kind, shape in (("features", (1, 4, 8, 8)), ("labels", (1,))):
        target = folder / f"imagenet256_{kind}"
        target.mkdir()
        drawn = np.random.default_rng(0)
        for number in range(6):
            value = drawn.integers(0, 9, shape) if kind == "labels" else drawn.normal(size=shape)
            np.save(
                target / f"{number}.npy", value.astype("int64" if kind == "labels" else "float32")
            )
    options = {"model": "tiny", "image_size": 64, "feature_path": folder, "output_dir": folder}
    options |= {
        "fixed_point": True,
        "global_batch_size": 2,
        "num_workers": 0,
        "epochs": 1,
        "name": "x",
    }
    sys.argv[1:1] = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    runpy.run_path("train.py", run_name="__main__")
    print("RESULT", json.dumps(Accelerator.told))


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    main()
