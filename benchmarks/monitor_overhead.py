"""Measures what `dpp.monitor` costs: training steps that it logs, and steps that it does not log.

    python benchmarks/monitor_overhead.py

The script trains MDEQ-tiny on scikit-learn's digits (15 Anderson iterations in the forward solve),
and logs every fifth step. For each strategy it prints the median time of both kinds of step. It
also prints the share of the training time that logging would take at the default interval.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.output import text_table
from deq_phantom_plugin.adapters.mdeq import MDEQ
from deq_phantom_plugin.compare import load_digits
from deq_phantom_plugin.diagnostics.measure.cost import now
from deq_phantom_plugin.diagnostics.monitoring import DEFAULT_EVERY

EVERY = 5


def measure(grad: str, steps: int, batch_size: int, device: torch.device) -> tuple[float, float]:
    """Return the median seconds of a plain step and of a logged one."""
    data = load_digits()
    torch.manual_seed(0)
    model = MDEQ.from_preset(
        "tiny",
        in_channels=data.train_images.shape[1],
        grad=grad,
        f_solver="anderson",
        f_max_iter=15,
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with dpp.monitor(model, lambda numbers, step: None, every=EVERY):
        for step in range(steps):
            chosen = torch.randint(len(data.train_labels), (batch_size,))
            images, labels = data.train_images[chosen], data.train_labels[chosen]
            dpp.set_step(model, step)
            start = now(device)
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            if step > 0:  # the first step warms up
                seconds[step % EVERY == 0].append(now(device) - start)
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--grad", nargs="+", default=["ift", "upg", "npg", "jfb"])
    parser.add_argument("--steps", type=int, default=51)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    rows = []
    for grad in args.grad:
        plain, logged = measure(grad, args.steps, args.batch_size, args.device)
        share = (logged - plain) / (plain * DEFAULT_EVERY)
        rows.append([grad, f"{1e3 * plain:.0f}", f"{1e3 * logged:.0f}", f"{share:.1%}"])
    print(text_table(["method", "plain ms", "logged ms", f"every {DEFAULT_EVERY}"], rows))


if __name__ == "__main__":
    main()
