"""Trains a deep equilibrium transformer that predicts the next word, or the next character."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adapters.transformer import DEQTransformerConfig, DEQTransformerForCausalLM

from . import processes
from .reports import is_due, report_interval, reported
from .schedule import after_pretraining, cosine
from .text import columns, load_text, segment, segments
from .training import Diverged, Task

RADIUS_TEXTS = 4  # test texts whose spectral radius is measured


@dataclass(frozen=True)
class LanguageSettings:
    """The settings of a training run of a transformer.

    Attributes:
        train_file: the name of the training text in the data folder.
        test_file: the name of the test text; if it is empty, the last tenth of the training text.
        characters: whether characters are predicted, and not words.
        test_segments: the number of pieces of the test text that are evaluated; 0 for all.
        hidden: the size of a state.
        heads: the number of attention heads.
        intermediate: the inner width of the feed-forward part.
        pre_layer_norm: False for DEQ (PostLN), True for DEQ (PreLN).
        dropout: the dropout of features.
        attention_dropout: the dropout of the positions to which a head attends.
        grad: the spec of the gradient.
        pretrain_steps: the number of first steps that backpropagate through a few evaluations of f.
        pretrain_layers: the number of these evaluations.
        f_solver: the forward solver.
        f_max_iter: the largest number of iterations of the forward solve.
        f_tol: the relative residual at which the forward solve stops.
        jac_weight: the weight of the Jacobian regulariser; 0 for none.
        jac_freq: the share of the steps that have the regulariser.
        jac_increment: the number by which the weight grows every `jac_interval` steps.
        jac_interval: see `jac_increment`.
        steps: the number of optimiser steps.
        batch_size: the number of texts per step, in all processes together.
        length: the number of tokens to predict per text.
        lr: Adam's largest learning rate.
        warmup: the number of steps in which the learning rate rises linearly.
        anneal: whether the learning rate then falls to zero along half a cosine.
        clip: the norm to which gradients are clipped.
        eval_every: the number of steps between evaluations.
        eval_batch: the number of texts per batch of an evaluation.
        same_time_as: the name of another run. This run takes as many steps as fit into its time.
        report_grads: the specs of gradients whose cosines are measured, see `reported`; or none.
        report_every: the number of steps between these reports, a multiple of that between
            evaluations; 0 for one per evaluation.
    """

    train_file: str
    test_file: str
    test_segments: int
    hidden: int
    heads: int
    intermediate: int
    dropout: float
    attention_dropout: float
    grad: str
    pretrain_steps: int
    pretrain_layers: int
    f_solver: str
    f_max_iter: int
    f_tol: float
    steps: int
    batch_size: int
    length: int
    lr: float
    warmup: int
    clip: float
    eval_every: int
    pre_layer_norm: bool = False
    jac_weight: float = 0.0
    jac_freq: float = 0.4
    jac_increment: float = 0.0
    jac_interval: int | None = None
    eval_batch: int = 16
    same_time_as: str = ""
    report_grads: tuple[str, ...] = ()
    report_every: int = 0
    characters: bool = False
    anneal: bool = True


class LanguageTask(Task):
    """Trains a deep equilibrium transformer; see `Task`.

    Args:
        settings: the settings.
        seed: the seed of the weights and of dropout. The texts come in their own order.
        data: the folder of texts; None for Python's own language reference.
        device: the device on which to train.
    """

    model: DEQTransformerForCausalLM

    def __init__(
        self, settings: LanguageSettings, seed: int, data: Path | None, device: torch.device
    ) -> None:
        self.settings, self.seed, self.device = settings, seed, device
        s = settings
        train, test, n_words = load_text(data, s.train_file, s.test_file, s.characters)
        self.train_texts, self.test_texts = (
            columns(train, s.batch_size),
            columns(test, s.eval_batch),
        )
        segments(self.train_texts, s.length)
        processes.share(self.train_texts)  # fails here, and not in the first step
        segments(self.test_texts, s.length)
        self.steps, self.eval_every = s.steps, s.eval_every
        self.report_every = report_interval(s.report_every, self.eval_every)
        torch.manual_seed(seed)
        config = DEQTransformerConfig(
            vocab_size=n_words,
            hidden_size=s.hidden,
            intermediate_size=s.intermediate,
            num_attention_heads=s.heads,
            max_position_embeddings=s.length + 1,
            pre_layer_norm=s.pre_layer_norm,
            dropout=s.dropout,
            attention_dropout=s.attention_dropout,
            grad=after_pretraining(s.grad, s.pretrain_steps, s.pretrain_layers, s.steps),
            f_solver=s.f_solver,
            f_max_iter=s.f_max_iter,
            f_tol=s.f_tol,
            jac_reg_weight=s.jac_weight,
            jac_reg_freq=s.jac_freq,
            jac_reg_increment=s.jac_increment,
            jac_reg_interval=s.jac_interval,
        )
        self.model = DEQTransformerForCausalLM(config).to(device)
        self.parallel = processes.parallel(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), s.lr)

    def step(self, number: int) -> Tensor:
        """Take optimiser step `number`; the loss is the cross-entropy without the regulariser."""
        s = self.settings
        texts = processes.share(self.train_texts)
        ids = segment(texts, number, s.length).to(self.device)
        torch.manual_seed(processes.seed(self.seed, number))
        dpp.set_step(self.model, number)
        for group in self.optimizer.param_groups:
            steps = self.steps if s.anneal else sys.maxsize
            group["lr"] = cosine(number, steps, s.lr, warmup=s.warmup)
        self.model.train()
        self.optimizer.zero_grad()
        output = self.parallel(ids, labels=ids)
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        if not norm.isfinite():  # the gradients are averaged, so all processes see the same norm
            raise Diverged(f"the norm of the gradients in step {number} is {float(norm)}")
        self.optimizer.step()
        loss: Tensor = output.loss.detach()
        return loss if output.jac_loss is None else loss - output.jac_loss.detach()

    def evaluate(self, step: int) -> dict[str, float]:
        """Return perplexity, residual, and the mean spectral radius of df/dh, on test texts."""
        s = self.settings
        self.model.eval()
        count = segments(self.test_texts, s.length)
        count = min(count, s.test_segments or count)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for number in range(processes.rank(), count, processes.count()):
                ids = segment(self.test_texts, number, s.length).to(self.device)
                output = self.model(ids, labels=ids, use_cache=False)
                sums[0] += output.loss
                sums[1] += output.equilibrium_info.residual.mean()
        loss, residual = (processes.total(sums) / count).tolist()
        ids = segment(self.test_texts[:RADIUS_TEXTS], 0, s.length).to(self.device)
        radii = self.model.spectral_radius(ids, tol=0.02, max_iter=60)
        found = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "residual": residual,
            "rho": float(radii.mean()),
        }
        if s.report_grads and is_due(step, self.report_every, self.steps):
            inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
            found |= reported(self.model, s.grad, inputs, lambda out: out.loss, s.report_grads)
        return found
