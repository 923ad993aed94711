"""Deep equilibrium language models as Transformers models, the gradient chosen by name.

Bai, Kolter & Koltun, "Deep Equilibrium Models", NeurIPS 2019, arXiv:1909.01377. The states of all
tokens are the equilibrium of one weight-tied decoder block that sees the embeddings at every step.

    config = DEQTransformerConfig(vocab_size=256, hidden_size=64, num_attention_heads=4, grad="upg")
    model = DEQTransformerForCausalLM(config)
    model(input_ids, labels=input_ids).loss.backward()
    model.set_grad("npg(k=9)")
    model.generate(input_ids, max_new_tokens=20)

Importing this module registers both classes, so that `AutoModelForCausalLM.from_pretrained` loads
what `save_pretrained` saved. Give `SetStep()` to a `Trainer` if anything depends on the step.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin.compilation import never_compiled
from deq_phantom_plugin.draws import SameDraws
from deq_phantom_plugin.extras import require
from deq_phantom_plugin.output import write_whole

from .deq_layer import CACHE, EquilibriumLayer, deq_from_layer
from .equilibrium import EquilibriumInfo, check_settings, make_equilibrium, solve
from .transformer_block import DEQTransformerBlock, ScaledLinear, Surroundings, dropout_mask

require("transformers", "text")
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    initialization,
)
from transformers.activations import ACT2FN  # noqa: E402
from transformers.masking_utils import create_causal_mask  # noqa: E402
from transformers.modeling_outputs import (  # noqa: E402
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: E402
from transformers.utils.generic import can_return_tuple  # noqa: E402

__all__ = [
    "DEQCausalLMOutput",
    "DEQModelOutput",
    "DEQTransformerConfig",
    "DEQTransformerForCausalLM",
    "DEQTransformerModel",
    "EquilibriumInfo",
    "EquilibriumLayer",
    "SetStep",
    "deq_from_layer",
]


class DEQTransformerConfig(PreTrainedConfig):
    """What a `DEQTransformerForCausalLM` is made of.

    Attributes:
        vocab_size: tokens.
        hidden_size: of each token's state; a multiple of twice `num_attention_heads`.
        intermediate_size: inner width of the feed-forward part.
        num_attention_heads: heads.
        max_position_embeddings: the longest sequence. Positions are rotary, so relative.
        hidden_act: activation of the feed-forward part; the official code has relu.
        pre_layer_norm: False for the source's DEQ (PostLN), True for DEQ (PreLN).
        dropout: probability of dropping a feature of the embeddings, of the two parts of the block
            and of the output, the same ones at all positions.
        attention_dropout: probability of dropping a position from what a head attends to.
        initializer_range: standard deviation of the embeddings. The block's weights are drawn so
            that it is a contraction to begin with, whatever its size.
        layer_norm_eps: of the normalisations.
        tie_word_embeddings: whether the output layer has the embeddings for its weights.
        rope_parameters: see Transformers' Llama.
        use_cache: whether to return the keys and values of the equilibrium, outside training.
        grad: the gradient of the equilibrium, a spec of `dpp.get_strategy` as a string.
        f_solver: TorchDEQ's name of the forward solver.
        f_max_iter: the most iterations of the forward solve.
        f_tol: its relative residual of each sample.
        jac_reg_weight: of ||J||_F^2 / numel in the loss, see `dpp.JacobianRegularization`.
        jac_reg_freq: the probability that a training step has it.
        jac_reg_increment: what the weight grows by every `jac_reg_interval` steps.
        jac_reg_interval: in training steps, which `dpp.set_step` or `SetStep` tell.

    Raises:
        ValueError: if a value cannot be, or these do not fit together; says what is accepted.
    """

    model_type = "deq_transformer"
    keys_to_ignore_at_inference = [CACHE, "equilibrium_info", "jac_loss"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    max_position_embeddings: int = 1024
    hidden_act: str = "relu"
    pre_layer_norm: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    grad: str = "upg"
    f_solver: str = "anderson"
    f_max_iter: int = 30
    f_tol: float = 1e-3
    jac_reg_weight: float = 0.0
    jac_reg_freq: float = 1.0
    jac_reg_increment: float = 0.0
    jac_reg_interval: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_hidden_layers = 1  # of the cache
        self.num_key_value_heads = self.num_attention_heads
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}; expected a whole number of at least 1")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} with num_attention_heads="
                f"{self.num_attention_heads}; expected a multiple of twice the heads"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}; expected a probability in [0, 1)"
                )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r}; expected one of {', '.join(ACT2FN)}")
        if not isinstance(self.grad, str):
            raise ValueError(f"grad={self.grad!r}; expected a spec as a string, such as 'upg(k=5)'")
        check_settings(self.grad, self.f_solver, self.f_max_iter, self.f_tol)
        self.jacobian_regularization()

    def jacobian_regularization(self) -> dpp.JacobianRegularization:
        """Return the schedule that the `jac_reg_` fields describe."""
        names = ("weight", "freq", "increment", "interval")
        try:
            return dpp.JacobianRegularization(*(getattr(self, f"jac_reg_{name}") for name in names))
        except ValueError as error:
            raise ValueError(f"jac_reg_{error}") from None


@dataclass
class DEQModelOutput(BaseModelOutputWithPast):
    """What a `DEQTransformerModel` returns.

    Attributes:
        jac_loss: the weighted Jacobian regulariser of this step, a differentiable scalar; None
            outside training, and in steps that have none.
        equilibrium_info: residual and evaluations of the forward solve.
    """

    jac_loss: Tensor | None = None
    equilibrium_info: EquilibriumInfo | None = None


@dataclass
class DEQCausalLMOutput(CausalLMOutputWithPast):
    """What a `DEQTransformerForCausalLM` returns.

    Attributes:
        loss: cross-entropy, with `jac_loss` added.
        jac_loss: the weighted Jacobian regulariser in this loss; None outside training, and in
            steps that have none.
        equilibrium_info: residual and evaluations of the forward solve.
    """

    jac_loss: Tensor | None = None
    equilibrium_info: EquilibriumInfo | None = None


class DEQTransformerPreTrainedModel(PreTrainedModel):
    """What both models share."""

    config: DEQTransformerConfig
    config_class = DEQTransformerConfig
    base_model_prefix = "model"
    _no_split_modules = ["DEQTransformerBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    # The step of training is no weight; `load_state_dict` takes it, and so does a Trainer.
    _keys_to_ignore_on_load_unexpected = [r"grad_memory"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"grad_memory"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ScaledLinear):
            # Unlike PyTorch's, this leaves weights alone that were loaded.
            initialization.normal_(module.weight, std=module.gain * module.in_features**-0.5)

    def set_grad(self, spec: Any) -> None:
        """Switch the gradient of the equilibrium, and let the config say so.

        Args:
            spec: see `dpp.get_strategy`. `dpp.set_grad` also takes a function, which a config could
                not save.

        Raises:
            ValueError: if the spec is invalid; then nothing is switched.
        """
        strategy = dpp.get_strategy(spec)
        text = repr(strategy)
        try:
            lost = dpp.get_strategy(text) != strategy
        except ValueError:
            lost = True
        if lost:
            raise ValueError(f"{spec!r} cannot be written in a config; dpp.set_grad takes it")
        dpp.set_grad(self, strategy)
        self.config.grad = text

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings."""
        embeddings: nn.Module = getattr(self, self.base_model_prefix, self).embed_tokens
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embeddings."""
        getattr(self, self.base_model_prefix, self).embed_tokens = value


class DEQTransformerModel(DEQTransformerPreTrainedModel):
    """Embeddings, the equilibrium block and its solver, without an output layer.

    In training mode the states carry the gradient of `config.grad`; in evaluation mode, as of any
    equilibrium of this package, none.
    """

    def __init__(self, config: DEQTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.inject = ScaledLinear(config.hidden_size, 3 * config.hidden_size, gain=2.0)
        self.rotary = LlamaRotaryEmbedding(config)
        self.block = DEQTransformerBlock(config)
        self.deq = make_equilibrium(config.grad, config.f_solver, config.f_max_iter, config.f_tol)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> DEQModelOutput:
        """Solve for the states of all tokens.

        A token's state depends on those before it alone, which therefore stay at equilibrium when
        tokens are added: with the keys and values of a cache only the new tokens are solved for.
        Like the source's memory, such a cache carries no gradient.

        Args:
            input_ids: tokens, shape (B, L).
            attention_mask: 1 for tokens and 0 for padding, shape (B, P + L), P tokens in the cache.
            position_ids: shape (B, L); counted from the cache's length if None.
            cache: a `DynamicCache` from an earlier call.
            inputs_embeds: in place of `input_ids`, shape (B, L, hidden_size).
            use_cache: whether to return a cache; `config.use_cache` if None, but not in training.
            output_hidden_states: whether to return embeddings and states, as `hidden_states`.
            past_key_values: the name of `cache` before Transformers 5.24.
            **kwargs: ignored.

        Raises:
            ValueError: if there are no tokens, or more than `config.max_position_embeddings`; if
                the cache is of another kind; if the forward solve has diverged (in training).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None:
            cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if not isinstance(cache, DynamicCache | None):
            raise ValueError(f"the cache is a {type(cache).__name__}; expected a DynamicCache")
        real = self._real(inputs_embeds, attention_mask, cache)
        around = self._surroundings(inputs_embeds, attention_mask, position_ids, cache)

        def func(state: Tensor) -> Tensor:
            image = self.block(state.to(inputs_embeds.dtype), around).to(state.dtype)
            # Padding rests at zero, where it adds nothing to any residual.
            return image if real is None else image.where(real, 0)

        # Of dropout inside the block, such as an adapter's: its own masks are in `around`.
        func = SameDraws(func)
        # Solvers want more than half precision.
        dtype = torch.promote_types(inputs_embeds.dtype, torch.float32)
        state, info = solve(self.deq, func, torch.zeros_like(inputs_embeds, dtype=dtype))
        jac_loss = self._jac_loss(func, state, real)
        if use_cache and cache is not None:
            _, key, value = self.block.heads(state.detach().to(inputs_embeds.dtype), around)
            cache.update(key.detach(), value.detach(), 0)
        states = self._dropped(state.to(inputs_embeds.dtype))
        return DEQModelOutput(
            last_hidden_state=states,
            **{CACHE: cache if use_cache else None},
            hidden_states=(inputs_embeds, states) if output_hidden_states else None,
            jac_loss=jac_loss,
            equilibrium_info=info,
        )

    @torch.no_grad()
    def spectral_radius(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        lam: float | None = None,
        **options: Any,
    ) -> Tensor:
        """Estimate rho(dF/dh) of each sample at its equilibrium, shape (B,).

        Args:
            input_ids: tokens, shape (B, L).
            attention_mask: shape (B, L).
            lam: a damping factor, for the radius of the damped map instead.
            **options: of `dpp.spectral_radius`.
        """
        solves: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
        handle = self.deq.register_forward_hook(
            lambda _, args, out: solves.append((args[0], out[0][-1]))
        )
        try:
            self(input_ids, attention_mask, use_cache=False)
        finally:
            handle.remove()
        return dpp.spectral_radius(*solves[0], lam, **options)

    def _real(self, x: Tensor, attention_mask: Tensor | None, past: Cache | None) -> Tensor | None:
        """Return where tokens are, shape (B, L, 1), None for everywhere.

        Raises:
            ValueError: if there are no tokens or too many.
        """
        length, limit = x.shape[1], self.config.max_position_embeddings
        before = 0 if past is None else past.get_seq_length()
        if x.shape[0] < 1 or length < 1:
            raise ValueError(
                f"input of shape {tuple(x.shape[:2])}; expected at least one sequence of at least "
                "one token"
            )
        if before + length > limit:
            raise ValueError(
                f"a sequence of {before + length} tokens; expected at most {limit}, "
                "config.max_position_embeddings"
            )
        if attention_mask is None or attention_mask.dim() != 2:
            return None
        return attention_mask[:, -length:, None].bool()

    def _surroundings(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> Surroundings:
        before = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            length = embeddings.shape[1]
            position_ids = before + torch.arange(length, device=embeddings.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        past = None
        if before:
            layer: Any = cache.layers[0]  # type: ignore[union-attr]
            past = (layer.keys, layer.values)
        return Surroundings(
            injection=self.inject(self._dropped(self.block.norm(embeddings))),
            rotation=self.rotary(embeddings, position_ids),
            attention_mask=mask,
            past=past,
            keep=self.block.keep(embeddings),
        )

    def _dropped(self, x: Tensor) -> Tensor:
        """Drop features of shape (B, L, hidden_size), the same ones at all positions."""
        p = self.config.dropout
        return x * dropout_mask(x, (x.shape[0], 1, x.shape[2]), p) if self.training and p > 0 else x

    @never_compiled  # for the sake of the step, which changes
    def _jac_loss(
        self, func: Callable[[Tensor], Tensor], state: Tensor, real: Tensor | None
    ) -> Tensor | None:
        if not (self.training and torch.is_grad_enabled()):
            return None
        memories = (m for m in self.deq.modules() if isinstance(m, dpp.Memory))
        step = next((m.step for m in memories), None)
        term = self.config.jacobian_regularization()(func, state.detach(), step)
        if term is None or real is None:
            return term
        return term * (real.numel() / real.sum().clamp_min(1))  # not of padding


class DEQTransformerForCausalLM(DEQTransformerPreTrainedModel, GenerationMixin):
    """A language model whose only layer is solved to its equilibrium.

    Args:
        config: the architecture, its solver and its gradient.

    Raises:
        ImportError: without TorchDEQ.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DEQTransformerConfig) -> None:
        super().__init__(config)
        self.model = DEQTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
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
        **kwargs: Any,
    ) -> DEQCausalLMOutput:
        """Predict each next token.

        Args:
            input_ids: tokens, shape (B, L).
            attention_mask: see `DEQTransformerModel.forward`.
            position_ids: see there.
            cache: see there.
            inputs_embeds: see there.
            labels: `input_ids` again, with -100 where there is nothing to predict, shape (B, L).
                Predictions of padding, and from padding, are left out anyway.
            use_cache: see there.
            logits_to_keep: how many last positions to return logits of, or which; 0 for all.
            num_items_in_batch: labels of the whole step, where this is a part of it.
            **kwargs: see there.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        states = output.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            states = states[:, logits_to_keep]
        elif logits_to_keep:
            states = states[:, -logits_to_keep:]
        logits = self.lm_head(states)
        loss, jac_loss = None, output.jac_loss
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=_predictable(labels, attention_mask),
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            if jac_loss is not None:
                if num_items_in_batch is not None:
                    jac_loss = jac_loss * (labels.ne(-100).sum() / num_items_in_batch)
                loss = loss + jac_loss
        return DEQCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: output.get(CACHE)},
            hidden_states=output.hidden_states,
            jac_loss=jac_loss,
            equilibrium_info=output.equilibrium_info,
        )

    def spectral_radius(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `DEQTransformerModel.spectral_radius`."""
        return self.model.spectral_radius(*args, **kwargs)


def _predictable(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Leave out labels that are padding, or would be predicted from padding."""
    if attention_mask is None or attention_mask.dim() != 2:
        return labels
    real = attention_mask[:, -labels.shape[1] :].bool()
    before = torch.nn.functional.pad(real[:, :-1], (1, 0))
    return labels.masked_fill(~(real & before), -100)


class SetStep(TrainerCallback):
    """Tells every equilibrium the step of a Transformers `Trainer`, and keeps what it remembers.

    Trainer(model, args, callbacks=[SetStep()], ...)

    Each checkpoint gets a file `deq_phantom_memory.pt` with `dpp.memory_state_dict`, and a run that
    is resumed loads it: warm starts and histories go on. As with the Trainer's random state, each
    process has a file of its own. Where there is none, nothing is loaded.

    Args:
        checkpoint: the folder of the checkpoint that a run is resumed from, where it is not one of
            `args.output_dir`: a Trainer does not tell its callbacks.
    """

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self.checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `dpp.load_memory_state_dict`."""
        folder = _folder(args, state) if self.checkpoint is None else Path(self.checkpoint)
        file = folder / _file(args)
        if state.global_step > 0 and file.is_file():
            saved = torch.load(file, map_location="cpu", weights_only=True)
            dpp.load_memory_state_dict(kwargs["model"], saved)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `dpp.set_step`."""
        dpp.set_step(kwargs["model"], state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `dpp.memory_state_dict`."""
        folder = _folder(args, state)
        if folder.is_dir():  # a search for hyperparameters has its own
            content = io.BytesIO()
            torch.save(dpp.memory_state_dict(kwargs["model"]), content)
            write_whole(folder / _file(args), content.getvalue())


def _folder(args: Any, state: Any) -> Path:
    """Return where a Trainer has its checkpoint of a step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _file(args: Any) -> str:
    rank = f"_{args.process_index}" if args.process_index else ""
    return f"deq_phantom_memory{rank}.pt"


AutoConfig.register(DEQTransformerConfig.model_type, DEQTransformerConfig, exist_ok=True)
AutoModel.register(DEQTransformerConfig, DEQTransformerModel, exist_ok=True)
AutoModelForCausalLM.register(DEQTransformerConfig, DEQTransformerForCausalLM, exist_ok=True)
