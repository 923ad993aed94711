import argparse
import json
import os
import subprocess
import sys

import torch
from model import Net

parser = argparse.ArgumentParser()
parser.add_argument("--how", default="here")
args = parser.parse_args()


def gradient(rank=0, file=None):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = Net()
    model(torch.randn(3, 4)).square().sum().backward()
    result = [p.grad.flatten().tolist() for p in model.parameters()]
    if file is not None:
        with open(file, "w") as stream:
            json.dump(result, stream)
    return result


class Gradients(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        from model import Net as loaded  # noqa: F401

        return json.dumps(gradient())


if __name__ == "__main__":
    model = Net()
    if args.how == "spawn":
        torch.multiprocessing.spawn(gradient, args=("spawned.json",))
        with open("spawned.json") as stream:
            result = json.load(stream)
    elif args.how == "worker":
        loader = torch.utils.data.DataLoader(
            Gradients(), num_workers=1, multiprocessing_context="spawn", collate_fn=list
        )
        result = json.loads(next(iter(loader))[0])
    elif args.how == "child":
        result = json.loads(subprocess.check_output([sys.executable, "train.py"]))
    elif args.how == "raise":
        torch.manual_seed(0)
        model(torch.full((3, 4), float("nan")))
    elif args.how == "exit":
        sys.exit(7)
    elif args.how == "kill":
        os.kill(os.getpid(), 15)
    elif args.how == "sleep":
        import time

        print("ready", flush=True)
        time.sleep(60)
    else:
        result = gradient()
    print(json.dumps(result))
