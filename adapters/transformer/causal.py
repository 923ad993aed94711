"""The language model: a `DEQTransformerModel`, an output layer, and the loss of the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from deq_phantom_plugin._plumbing.once import warn_once
from deq_phantom_plugin.contract.errors import AssumptionWarning

from .config import DEQTransformerConfig
from .inputs import OF_DOCUMENTS, read_tokens
from .jac_loss import share_of_step
from .label_smoothing import OutputTuple, smooth_outputs_of
from .model import DEQTransformerModel
from .pretrained import DEQTransformerPreTrainedModel
from .solve import EquilibriumInfo
from .versions import CACHE

__all__ = ["DEQCausalLMOutput", "DEQTransformerForCausalLM"]


@dataclass
class DEQCausalLMOutput(CausalLMOutputWithPast):
    """The output of a `DEQTransformerForCausalLM`.

    Attributes:
        loss: the cross-entropy, with `jac_loss` added.
        jac_loss: the weighted Jacobian regulariser in this loss; None outside training, and in
            steps without a regulariser.
        equilibrium_info: the residual and the evaluations of the forward solve.
    """

    jac_loss: Tensor | None = None
    equilibrium_info: EquilibriumInfo | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return all values that are not None, as a tuple that remembers this output.

        A `Trainer` with label smoothing needs this output, see `label_smoothing`.
        """
        return OutputTuple.of(self, super().to_tuple())


class DEQTransformerForCausalLM(DEQTransformerPreTrainedModel, GenerationMixin):
    """A language model whose only layer is solved to its equilibrium.

    Args:
        config: the architecture, its solver and its gradient.

    Raises:
        ImportError: if TorchDEQ is not installed.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DEQTransformerConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # Transformers would guess it from the name of a subclass
        self.model = DEQTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # Longer than 60 lines: half of them are its arguments and their docstring.
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> DEQCausalLMOutput:
        """Predict each next token.

        Args:
            input_ids: tokens, shape (B, L).
            attention_mask: see `DEQTransformerModel.forward`.
            position_ids: see `DEQTransformerModel.forward`.
            cache: see `DEQTransformerModel.forward`.
            inputs_embeds: see `DEQTransformerModel.forward`.
            labels: `input_ids` again, shape (B, L), with -100 where nothing is predicted. The loss
                leaves out predictions of padding, predictions from padding, and predictions from
                one document of the next in any case.
            use_cache: see `DEQTransformerModel.forward`.
            logits_to_keep: the number of last positions whose logits are returned, or the indices
                of the positions; 0 for all.
            num_items_in_batch: the number of labels in the whole step, if this batch is a part of a
                step. The first label of each row does not count, since nothing predicts it.
            output_hidden_states: see `DEQTransformerModel.forward`.
            output_attentions: see `DEQTransformerModel.forward`.
            **kwargs: see `DEQTransformerModel.forward`. In addition `shift_labels`, shape (B, L):
                the token that each token predicts, in place of `labels`.
        """
        # A Trainer demands of each batch all arguments that have "labels" in their names. So
        # `shift_labels` is not a named argument.
        targets = kwargs.pop("shift_labels", None)
        if targets is None and labels is not None:
            targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        counts = None if targets is None else targets.ne(-100).sum(-1)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            **{"jac_weights": counts, **kwargs, "return_dict": True},
        )
        states = output.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            states = states[:, logits_to_keep]
        elif logits_to_keep:
            states = states[:, -logits_to_keep:]
        logits = self.lm_head(states)
        loss, jac_loss = None, output.jac_loss
        if targets is not None:
            named = {name: kwargs.get(name) for name in OF_DOCUMENTS}
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=_predictable(targets, attention_mask, position_ids, named),
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
            if jac_loss is not None:
                jac_loss = share_of_step(jac_loss, targets, num_items_in_batch)
                loss = loss + jac_loss
        return DEQCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: output.get(CACHE)},
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            jac_loss=jac_loss,
            equilibrium_info=output.equilibrium_info,
        )

    def spectral_radius(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `DEQTransformerModel.spectral_radius`."""
        radius: Tensor = self.model.spectral_radius(*args, **kwargs)
        return radius


def _smoothed(output: DEQCausalLMOutput, targets: Tensor, items: Any) -> Tensor | None:
    """Return the regulariser that is added to a loss with smoothed labels, or None."""
    jac_loss = output.jac_loss
    if jac_loss is None:
        return None
    counts = targets.ne(-100).sum(-1)
    if items is not None and bool((counts != counts[0]).any()):
        warn_once(
            "regulariser beside smoothed labels",
            "with label smoothing the model does not see the labels. So the Jacobian regulariser "
            "weighs the rows of a batch by their tokens, and the batches of a step by their "
            "labels. With rows of several lengths and gradient accumulation, it differs a little "
            "from the regulariser of one large batch. Rows of equal length avoid that. This "
            "warning is given once.",
            AssumptionWarning,
        )
    return share_of_step(jac_loss, targets, items)


def _predictable(
    targets: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    named: dict[str, Any],
) -> Tensor:
    """Set targets to -100 that are padding, predicted from padding, or of another document."""
    batch, length = targets.shape
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, -length:]
    tokens = read_tokens((batch, length), targets.device, 0, attention_mask, position_ids, **named)
    left_out = torch.zeros_like(targets, dtype=torch.bool)
    if tokens.real is not None:
        left_out |= ~tokens.real
        left_out[:, :-1] |= ~tokens.real[:, 1:]
    if tokens.documents is not None:
        left_out[:, :-1] |= tokens.documents[:, 1:] != tokens.documents[:, :-1]
    return targets.masked_fill(left_out, -100)


AutoModelForCausalLM.register(DEQTransformerConfig, DEQTransformerForCausalLM, exist_ok=True)
smooth_outputs_of(DEQCausalLMOutput, _smoothed)
