"""Trains implicit graph networks (IGNN) with several gradients to classify nodes: chains and Cora.

    python examples/train_ignn.py                             # chains of 10 and 20 nodes
    python examples/train_ignn.py --lengths 10 20 30 40 60 80 100
    python examples/train_ignn.py --data Cora --root DIR

Unless the options say otherwise, the settings are those of the official code of Gu et al.,
"Implicit Graph Neural Networks", NeurIPS 2020.

chains: directed chains of two classes. Only the first node of a chain has a feature that tells its
class. Every node is to be classified, and 20 nodes have labels. The table also has a GCN of PyG,
whose three layers reach three hops. The accuracy is that on test nodes at the best validation
epoch. If a method learns nothing with any of the seeds, it is not tried on longer chains.

examples/experiments has sets of graphs (COX2, PROTEINS, PPI).
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.output import text_table, write_whole
from deq_phantom_plugin.adapters.ignn import IGNN

GCN = "gcn (3 layers)"
HIDDEN = 16  # channels of all networks
PATIENCE = 100  # epochs after which training stops, once all validation nodes are right
HOPELESS = 0.75  # a method whose best accuracy is below this is not tried on longer chains


@dataclass(frozen=True)
class Task:
    """The training settings of one data set.

    Attributes:
        epochs: the largest number of passes over the training data.
        lr: Adam's learning rate.
        kappa: the bound of the contractions.
        lam: the damping, for methods that do not give it.
        weight_decay: Adam's weight decay.
        clip: the norm to which the gradient of each parameter is clipped; infinite for none.
        f_tol: the tolerance of the forward solve.
    """

    epochs: int
    lr: float
    kappa: float
    lam: float
    weight_decay: float = 0.0
    clip: float = float("inf")
    f_tol: float = 3e-6


TASKS = {
    # A signal falls by a constant factor per node, so long chains need a smaller tolerance.
    "chains": Task(2000, 0.01, 0.9, 0.8, weight_decay=5e-4, clip=0.5, f_tol=1e-7),
    "Cora": Task(200, 0.01, 0.9, 0.8, weight_decay=5e-4),
}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        data: the name of the data set.
        method: the spec, or the name of the baseline.
        part: the seed, and for chains their length.
        accuracy: the accuracy on test nodes at the best validation epoch, in [0, 1].
        last: the accuracy on test nodes after the last epoch.
        epochs: the number of epochs.
        seconds: the seconds that training took.
    """

    data: str
    method: str
    part: dict[str, int]
    accuracy: float
    last: float
    epochs: int
    seconds: float


# --- data ----------------------------------------------------------------------------------------


def chains(length: int, seed: int, per_class: int = 20, channels: int = 100) -> Any:
    """Return directed chains of two classes, with a split of their nodes.

    Args:
        length: the number of nodes per chain.
        seed: the seed of the split: 20 nodes for training, 100 for validation, 200 for tests.
        per_class: the number of chains per class.
        channels: the number of features per node. On the first node of a chain, one of the first
            two features is 1 and tells the class. All other features are 0.
    """
    from torch_geometric.data import Data

    x = torch.zeros(2, per_class, length, channels)
    for label in (0, 1):
        x[label, :, 0, label] = 1
    nodes = torch.arange(2 * per_class * length).view(-1, length)
    edge_index = torch.stack([nodes[:, :-1].flatten(), nodes[:, 1:].flatten()])
    y = torch.arange(2).repeat_interleave(per_class * length)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    data = Data(x=x.flatten(0, 2), edge_index=edge_index, y=y)
    for name, ids in (("train", order[:20]), ("val", order[20:120]), ("test", order[120:320])):
        data[f"{name}_mask"] = torch.zeros(len(y), dtype=torch.bool).index_fill_(0, ids, True)
    return data


def load(name: str, root: str | None) -> Any:
    """Return a data set of PyG, which is read from a folder or downloaded into it.

    Raises:
        SystemExit: if no folder is given.
    """
    if root is None:
        raise SystemExit(f"--data {name} needs --root DIR, where PyG finds or puts the files")
    import torch_geometric.transforms as T
    from torch_geometric.datasets import Planetoid

    return Planetoid(f"{Path(root).expanduser()}/cora", name, transform=T.NormalizeFeatures())[0]


# --- training ------------------------------------------------------------------------------------


