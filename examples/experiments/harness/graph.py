"""Trains an IGNN that classifies graphs, or the nodes of graphs; loads or generates the graphs."""

from __future__ import annotations

import functools
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.output import write_whole
from deq_phantom_plugin.adapters.ignn import IGNN

from . import processes
from .reports import is_due, report_interval, reported
from .training import Task

FOLDS = 10
UNPACKED = Path("runs/experiments/data")
HELP = (
    "a folder in which PyTorch Geometric finds its data sets, or downloads them to, or one with "
    "archives of the text files of TU data sets, COX2.zip and PROTEINS.zip"
)


@dataclass(frozen=True)
class GraphSettings:
    """The settings of a training run of an IGNN.

    Attributes:
        dataset: "COX2" or "PROTEINS", whose graphs are classified in ten folds; "PPI", whose nodes
            are classified; or "generated graphs" and "generated nodes" of the same two kinds.
        hidden: the size of the states: one number, or one number per hidden layer.
        num_layers: the number of implicit layers.
        kappa: the bound of the contractions.
        dropout: the dropout before the last linear layer.
        grad: the spec of the gradient.
        lam: the damping, for a spec that does not give it.
        f_tol: the tolerance of the forward solve.
        epochs: the number of passes over the data.
        batch_size: the number of graphs per step.
        lr: Adam's learning rate.
        halve_after: the number of epochs after which the rate is halved; 0 for never.
        weight_decay: Adam's weight decay.
        eval_epochs: the number of epochs between evaluations.
        same_time_as: the name of another run. This run takes as many steps as fit into its time.
        report_grads: the specs of gradients whose cosines are measured, see `reported`; or none.
        report_every: the number of steps between these reports, a multiple of that between
            evaluations; 0 for one per evaluation.
    """

    dataset: str
    hidden: int | tuple[int, ...]
    num_layers: int
    kappa: float
    dropout: float
    grad: str
    lam: float
    f_tol: float
    epochs: int
    batch_size: int
    lr: float
    halve_after: int
    weight_decay: float
    eval_epochs: int = 1
    same_time_as: str = ""
    report_grads: tuple[str, ...] = ()
    report_every: int = 0


