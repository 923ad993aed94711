"""The models, and their config."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.compilation import never_compiled
from deq_phantom_plugin._plumbing.extras import require
from deq_phantom_plugin._plumbing.once import warn_once
from deq_phantom_plugin._plumbing.output import write_whole
from deq_phantom_plugin.contract.errors import AssumptionWarning
from deq_phantom_plugin.draws import SameDraws

from .block import DEQTransformerBlock, ScaledLinear, Surroundings, dropout_mask
from .inputs import Tokens, check_arguments, check_length, longest_sequence, read_tokens, visible
from .label_smoothing import OutputTuple, smooth_outputs_of
from .layer import CACHE, EquilibriumLayer, deq_from_layer
from .solve import EquilibriumInfo, change_solver, check_settings, make_equilibrium, solve

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


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; expected a whole number of at least 1")


def _probability(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r}; expected a probability in [0, 1)")


def _activation(name: str, value: Any) -> None:
    if value not in ACT2FN:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(ACT2FN)}")


def _grad(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r}; expected a spec as a string, such as 'upg(k=5)'")
    dpp.get_strategy(value)


def _solver(name: str, value: Any) -> None:
    # The others are such as go with any value.
    check_settings(
        "jfb", **{"f_solver": "fixed_point_iter", "f_max_iter": 3, "f_tol": 0, name: value}
    )


def _regularization(name: str, value: Any) -> None:
    field = name.removeprefix("jac_reg_")
    try:
        dpp.JacobianRegularization(**{"interval": 1, field: value})
    except ValueError as error:
        raise ValueError(f"jac_reg_{error}") from None


# What each value of a config must be, also one that is written later.
_CHECKS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "max_position_embeddings",
        ),
        _whole,
    ),
    **dict.fromkeys(("dropout", "attention_dropout"), _probability),
    "hidden_act": _activation,
    "grad": _grad,
    **dict.fromkeys(("f_solver", "f_max_iter", "f_tol"), _solver),
    **dict.fromkeys(
        ("jac_reg_weight", "jac_reg_freq", "jac_reg_increment", "jac_reg_interval"),
        _regularization,
    ),
}


class DEQTransformerConfig(PreTrainedConfig):
    """What a `DEQTransformerForCausalLM` is made of.

    A model reads it in each forward pass. What is written later acts from the next one on and is
    saved: gradient, solver, regulariser, dropout, attention, positions and `use_cache`. What the
    model's modules were made with is refused then, if it has changed. Models that share a config
    share what is written into it.

    Attributes:
        vocab_size: tokens.
        hidden_size: of each token's state; a multiple of twice `num_attention_heads`.
        intermediate_size: inner width of the feed-forward part.
        num_attention_heads: heads.
        max_position_embeddings: the longest sequence, or document of a row, before the factor of
            `rope_parameters`. Positions are rotary, so relative.
        hidden_act: activation of the feed-forward part; the official code has relu.
        pre_layer_norm: False for the source's DEQ (PostLN), True for DEQ (PreLN).
        dropout: probability of dropping a feature of the embeddings, of the two parts of the block
            and of the output, the same ones at all positions.
        attention_dropout: probability of dropping a position from what a head attends to.
        initializer_range: standard deviation of the embeddings. The block's weights are drawn so
            that it is a contraction to begin with, whatever its size.
        layer_norm_eps: of the normalisations.
        tie_word_embeddings: whether the output layer has the embeddings for its weights.
        rope_parameters: see Transformers' Llama: linear, dynamic, yarn, llama3 and longrope have a
            `factor`, by which sequences may be longer.
        use_cache: whether to return the keys and values of the equilibrium, outside training.
        grad: the gradient of the equilibrium, a spec of `dpp.get_strategy` as a string.
        f_solver: TorchDEQ's name of the forward solver.
        f_max_iter: the most iterations of the forward solve.
        f_tol: its relative residual of each sample.
        grad_in_eval: whether the gradient is attached in evaluation mode too, as `from_pretrained`
            leaves a model; for saliency maps and attacks.
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
    grad_in_eval: bool = False
    jac_reg_weight: float = 0.0
    jac_reg_freq: float = 1.0
    jac_reg_increment: float = 0.0
    jac_reg_interval: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_hidden_layers = 1  # of the cache
        self.num_key_value_heads = self.num_attention_heads
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        if check is not None:
            check(name, value)
        super().__setattr__(name, value)
        if name in ("grad", "grad_in_eval"):  # which may also be set at the model: the last counts
            self.__dict__["_writes"] = self.__dict__.get("_writes", 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved."""
        found: dict[str, Any] = super().to_dict()
        found.pop("_writes", None)
        return found

    @property
    def writes(self) -> int:
        """How often the gradient was written."""
        return int(self.__dict__.get("_writes", 0))

    def check(self) -> None:
        """Refuse values that do not fit together.

        Raises:
            ValueError: says which, and what is accepted.
        """
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} with num_attention_heads="
                f"{self.num_attention_heads}; expected a multiple of twice the heads"
            )
        check_settings(self.grad, self.f_solver, self.f_max_iter, self.f_tol, self.grad_in_eval)
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

    def to_tuple(self) -> tuple[Any, ...]:
        """Return all that is not None; a `Trainer` with smoothed labels still knows what it was."""
        return OutputTuple.of(self, super().to_tuple())


class Joins:
    """Finds out whether the regulariser of a step joined the loss that was differentiated.

    Who computes a loss of their own, a Trainer's `compute_loss_func` among them, has to add it.
    """

    def __init__(self) -> None:
        self._passed: set[str] = set()

    @never_compiled
    def watch(self, states: Tensor, jac_loss: Tensor | None) -> None:
        """Say so if the last backward pass left the regulariser out, and watch the next one."""
        if self._passed == {"states"}:
            warn_once(
                "regulariser left out",
                "a backward pass went through the states of a DEQ transformer in training, and "
                "not through its Jacobian regulariser (config.jac_reg_weight); a loss of your own, "
                "such as a Trainer's compute_loss_func, has to add output.jac_loss",
                AssumptionWarning,
            )
        self._passed = passed = set()
        if jac_loss is not None and jac_loss.requires_grad and states.requires_grad:
            states.register_hook(lambda _: passed.add("states"))
            jac_loss.register_hook(lambda _: passed.add("jac_loss"))


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
        text = _written(strategy)
        if text is None:
            raise ValueError(f"{spec!r} cannot be written in a config; dpp.set_grad takes it")
        dpp.set_grad(self, strategy)
        self.config.grad = text
        self._base()._followed["writes"] = self.config.writes

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save weights and config, with the gradient that acts: `dpp.set_grad` may have set it.

        See Transformers' method for the arguments.
        """
        self._base().follow_config()
        base, config = self._base(), self.config
        written = config.grad, config.grad_in_eval
        config.grad, config.grad_in_eval = base.acting_grad(), bool(base.deq.grad_in_eval)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            config.grad, config.grad_in_eval = written
            base._followed["writes"] = config.writes

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what Transformers does for stacks of layers.

        Raises:
            ValueError: says what to do instead.
        """
        raise ValueError(
            "gradient checkpointing is for stacks of layers; an equilibrium keeps no graph of its "
            "solve. npg, jfb and ift keep that of one evaluation, and so does "
            "model.set_grad('upg(checkpoint=True)')"
        )

    def _base(self) -> DEQTransformerModel:
        base: DEQTransformerModel = getattr(self, self.base_model_prefix, self)
        return base

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
    equilibrium of this package, none unless `config.grad_in_eval` was set when it was made.
    """

    def __init__(self, config: DEQTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.inject = ScaledLinear(config.hidden_size, 3 * config.hidden_size, gain=2.0)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.block = DEQTransformerBlock(config)
        solver = (config.f_solver, config.f_max_iter, config.f_tol)
        self.deq = make_equilibrium(config.grad, *solver, config.grad_in_eval)
        self._made_with = _made_with(config)
        self._followed = {
            "solver": solver,
            "writes": config.writes,
            "positions": _positions(config),
        }
        self._joins = Joins()
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
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        jac_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> DEQModelOutput:
        """Solve for the states of all tokens.

        A token's state depends on those before it alone, which therefore stay at equilibrium when
        tokens are added: with the keys and values of a cache only the new tokens are solved for.
        Like the source's memory, such a cache carries no gradient.

        Several documents in one row do not see one another. A document begins where
        `position_ids` are 0 or do not grow, or where `cu_seq_lens_q` or `seq_idx` say so
        (Transformers' `DataCollatorWithFlattening` gives any of these).

        Args:
            input_ids: tokens, shape (B, L).
            attention_mask: 1 for tokens and 0 for padding, shape (B, P + L), P tokens in the cache;
                or one prepared, of shape (B, 1 or heads, L, P + L): bool, True for what is seen, or
                floating numbers that are added to the scores. The latter says all: positions then
                tell no documents apart, and tokens that see nothing are padding.
            position_ids: shape (B, L); counted from the cache's length, or from the beginning of
                each document, if None.
            cache: a `DynamicCache` from an earlier call, of rows of one document.
            inputs_embeds: in place of `input_ids`, shape (B, L, hidden_size).
            use_cache: whether to return a cache; `config.use_cache` if None, but not in training.
            output_hidden_states: whether to return embeddings and states, as `hidden_states`, or
                which of the two; `config.output_hidden_states` if None.
            output_attentions: whether to return how heads attend at the equilibrium, as
                `attentions`; `config.output_attentions` if None. Needs eager attention.
            past_key_values: the name of `cache` before Transformers 5.24.
            cu_seq_lens_q: where documents end in a single row, from 0 to L.
            cu_seq_lens_k: the same.
            seq_idx: the number of each token's document, shape (B, L).
            jac_weights: how much each sequence counts in the regulariser, shape (B,); as many
                tokens as it has if None.
            **kwargs: what Transformers passes and needs nothing done.

        Raises:
            ValueError: if there are no tokens, or more than `config.max_position_embeddings`, which
                `config.rope_parameters` may scale; if the cache is of another kind; if a mask
                could be read in two ways; if what was written into the config cannot act any more;
                if the forward solve has diverged (in training).
            TypeError: on an argument that is unknown.
        """
        check_arguments(kwargs, _ARGUMENTS)
        self.follow_config()
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        if cache is None:
            cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        if not isinstance(cache, DynamicCache | None):
            raise ValueError(
                f"the cache is a {type(cache).__name__}; expected a DynamicCache: in `generate` "
                "cache_implementation='dynamic'"
            )
        before = 0 if cache is None else cache.get_seq_length()
        shape = tuple(inputs_embeds.shape[:2])
        tokens = read_tokens(
            shape,
            inputs_embeds.device,
            before,
            attention_mask,
            position_ids,
            cu_seq_lens_q,
            cu_seq_lens_k,
            seq_idx,
        )
        check_length(tokens, shape, before, longest_sequence(config))
        _check_documents(cache, before, tokens)
        real = None if tokens.real is None else tokens.real[..., None]
        around = self._surroundings(inputs_embeds, tokens, cache, before)

        def func(state: Tensor) -> Tensor:
            image = self.block(state.to(inputs_embeds.dtype), around).to(state.dtype)
            # Padding rests at zero, where it adds nothing to any residual.
            return image if real is None else image.where(real, 0)

        # Of dropout inside the block, such as an adapter's: its own masks are in `around`.
        func = SameDraws(func)
        # Solvers want more than half precision.
        dtype = torch.promote_types(inputs_embeds.dtype, torch.float32)
        state, info = solve(self.deq, func, torch.zeros_like(inputs_embeds, dtype=dtype))
        jac_loss = self._jac_loss(func, state, real, jac_weights)
        if use_cache and cache is not None:
            _, key, value = self.block.heads(state.detach().to(inputs_embeds.dtype), around)
            cache.update(key.detach(), value.detach(), 0)
            if tokens.documents is not None:
                cache.several_documents = True
        attentions = None
        if output_attentions:
            attentions = self._attentions(state.to(inputs_embeds.dtype), around)
        states = self._dropped(state.to(inputs_embeds.dtype))
        self._joins.watch(states, jac_loss)
        return DEQModelOutput(
            last_hidden_state=states,
            **{CACHE: cache if use_cache else None},
            hidden_states=_selected((inputs_embeds, states), output_hidden_states),
            attentions=attentions,
            jac_loss=jac_loss,
            equilibrium_info=info,
        )

    def acting_grad(self) -> str:
        """Return what `config.grad` is to say of the gradient that acts, as far as it can."""
        acting = self.deq.produce_grad[-1].strategy
        if acting == dpp.get_strategy(self.config.grad):
            return self.config.grad
        text = _written(acting)
        if text is None:
            warn_once(
                "grad is not saved",
                f"the gradient that acts, {acting!r}, cannot be written in a config; saved is "
                f"config.grad={self.config.grad!r}",
                AssumptionWarning,
            )
            return self.config.grad
        return text

    def _attentions(self, state: Tensor, around: Surroundings) -> tuple[Tensor]:
        """Return how heads attend at a state."""
        _, weights = self.block.attend(state, around)
        if weights is None:
            raise ValueError(
                f"output_attentions=True with attn_implementation="
                f"{self.config._attn_implementation!r}, which does not tell; expected eager: "
                "model.set_attn_implementation('eager')"
            )
        return (weights,)

    @never_compiled
    def follow_config(self) -> None:
        """Let what has been written into the config act.

        `grad`, the solver and the positions are followed here; the rest is read where it is used.

        Raises:
            ValueError: if something was written that could only have acted before the model was
                made, or if values do not fit together.
        """
        config = self.config
        config.check()
        now = _made_with(config)
        for name, value in self._made_with.items():
            if now[name] != value:
                raise ValueError(
                    f"config.{name}={now[name]!r} was written after a model was made with "
                    f"{value!r}, on which it has no effect; put it back, or make a new model"
                )
        # What others put in the place of the embeddings may not tell.
        embeddings = getattr(self.embed_tokens, "num_embeddings", config.vocab_size)
        if config.vocab_size != embeddings:
            raise ValueError(
                f"config.vocab_size={config.vocab_size} with {embeddings} embeddings; expected "
                "model.resize_token_embeddings to change both"
            )
        solver = (config.f_solver, config.f_max_iter, config.f_tol)
        if solver != self._followed["solver"]:
            change_solver(self.deq, *solver)
            self._followed["solver"] = solver
        if config.writes != self._followed["writes"]:
            dpp.set_grad(self, config.grad, in_eval=config.grad_in_eval)
            self._followed["writes"] = config.writes
        positions = _positions(config)
        if positions != self._followed["positions"]:
            config.convert_rope_params_to_dict()
            config.validate_rope()
            device = self.rotary_emb.inv_freq.device
            self.rotary_emb = LlamaRotaryEmbedding(config).to(device)
            self._followed["positions"] = _positions(config)

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

    def _surroundings(
        self, embeddings: Tensor, tokens: Tokens, cache: Cache | None, before: int
    ) -> Surroundings:
        past = None
        if before:
            layer: Any = cache.layers[0]  # type: ignore[union-attr]
            past = (layer.keys, layer.values)
        return Surroundings(
            injection=self.inject(self._dropped(self.block.norm(embeddings))),
            rotation=self.rotary_emb(embeddings, tokens.positions),
            attention_mask=visible(self.config, embeddings, tokens, cache, before),
            past=past,
            keep=self.block.keep(embeddings),
        )

    def _dropped(self, x: Tensor) -> Tensor:
        """Drop features of shape (B, L, hidden_size), the same ones at all positions."""
        p = self.config.dropout
        return x * dropout_mask(x, (x.shape[0], 1, x.shape[2]), p) if self.training and p > 0 else x

    @never_compiled  # for the sake of the step, which changes
    def _jac_loss(
        self,
        func: Callable[[Tensor], Tensor],
        state: Tensor,
        real: Tensor | None,
        weights: Tensor | None,
    ) -> Tensor | None:
        if not (self.training and torch.is_grad_enabled()):
            return None
        memories = (m for m in self.deq.modules() if isinstance(m, dpp.Memory))
        step = next((m.step for m in memories), None)
        regularized = func
        if real is not None or weights is not None:
            # ||J||_F^2 of each sequence over its own tokens, times its share; not of padding.
            batch, length, _ = state.shape
            count = state.new_full((batch,), length) if real is None else real.sum((1, 2))
            share = (count if weights is None else weights).to(state.dtype)
            share = share / share.sum().clamp_min(1)
            scale = (share * batch * length / count.clamp_min(1)).sqrt()[:, None, None]

            def regularized(h: Tensor) -> Tensor:
                return func(h) * scale

        return self.config.jacobian_regularization()(regularized, state.detach(), step)


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
        self.loss_type = "ForCausalLM"  # of subclasses too, whatever their names
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
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
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
                Predictions of padding, from padding, and from one document of the next, are left
                out anyway.
            use_cache: see there.
            logits_to_keep: how many last positions to return logits of, or which; 0 for all.
            num_items_in_batch: labels of the whole step, where this is a part of it; the first of
                each row, which nothing predicts, do not count.
            output_hidden_states: see there.
            output_attentions: see there.
            **kwargs: see there; and `shift_labels`, what each token is to predict, in place of
                `labels`, shape (B, L).
        """
        # A Trainer takes all that have labels in their names for what each batch must have.
        shift_labels = kwargs.pop("shift_labels", None)
        targets = None
        if shift_labels is not None:
            targets = shift_labels
        elif labels is not None:
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
            named = {name: kwargs.get(name) for name in _OF_DOCUMENTS}
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
        return self.model.spectral_radius(*args, **kwargs)


def _written(strategy: Any) -> str | None:
    """Return a strategy as a config can save it, None if it cannot."""
    text = repr(strategy)
    try:
        return text if dpp.get_strategy(text) == strategy else None
    except ValueError:
        return None


def share_of_step(
    jac_loss: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """Weigh the regulariser of a part of a step by its labels, as cross-entropy is.

    Args:
        jac_loss: of this part.
        targets: what each token is to predict, -100 for nothing.
        num_items_in_batch: labels of the whole step; None where this is all of it.
    """
    if num_items_in_batch is None:
        return jac_loss
    items = torch.as_tensor(num_items_in_batch, device=jac_loss.device).reshape(-1)[0]
    return jac_loss * (targets.ne(-100).sum().to(jac_loss.device) / items)


def _smoothed(output: DEQCausalLMOutput, targets: Tensor, items: Any) -> Tensor | None:
    """Return the regulariser that joins a loss with smoothed labels."""
    jac_loss = output.jac_loss
    if jac_loss is None:
        return None
    counts = targets.ne(-100).sum(-1)
    if items is not None and bool((counts != counts[0]).any()):
        warn_once(
            "regulariser beside smoothed labels",
            "label smoothing takes the labels away from the model, so that in a part of a step the "
            "Jacobian regulariser weighs rows by their tokens, while parts weigh by their labels: "
            "with rows of several lengths and gradient accumulation it is not quite that of one "
            "batch. Said once.",
            AssumptionWarning,
        )
    return share_of_step(jac_loss, targets, items)


def _predictable(
    targets: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    named: dict[str, Any],
) -> Tensor:
    """Leave out targets that are padding, predicted from padding, or of another document."""
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


def _selected(
    states: tuple[Tensor, ...], which: bool | int | list[int] | None
) -> tuple[Tensor | None, ...] | None:
    """Return all states, or those of some indices, None in the place of others."""
    if isinstance(which, bool) or which is None:
        return states if which else None
    indices = [which] if isinstance(which, int) else list(which)
    wanted = {i % len(states) for i in indices if -len(states) <= i < len(states)}
    return tuple(state if i in wanted else None for i, state in enumerate(states))


def _check_documents(cache: Any, before: int, tokens: Tokens) -> None:
    """Refuse to go on after several documents: a cache does not tell them apart."""
    prepared = tokens.mask is not None and tokens.mask.dim() == 4
    if before and getattr(cache, "several_documents", False) and not prepared:
        raise ValueError(
            "the cache holds rows of several documents, as position_ids said; expected a cache of "
            "one document a row, or a prepared attention_mask"
        )


def _made_with(config: DEQTransformerConfig) -> dict[str, Any]:
    """Return what a model is made with, and cannot follow later."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
    )
    return {name: getattr(config, name) for name in names}


def _positions(config: DEQTransformerConfig) -> tuple[Any, ...]:
    """Return what rotary positions are made with."""
    return copy.deepcopy(config.rope_parameters), config.max_position_embeddings


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


# Where documents begin, beside positions.
_OF_DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
_ARGUMENTS = (
    *(
        name
        for name in inspect.signature(DEQTransformerForCausalLM.forward).parameters
        if name not in ("self", "kwargs")
    ),
    "shift_labels",
    *_OF_DOCUMENTS,
)

smooth_outputs_of(DEQCausalLMOutput, _smoothed)
AutoConfig.register(DEQTransformerConfig.model_type, DEQTransformerConfig, exist_ok=True)
AutoModel.register(DEQTransformerConfig, DEQTransformerModel, exist_ok=True)
AutoModelForCausalLM.register(DEQTransformerConfig, DEQTransformerForCausalLM, exist_ok=True)