def train_nodes(model: nn.Module, data: Any, task: Task, on_epoch: Callable[[], Any]) -> Run:
    """Train on the marked nodes of one graph.

    Args:
        model: the network.
        data: the graph, with `train_mask`, `val_mask` and `test_mask`.
        task: the training settings.
        on_epoch: is called after each epoch.
    """
    optimizer = _adam(model, task)
    best, last, since, started = (-1.0, 0.0, 0.0), 0.0, 0, time.perf_counter()
    epoch = 0
    for epoch in range(1, task.epochs + 1):
        model.train()
        out = model(data.x, data.edge_index)
        _step(optimizer, F.cross_entropy(out[data.train_mask], data.y[data.train_mask]), task)
        on_epoch()
        if epoch % 10 and epoch < task.epochs:
            continue
        with torch.no_grad():
            out = model.eval()(data.x, data.edge_index)
        val, last = (_accuracy(out[m], data.y[m]) for m in (data.val_mask, data.test_mask))
        loss = float(F.cross_entropy(out[data.val_mask], data.y[data.val_mask]))
        # Of epochs with equal accuracy, the one with the lowest validation loss is best.
        best = max(best, (val, -loss, last))
        since = since + 10 if best[0] == 1 else 0
        if since >= PATIENCE:
            break
    return Run("", "", {}, best[2], last, epoch, time.perf_counter() - started)


def _adam(model: nn.Module, task: Task) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=task.lr, weight_decay=task.weight_decay)


def _step(optimizer: torch.optim.Adam, loss: Tensor, task: Task) -> None:
    optimizer.zero_grad()
    loss.backward()
    if task.clip < float("inf"):
        for parameter in optimizer.param_groups[0]["params"]:
            nn.utils.clip_grad_norm_(parameter, task.clip)  # one by one, as in the official code
    optimizer.step()


def _accuracy(out: Tensor, y: Tensor) -> float:
    return float((out.argmax(dim=1) == y).float().mean())


# --- the experiments -----------------------------------------------------------------------------


def run_chains(args: argparse.Namespace, task: Task, bar: Any) -> Iterable[Run]:
    """Train every method on chains of rising length with every seed, as long as it learns them."""
    from torch_geometric.nn import GCN as PyGGCN

    methods = [GCN, *args.grad]
    for length in sorted(args.lengths):
        best = dict.fromkeys(methods, 0.0)
        for method in methods:
            for seed in args.seeds:
                data = chains(length, seed).to(args.device)
                torch.manual_seed(seed)
                model: nn.Module
                if method == GCN:
                    model = PyGGCN(data.num_features, HIDDEN, 3, 2, dropout=0.5)
                else:
                    model = make_model(data.num_features, 2, method, task)
                part = {"length": length, "seed": seed}
                run = train_nodes(model.to(args.device), data, task, bar(method, part))
                best[method] = max(best[method], run.accuracy)
                yield replace(run, data="chains", method=method, part=part)
        methods = [name for name in methods if name == GCN or best[name] >= HOPELESS]


def run_citation(args: argparse.Namespace, task: Task, bar: Any) -> Iterable[Run]:
    """Train every method on Cora's public split with every seed."""
    data = load(args.data, args.root).to(args.device)
    for method in args.grad:
        for seed in args.seeds:
            torch.manual_seed(seed)
            model = make_model(data.num_features, int(data.y.max()) + 1, method, task)
            part = {"seed": seed}
            run = train_nodes(model.to(args.device), data, task, bar(method, part))
            yield replace(run, data=args.data, method=method, part=part)


def make_model(in_channels: int, out_channels: int, method: str, task: Task) -> IGNN:
    """Return a network with one implicit layer."""
    grad = dpp.get_strategy(method, {"lam": task.lam})
    return IGNN(
        in_channels, HIDDEN, out_channels, 1, "node", grad, kappa=task.kappa, f_tol=task.f_tol
    )


EXPERIMENTS: dict[str, Callable[[argparse.Namespace, Task, Any], Iterable[Run]]] = {
    "chains": run_chains,
    "Cora": run_citation,
}


# --- results -------------------------------------------------------------------------------------


def table(runs: Sequence[Run]) -> str:
    """Return a table of accuracies in percent: mean and standard deviation over the seeds."""
    groups: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.part.get("length", 0), run.method), []).append(run)
    is_chains = runs[0].data == "chains"
    header = ["method", *(["length"] if is_chains else []), "best", "last", "runs", "s/epoch"]
    rows = []
    for (length, method), group in groups.items():
        seconds = sum(r.seconds for r in group) / max(sum(r.epochs for r in group), 1)
        cells = [_mean_and_std([getattr(r, a) for r in group]) for a in ("accuracy", "last")]
        own = [str(length)] if is_chains else []
        rows.append([method, *own, *cells, str(len(group)), f"{seconds:.3f}"])
    return text_table(header, rows)