class GraphTask(Task):
    """Trains an IGNN; see `Task`.

    Args:
        settings: the settings.
        repeat: the seed of the weights and of dropout; for data sets with folds also the fold.
        data: the folder of the graphs, None if they are generated.
        device: the device on which to train.
    """

    def __init__(
        self, settings: GraphSettings, repeat: int, data: Path | None, device: torch.device
    ) -> None:
        self.settings, self.seed = settings, repeat
        s = settings
        self.grad = dpp.get_strategy(s.grad, {"lam": s.lam})
        splits, in_channels, classes, is_nodes = load_graphs(s, repeat, data)
        self.is_nodes = is_nodes
        torch.manual_seed(repeat)
        self.model = IGNN(
            in_channels,
            s.hidden,
            classes,
            s.num_layers,
            "node" if is_nodes else "graph",
            self.grad,
            kappa=s.kappa,
            dropout=s.dropout,
            f_tol=s.f_tol,
            **({"normalize": False} if is_nodes else {}),
        ).to(device)
        # All epochs have the same batches, as in the official code. So they are prepared once.
        self.splits = [
            [(b, self.model.prepare(b.x, b.edge_index)) for b in (b.to(device) for b in split)]
            for split in splits
        ]
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), s.lr, weight_decay=s.weight_decay
        )
        self.epoch_steps = len(self.splits[0])
        self.steps = s.epochs * self.epoch_steps
        self.eval_every = s.eval_epochs * self.epoch_steps
        self.report_every = report_interval(s.report_every, self.eval_every)

    def step(self, number: int) -> Tensor:
        """Take optimiser step `number` and return its loss, see `Task`."""
        s = self.settings
        epoch, place = divmod(number, self.epoch_steps)
        torch.manual_seed(processes.seed(self.seed, number))
        dpp.set_step(self.model, number)
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * (0.5 if s.halve_after and epoch >= s.halve_after else 1.0)
        self.model.train()
        self.optimizer.zero_grad()
        if self.is_nodes:  # each epoch has an order of its own, as in the official code
            place = int(processes.epoch_order(self.seed, epoch, self.epoch_steps)[place])
        batch, graph = self.splits[0][place]
        loss = self._loss(self._scores(batch, graph), batch)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def evaluate(self, step: int) -> dict[str, float]:
        """Return the accuracy on test graphs, or micro F1 on validation and test nodes."""
        s = self.settings
        self.model.eval()
        found = self._measured()
        if s.report_grads and is_due(step, self.report_every, self.steps):
            batch, graph = self.splits[-1][0]
            inputs = {"x": batch.x, "edge_index": graph}
            inputs |= {} if self.is_nodes else {"batch": batch.batch}
            found |= reported(
                self.model,
                self.grad,
                inputs,
                lambda scores: self._loss(scores, batch),
                s.report_grads,
            )
        return found

    @torch.no_grad()
    def _measured(self) -> dict[str, float]:
        names = ("validation_f1", "f1") if self.is_nodes else ("accuracy",)
        measure = _micro_f1 if self.is_nodes else _accuracy
        found = {}
        for name, split in zip(names, self.splits[1:], strict=True):
            outputs = torch.cat([self._scores(batch, graph) for batch, graph in split])
            found[name] = measure(outputs, torch.cat([batch.y for batch, _ in split]))
        return found

    def _scores(self, batch: Any, graph: Any) -> Tensor:
        scores: Tensor = self.model(batch.x, graph, batch=None if self.is_nodes else batch.batch)
        return scores

    def _loss(self, scores: Tensor, batch: Any) -> Tensor:
        if self.is_nodes:
            return F.binary_cross_entropy_with_logits(scores, batch.y)
        return F.cross_entropy(scores, batch.y)


def load_graphs(
    s: GraphSettings, fold: int, path: Path | None
) -> tuple[list[Sequence[Any]], int, int, bool]:
    """Load a data set.

    Args:
        s: the settings.
        fold: the fold of a data set of graphs.
        path: the folder of the data, None if they are generated.

    Returns:
        The splits as lists of batches, the number of features, the number of classes, and whether
        nodes are classified. The splits are training and test for graphs; for nodes they are
        training, validation and test.

    Raises:
        SystemExit: if a folder is missing, or is given for generated data.
        ValueError: if the name is unknown, or the fold is not one of ten.
    """
    require("torch_geometric", "graph")
    from torch_geometric.datasets import PPI
    from torch_geometric.loader import DataLoader

    if s.dataset.startswith("generated") and path is not None:
        raise SystemExit(
            f"--data {path} for {s.dataset}, which are not read from files; leave --data out, or "
            "add --set dataset=COX2 or another data set"
        )
    if s.dataset == "generated nodes":
        splits = [[_generated_nodes(seed) for seed in seeds] for seeds in ((0, 1, 2), (3,), (4,))]
        return splits, 8, 4, True
    known = ("COX2", "PROTEINS", "PPI", "generated graphs", "generated nodes")
    if s.dataset not in known:
        raise ValueError(f"dataset={s.dataset!r}; expected {', '.join(known)}")
    if path is None and s.dataset != "generated graphs":
        raise SystemExit(f"{s.dataset} needs --data DIR: {HELP}")
    if path is not None and not path.is_dir():
        raise SystemExit(f"--data {path} is not a folder; expected {HELP}")
    if s.dataset == "PPI":
        with _downloads_into(path / "PPI"):
            sets = [PPI(str(path / "PPI"), split=split) for split in ("train", "val", "test")]
        return sets, sets[0].num_features, sets[0].num_classes, True
    if not 0 <= fold < FOLDS:
        raise ValueError(f"fold {fold} of {s.dataset}; expected 0 to {FOLDS - 1}")
    dataset = _generated_graphs() if s.dataset == "generated graphs" else _tu(path, s.dataset)
    # Shuffled once, as in the official code, since the graphs of PROTEINS are sorted by class.
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    dataset = [dataset[i] for i in order.tolist()]
    labels = torch.cat([graph.y for graph in dataset])
    model_selection = require("sklearn.model_selection", "experiments")
    # With a fixed seed, so that all methods have the same folds.
    folds = model_selection.StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    indices = list(folds.split(labels, labels))[fold]
    batches = [list(DataLoader([dataset[i] for i in ids], s.batch_size)) for ids in indices]
    return batches, dataset[0].x.shape[1], int(labels.max()) + 1, False


