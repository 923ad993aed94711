"""Trains a tiny recursive model (TRM) that solves Sudoku puzzles.

A puzzle is given to the model in several calls, and each call is one optimiser step. The states go
on from call to call, detached. That is the deep supervision of the authors' code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.extras import require

from . import processes
from .memory import PeakMemory
from .reports import is_due, report_interval, reported
from .sudoku import load_puzzles
from .training import Task


@dataclass(frozen=True)
class RecursiveSettings:
    """The settings of a training run of a TRM.

    Attributes:
        box: the side of a box: 2 for 4x4 grids, all of which are known, 3 for random 9x9 grids.
        train_grids: the number of grids to train with.
        test_grids: the number of grids to test with. No grid is in both sets.
        puzzles: the number of puzzles per grid, each with one solution.
        givens: the number of digits that a puzzle keeps. It keeps more if it would have several
            solutions otherwise.
        augment: whether symmetries of Sudoku turn training puzzles into others.
        width: the size of the states.
        layers: the number of layers of the network, an MLP-mixer.
        expansion: the hidden sizes of its MLPs, over tokens and over channels, as multiples of
            their input sizes.
        registers: the number of tokens besides the cells.
        blocks: the number of refinement blocks per call, which are the evaluations of the loop;
            H_cycles in the paper's code.
        refinements: the number of refinements of the latents per block; L_cycles in the paper's
            code.
        grad: the spec of the gradient; None for the model's own, which has a graph of one block.
        supervisions: the largest number of calls per puzzle, with one optimiser step per call.
            Evaluations make all of these calls.
        halt: whether a puzzle that the model takes for solved is replaced by another one.
        explore: the share of the puzzles that stay for a random number of calls in any case.
        halt_weight: the weight of the halting loss.
        steps: the number of optimiser steps.
        batch_size: the number of puzzles per step.
        lr: the learning rate after the warm-up.
        warmup: the number of steps in which the learning rate rises linearly.
        betas: the betas of AdamAtan2.
        weight_decay: the weight decay of AdamAtan2.
        ema: the share of the averaged weights that is kept in a step. Evaluations use these
            weights.
        eval_every: the number of steps between evaluations.
        eval_batch: the number of puzzles per batch of an evaluation.
        radius_puzzles: the number of test puzzles whose residuals and spectral radii are measured.
        report_grads: the specs of gradients whose cosines are measured, see `reported`; or none.
        report_every: the number of steps between these reports, a multiple of that between
            evaluations; 0 for one per evaluation.
    """

    box: int
    train_grids: int
    test_grids: int
    puzzles: int
    givens: int
    augment: bool
    width: int
    layers: int
    expansion: int
    registers: int
    blocks: int
    refinements: int
    grad: str | None
    supervisions: int
    halt: bool
    explore: float
    halt_weight: float
    steps: int
    batch_size: int
    lr: float
    warmup: int
    betas: tuple[float, ...]
    weight_decay: float
    ema: float
    eval_every: int
    eval_batch: int
    radius_puzzles: int
    report_grads: tuple[str, ...] = ()
    report_every: int = 0


class Learner(nn.Module):
    """Holds all that a run resumes from: a TRM, the average of its weights, and its batch.

    Args:
        model: the TRM.
        ema: see `RecursiveSettings`.
        state: the shape of its states, (batch, tokens, width).
        cells: the number of cells of a puzzle.
    """

    def __init__(self, model: nn.Module, ema: float, state: tuple[int, int, int], cells: int):
        super().__init__()
        self.model = model
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema))
        for name, value in {
            "seq": torch.zeros(state[0], cells, dtype=torch.long),
            "labels": torch.zeros(state[0], cells, dtype=torch.long),
            "outputs": torch.zeros(state),
            "latents": torch.zeros(state),
            "calls": torch.zeros(state[0], dtype=torch.long),
            "halted": torch.ones(state[0], dtype=torch.bool),
        }.items():
            self.register_buffer(name, value)


class _Call(nn.Module):
    """The loss of a call of a TRM on given labels, as a function of puzzles and states."""

    def __init__(self, model: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.model, self.labels = model, labels

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs, labels=self.labels)[0]


class RecursiveTask(Task):
    """Trains a TRM with deep supervision, as its authors' code does; see `Task`.

    A step is one call of the model on a batch. The puzzles of a batch may have had different
    numbers of calls. Puzzles that have halted are replaced. The states of the others go on,
    detached.

    Args:
        settings: the settings.
        seed: the seed of the puzzles, the weights, the order of the puzzles, and halting.
        data: None, since the puzzles are generated.
        device: the device on which to train.
    """

    def __init__(
        self, settings: RecursiveSettings, seed: int, data: Path | None, device: torch.device
    ) -> None:
        s = self.settings = settings
        self.seed, self.device = seed, device
        if data is not None:
            raise SystemExit(f"--data {data}, but the puzzles are generated; leave --data out")
        if s.augment and s.box == 2:
            raise ValueError(
                "augment=True makes test grids of other 4x4 ones, so the test would not be fair; "
                "expected False with box=2"
            )
        self.train_set, self.test_set = load_puzzles(
            s.box, s.train_grids, s.test_grids, s.puzzles, s.givens, seed
        )
        trm = require("tiny_recursive_model", "trm")
        dpp.enable("tiny_recursive_model")
        torch.manual_seed(seed)
        cells = s.box**4
        tokens = cells + s.registers
        model = trm.TinyRecursiveModel(
            dim=s.width,
            num_tokens=s.box**2 + 1,
            network=trm.MLPMixer1D(
                dim=s.width,
                depth=s.layers,
                seq_len=tokens,
                # The package counts both hidden sizes in widths, but the first MLP acts on tokens.
                expansion_factor=s.expansion * tokens / s.width,
                expansion_factor_token=s.expansion,
            ),
            num_refinement_blocks=s.blocks,
            num_latent_refinements=s.refinements,
            halt_loss_weight=s.halt_weight,
            num_register_tokens=s.registers,
            grad=s.grad,
        )
        self.model = Learner(model, s.ema, (s.batch_size, tokens, s.width), cells).to(device)
        # The paper's optimiser, in the implementation on which the package of the model depends.
        self.optimizer = require("adam_atan2_pytorch", "trm").AdamAtan2(
            self.model.model.parameters(),
            lr=s.lr,
            betas=s.betas,
            weight_decay=s.weight_decay,
        )
        self.steps, self.eval_every = s.steps, s.eval_every
        self.report_every = report_interval(s.report_every, self.eval_every)

    def step(self, number: int) -> Tensor:
        """Take optimiser step `number` and return its loss, see `Task`."""
        s, learner = self.settings, self.model
        draw = torch.Generator().manual_seed(processes.seed(self.seed, number))
        torch.manual_seed(processes.seed(self.seed, number))
        dpp.set_step(learner.model, number)
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, (number + 1) / max(1, s.warmup))
        self._replace_halted(draw)
        self.optimizer.zero_grad()
        loss, outputs, latents, halt = self._call(learner.model)
        loss.backward()
        self.optimizer.step()
        learner.averaged.update_parameters(learner.model)
        learner.outputs.copy_(outputs)
        learner.latents.copy_(latents)
        learner.calls += 1
        learner.halted.copy_(self._halts(halt, draw))
        return loss.detach()

    @torch.no_grad()
    def _replace_halted(self, draw: torch.Generator) -> None:
        """Replace the puzzles that have halted by new ones, which have had no call yet."""
        s, learner = self.settings, self.model
        drawn = self.train_set.draw(s.batch_size, draw, s.augment)
        for old, new in zip((learner.seq, learner.labels), drawn, strict=True):
            old.copy_(torch.where(learner.halted[:, None], new.to(self.device), old))
        learner.calls.masked_fill_(learner.halted, 0)

    def _call(self, model: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Call the model once on the batch.

        Returns:
            The mean loss; the next outputs and latents, each of shape (batch, tokens, width); and
            the probability of halting of each puzzle, shape (batch,).
        """
        outputs, latents = self._states(model)
        loss, _, outputs, latents, _, halt = model.train()(
            self.model.seq, outputs, latents, labels=self.model.labels
        )
        return loss / len(halt), outputs, latents, halt.detach()

    def _states(self, model: Any) -> list[Tensor]:
        """Return the states; those of new puzzles are the model's initial vectors, with a graph."""
        learner = self.model
        new = (learner.calls == 0)[:, None, None]
        carried = zip(model.get_initial(), (learner.outputs, learner.latents), strict=True)
        return [torch.where(new, initial, state) for initial, state in carried]

    def _halts(self, halt: Tensor, draw: torch.Generator) -> Tensor:
        """Return which puzzles halt: those at their last call, and those taken for solved."""
        s, calls = self.settings, self.model.calls
        last = calls >= s.supervisions
        if not s.halt or s.supervisions < 2:
            return last
        explores = torch.rand(len(calls), generator=draw) < s.explore
        least = torch.randint(2, s.supervisions + 1, (len(calls),), generator=draw)
        return last | ((halt > 0.5) & (calls >= (explores * least).to(self.device)))

    def evaluate(self, step: int) -> dict[str, float]:
        """Return what is measured after so many steps.

        With the averaged weights, on test puzzles:

        - `solved`: the share of the puzzles without a mistake after all calls.
        - `cells`: the share of the blank cells that are filled in correctly.
        - `residual`: the residual of the loop's map, one refinement block, after the last call.
        - `residual_first`: the same after the first call.
        - `rho`: the mean spectral radius of this map after the last call.

        With the weights in training, on the batch in training:

        - `memory`: the MiB that a call and its backward pass need at most, beyond what is there.
        - `cosine`: the cosine between the gradient and that of backpropagation through the loop.
        - `length`: the ratio of the norms of these two gradients.

        With these weights, on test puzzles at their last call, if there are `report_grads`: the
        results of `reported`. Their `cosine`, to the exact gradient of the equilibrium, is
        `report_cosine` here.
        """
        s = self.settings
        if step == 0:  # no training step has told it yet
            dpp.set_step(self.model.model, 0)
        found = self._accuracy() | self._at_the_ends()
        self.optimizer.zero_grad()
        with PeakMemory() as memory:
            self._call(self.model.model)[0].backward()
        found["memory"] = memory.peak / 2**20
        if step > 0:  # before the first step there is no batch
            found |= self._against_backpropagation()
        if s.report_grads and is_due(step, self.report_every, self.steps):
            found |= self._report()
        self.optimizer.zero_grad()
        return found

    def _report(self) -> dict[str, float]:
        """Return what a report on test puzzles says, at their last call."""
        s, model, test = self.settings, self.model.model.train(), self.test_set
        seq, labels = (part[: s.radius_puzzles].to(self.device) for part in (test.seq, test.labels))
        shape = (len(seq), *self.model.outputs.shape[1:])
        with torch.no_grad():
            state = tuple(initial.expand(shape) for initial in model.get_initial())
            for _ in range(s.supervisions - 1):
                _, _, *state, _, _ = model(seq, *state, labels=labels)
        inputs = (seq, *state)
        # The model's own training is `tbptt(k=1)`, which a report measures only if it is asked for.
        own = s.grad or "tbptt(k=1)"
        grads = s.report_grads if s.grad else tuple(dict.fromkeys((*s.report_grads, own)))
        found = reported(_Call(model, labels), own, inputs, lambda loss: loss / len(seq), grads)
        return {("report_cosine" if key == "cosine" else key): v for key, v in found.items()}

    def _against_backpropagation(self) -> dict[str, float]:
        """Compare the present gradient with that of backpropagation through the whole loop."""
        whole = copy.deepcopy(self.model.model)
        dpp.set_grad(whole, "tbptt(k='all')")
        whole.zero_grad()
        self._call(whole)[0].backward()
        ours, theirs = (
            torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in m])
            for m in (list(self.model.model.parameters()), list(whole.parameters()))
        )
        return {
            "cosine": float(torch.cosine_similarity(ours, theirs, dim=0)),
            "length": float(ours.norm() / theirs.norm()),
        }

    @torch.no_grad()
    def _accuracy(self) -> dict[str, float]:
        model, sums = self._averaged(), torch.zeros(3, dtype=torch.float64)
        for seq, labels in self._test_batches():
            state = model.get_initial()
            for _ in range(self.settings.supervisions):
                *state, pred, _ = model(seq, *state)
            right, blank = pred.argmax(dim=-1) == labels, seq == 0
            sums += torch.stack([right.all(dim=1).sum(), (right & blank).sum(), blank.sum()]).cpu()
        solved, cells, blanks = sums.tolist()
        return {"solved": solved / len(self.test_set.seq), "cells": cells / blanks}

    def _at_the_ends(self) -> dict[str, float]:
        model, s = self._averaged(), self.settings
        seq = self.test_set.seq[: s.radius_puzzles].to(self.device)
        with torch.no_grad():
            inputs, _ = model.embed_inputs_with_registers(seq)

            def block(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                refined: tuple[Tensor, Tensor] = model.refine_latent_then_output_once(
                    inputs, *state
                )
                return refined

            state, residuals = model.get_initial(), []
            for _ in range(s.supervisions):
                state = model.deep_refinement(inputs, *state)
                residuals.append(_residual(state, block(state)))
        radii = dpp.spectral_radius(block, tuple(state), batch_dim=0, tol=0.02, max_iter=60)
        return {
            "residual_first": residuals[0],
            "residual": residuals[-1],
            "rho": float(radii.mean()),
        }

    def _averaged(self) -> Any:
        return self.model.averaged.module.eval()

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, test = self.settings.eval_batch, self.test_set
        for seq, labels in zip(test.seq.split(size), test.labels.split(size), strict=True):
            yield seq.to(self.device), labels.to(self.device)


def _residual(state: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor]) -> float:
    """Return the mean of ||F(h) - h|| / ||F(h)|| over the puzzles.

    Args:
        state: h, two tensors of shape (count, tokens, width).
        image: F(h), of the same shapes.
    """
    before, after = (torch.cat(pair, dim=-1).flatten(1) for pair in (state, image))
    return float(((after - before).norm(dim=1) / after.norm(dim=1)).mean())