def _mean_and_std(values: Sequence[float]) -> str:
    percent = [100 * value for value in values]
    return f"{statistics.mean(percent):.1f} ± {statistics.pstdev(percent):.1f}"


def save(folder: Path, runs: Sequence[Run]) -> None:
    """Write the results so far: all runs as CSV, and a plot for chains of several lengths."""
    name = f"ignn_{runs[0].data.lower()}"
    text = io.StringIO()
    keys = list(runs[0].part)
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["data", "method", *keys, "accuracy", "last", "epochs", "seconds"])
    for r in runs:
        numbers = [f"{r.accuracy:.4f}", f"{r.last:.4f}", r.epochs, f"{r.seconds:.1f}"]
        rows.writerow([r.data, r.method, *(r.part[key] for key in keys), *numbers])
    write_whole(folder / f"{name}.csv", text.getvalue().encode())
    if len({run.part.get("length") for run in runs}) > 1:
        write_whole(folder / f"{name}.png", plot(runs))


def plot(runs: Sequence[Run]) -> bytes:
    """Return a PNG of the accuracy over the chain length: the mean, and each seed as a dot.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    require("matplotlib", "viz")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, method in enumerate(dict.fromkeys(run.method for run in runs)):
        own = [run for run in runs if run.method == method]
        lengths = sorted({run.part["length"] for run in own})
        by_length = [[100 * r.accuracy for r in own if r.part["length"] == x] for x in lengths]
        color, style = f"C{number % 10}", "--" if method == GCN else "-"
        means = [statistics.mean(values) for values in by_length]
        axes.plot(lengths, means, style, color=color, label=method)
        for x, values in zip(lengths, by_length, strict=True):
            axes.plot([x] * len(values), values, ".", color=color, markersize=4)
    axes.axhline(50, color="0.7", linewidth=0.8)
    axes.set(xlabel="nodes in a chain", ylabel="test accuracy (%)", ylim=(38, 102))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


# --- the command line ----------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Task]:
    """Return the arguments, and the task with the changes that they make."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=list(TASKS), default="chains", help="what to train on (chains)")
    add("--root", help="folder of PyG's data sets; needed by all but chains")
    add("--grad", nargs="+", type=_spec, default=["ift", "upg", "npg"], metavar="SPEC")
    add("--lam", type=float, help="damping of methods that do not give it (0.8)")
    add("--lengths", nargs="+", type=int, default=[10, 20], help="nodes in a chain (10 20)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights and splits (0 1 2)")
    add("--epochs", type=int, help="the most passes over the data")
    add("--lr", type=float, help="Adam's learning rate")
    add("--kappa", type=float, help="bound of the contractions, below 1")
    add("--f-tol", type=float, help="of the forward solve")
    add("--device", default="cpu", help="where to train (cpu)")
    add("--out", type=Path, default=Path("runs/ignn"), help="folder for results (runs/ignn)")
    args = parser.parse_args(argv)
    if min(args.lengths) * 40 < 320:
        parser.error(
            f"--lengths {min(args.lengths)}: expected 8 or more, since the split needs 320 nodes"
        )
    names = ("lam", "epochs", "lr", "kappa", "f_tol")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    task = replace(TASKS[args.data], **given)
    try:  # fail now, not after the hour of the first method
        for method in args.grad:
            make_model(1, 1, method, task)
    except ValueError as error:
        parser.error(str(error))
    return args, task


def _spec(text: str) -> str:
    try:
        dpp.get_strategy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Run an experiment, save the results after every run, and print the table."""
    args, task = parse(argv)
    require("torch_geometric", "graph")
    tqdm = require("tqdm", "experiments").tqdm

    # On long chains, a solve that stops at f_max_iter is a normal result.
    warnings.simplefilter("ignore", dpp.ConvergenceWarning)
    runs: list[Run] = []
    with tqdm(unit=" epochs", mininterval=1, disable=None) as progress:

        def bar(method: str, part: dict[str, int]) -> Callable[[], Any]:
            where = " ".join(f"{key} {value}" for key, value in part.items())
            progress.set_description(f"{args.data} {where}: {method}")
            return progress.update

        for run in EXPERIMENTS[args.data](args, task, bar):
            runs.append(run)
            save(args.out, runs)
            progress.write(f"{run.method:28} {run.part} {run.accuracy:.3f} {run.epochs} epochs")
    print(table(runs))
    return runs


if __name__ == "__main__":
    main()