@functools.cache
def _tu(path: Path, name: str) -> Any:
    """Return a TU data set: from PyG's folder, from a zip file, or downloaded by PyG."""
    from torch_geometric.datasets import TUDataset

    archive = path / f"{name}.zip"
    if (path / name).is_dir() or not archive.is_file():
        with _downloads_into(path / name):
            return TUDataset(str(path), name)
    target = UNPACKED / name / "raw"
    with zipfile.ZipFile(archive) as packed:
        for item in packed.infolist():
            file = Path(item.filename).name
            if file.startswith(name) and file.endswith(".txt") and not (target / file).is_file():
                write_whole(target / file, packed.read(item))
    return TUDataset(str(UNPACKED), name)


@contextmanager
def _downloads_into(folder: Path) -> Iterator[None]:
    """Turn a failed download by PyTorch Geometric into a clear error, and remove its folder."""
    was_there = folder.exists()
    try:
        yield
    except OSError as error:
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        raise SystemExit(
            f"{folder} can be neither read nor downloaded ({error}); --data is {HELP}"
        ) from None


def _generated_graphs(count: int = 120, nodes: int = 12) -> list[Any]:
    """Return rings (class 0) and rings with chords (class 1); features are degree and noise."""
    from torch_geometric.data import Data

    generator = torch.Generator().manual_seed(0)
    graphs = []
    for number in range(count):
        ring = torch.arange(nodes)
        edges = [torch.stack([ring, (ring + 1) % nodes])]
        if number % 2:
            edges.append(torch.stack([ring[: nodes // 2], ring[nodes // 2 :]]))
        edge_index = torch.cat(edges, dim=1)
        edge_index = torch.cat([edge_index, edge_index.flip(0)], dim=1)
        degree = torch.bincount(edge_index[0], minlength=nodes).float()[:, None]
        x = torch.cat([degree, torch.randn(nodes, 3, generator=generator)], dim=1)
        graphs.append(Data(x=x, edge_index=edge_index, y=torch.tensor([number % 2])))
    return graphs


def _generated_nodes(seed: int, nodes: int = 60, features: int = 8, labels: int = 4) -> Any:
    """Return a random graph; a node's labels are signs of sums over its neighbours' features."""
    from torch_geometric.data import Data

    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(nodes, (2, 3 * nodes), generator=generator)
    edge_index = torch.cat([edge_index, edge_index.flip(0)], dim=1)
    x = torch.randn(nodes, features, generator=generator)
    seen = torch.zeros_like(x).index_add_(0, edge_index[1], x[edge_index[0]])
    return Data(x=x, edge_index=edge_index, y=(seen[:, :labels] > 0).float())


def _accuracy(scores: Tensor, y: Tensor) -> float:
    return float((scores.argmax(dim=1) == y).float().mean())


def _micro_f1(scores: Tensor, y: Tensor) -> float:
    chosen, true = scores > 0, y > 0
    return float(2 * (chosen & true).sum() / (chosen.sum() + true.sum()).clamp(min=1))
