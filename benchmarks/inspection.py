"""Measures what it costs to find out whether the samples of a batch are coupled.

    python benchmarks/inspection.py --repeats 9

Each repeat trains two fresh MDEQ-tiny models with the same weights for three steps, one model after
the other. One model is told that its samples are independent, and the other has to find out. The
script prints the ratio of the median times of the two, for the first step and for later ones. It
also prints how many more evaluations of f and products the question takes.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adapters.mdeq import MDEQ
from deq_phantom_plugin.adjoint import linearization

STEPS = 3


class Counted:
    """Counts the evaluations of a model's f."""

    def __init__(self, model: MDEQ) -> None:
        self.evaluations = self.products = 0
        model.layer.register_forward_hook(lambda *args: self._note())

    def _note(self) -> None:
        self.evaluations += 1


def steps(grad: str, told: bool, images: Tensor) -> tuple[list[float], list[int]]:
    """Train a fresh model, and return the seconds and the evaluations of f of each step.

    Args:
        grad: the spec of the gradient.
        told: whether the model is told that its samples are independent.
        images: shape (B, 3, 32, 32).
    """
    torch.manual_seed(0)
    model = MDEQ.from_preset("tiny", grad=grad, f_solver="broyden_fast")
    if told:
        model.deq.grad_batch_dim = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    counted, seconds, evaluations = Counted(model), [], []
    for _ in range(STEPS):
        before, start = counted.evaluations, time.perf_counter()
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        evaluations.append(counted.evaluations - before)
    return seconds, evaluations


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--grad", nargs="+", default=["ift(max_iter=10, tol=0.5)", "upg"])
    args = parser.parse_args()
    images = torch.randn(args.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    products = len(linearization._words(args.batch)) if args.batch > 1 else 0
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch}")
    for grad in args.grad:
        steps(grad, True, images)  # warms up
        asked, told = [], []
        for _ in range(args.repeats):
            asked.append(steps(grad, False, images))
            told.append(steps(grad, True, images))
        median = [
            [statistics.median(run[0][i] for run in runs) for i in range(STEPS)]
            for runs in (asked, told)
        ]
        more = [a - b for a, b in zip(asked[0][1], told[0][1], strict=True)]
        print(
            f"{grad}: first step {median[0][0] / median[1][0]:.2f}, later "
            f"{median[0][-1] / median[1][-1]:.2f} of the time of one that does not ask; "
            f"evaluations of f more: {more[0]}, then {more[1:]}; products: {products}"
            f"{'' if dpp.get_strategy(grad).tells_samples_apart else ' if it asked'}"
        )


if __name__ == "__main__":
    main()
