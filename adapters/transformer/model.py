"""`DEQTransformerModel`: embeddings, and the equilibrium of one block for the states of all tokens.

The forward pass reads its arguments (`inputs`), solves for the equilibrium (`solve`), and adds what
the config asks for: a Jacobian regulariser, a cache, attention weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.compilation import never_compiled
from deq_phantom_plugin._plumbing.once import warn_once
from deq_phantom_plugin.contract.errors import AssumptionWarning

from .block import DEQTransformerBlock, ScaledLinear, Surroundings, dropout_mask
from .config import DEQTransformerConfig, written
from .inputs import Tokens, check_arguments, check_length, longest_sequence, read_tokens, visible
from .jac_loss import Joins, by_sequence
from .pretrained import DEQTransformerPreTrainedModel
from .solve import EquilibriumInfo, change_solver, make_equilibrium, solvable, solve
from .versions import CACHE

__all__ = ["DEQModelOutput", "DEQTransformerModel"]


@dataclass
class DEQModelOutput(BaseModelOutputWithPast):
    """The output of a `DEQTransformerModel`.

    Attributes:
        jac_loss: the weighted Jacobian regulariser of this step, a differentiable scalar; None
            outside training, and in steps without a regulariser.
        equilibrium_info: the residual and the evaluations of the forward solve.
    """

    jac_loss: Tensor | None = None
    equilibrium_info: EquilibriumInfo | None = None


class DEQTransformerModel(DEQTransformerPreTrainedModel):
    """Embeddings, the equilibrium block and its solver, without an output layer.

    In training mode the states carry the gradient of `config.grad`. In evaluation mode they carry
    none, as with every equilibrium of this package, unless `config.grad_in_eval` is set.

    Args:
        config: the architecture, its solver and its gradient.
    """

    deq: Any  # TorchDEQ's module, with attributes that this package adds

    def __init__(self, config: DEQTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.inject = ScaledLinear(config.hidden_size, 3 * config.hidden_size, gain=2.0)
        self.rotary_emb = _rotary(config)
        self.block = DEQTransformerBlock(config)
        self.deq = make_equilibrium(config.grad, *config.solver, config.grad_in_eval)
        self._made_with = _made_with(config)
        self._followed = {
            "solver": config.solver,
            "writes": config.writes("grad"),
            "writes_in_eval": config.writes("grad_in_eval"),
            "positions": _positions(config),
        }
        self._joins = Joins()
        self.post_init()

    # Longer than 60 lines: most of them are its arguments and their docstring.
    @can_return_tuple  # type: ignore[untyped-decorator]
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

        The state of a token depends only on tokens before it. So these stay at their equilibrium
        when tokens are added: with the keys and values of a cache, only the new tokens are solved
        for. Like the source's memory, a cache carries no gradient.

        Several documents in one row do not attend to one another. A document begins where
        `position_ids` are 0 or do not grow, or where `cu_seq_lens_q` or `seq_idx` say so.
        Transformers' `DataCollatorWithFlattening` passes any of these.

        Args:
            input_ids: tokens, shape (B, L).
            attention_mask: 1 for tokens and 0 for padding, shape (B, P + L) with P tokens in the
                cache. Or a prepared mask, shape (B, 1 or heads, L, P + L): bool, with True for what
                is attended to, or floating numbers that are added to the scores. A prepared mask
                replaces the boundaries of documents, and tokens that attend to nothing are padding.
            position_ids: shape (B, L). If None, they are counted from the length of the cache, or
                from the beginning of each document.
            cache: a `DynamicCache` from an earlier call, whose rows hold one document each.
            inputs_embeds: embeddings in place of `input_ids`, shape (B, L, hidden_size).
            use_cache: whether to return a cache. If None, it is `config.use_cache` outside
                training, and False in training.
            output_hidden_states: whether to return embeddings and states as `hidden_states`, or
                the indices of those to return; `config.output_hidden_states` if None.
            output_attentions: whether to return the attention weights at the equilibrium, as
                `attentions`; `config.output_attentions` if None. This needs eager attention.
            past_key_values: the name of `cache` before Transformers 5.24.
            cu_seq_lens_q: the ends of the documents in a single row, from 0 to L.
            cu_seq_lens_k: the same.
            seq_idx: the number of each token's document, shape (B, L).
            jac_weights: the weight of each sequence in the regulariser, shape (B,); the number of
                its tokens if None.
            **kwargs: arguments that Transformers passes and that have no effect here.

        Raises:
            ValueError: if there are no tokens, or more than `config.max_position_embeddings`, which
                `config.rope_parameters` may scale; if the cache is of another kind; if a mask
                could be read in two ways; if a value of the config was changed that cannot change
                any more; or if the forward solve has diverged (in training).
            TypeError: if an argument is unknown.
        """
        check_arguments(kwargs)
        self.follow_config()
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"{given} of input_ids and inputs_embeds; expected one of the two")
        x: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache, cache = self._cache(use_cache, past_key_values if cache is None else cache)
        before = 0 if cache is None else cache.get_seq_length()
        shape = (x.shape[0], x.shape[1])
        documents = (cu_seq_lens_q, cu_seq_lens_k, seq_idx)
        tokens = read_tokens(shape, x.device, before, attention_mask, position_ids, *documents)
        check_length(tokens, shape, before, longest_sequence(config))
        _check_documents(cache, before, tokens)
        real = None if tokens.real is None else tokens.real[..., None]
        around = self._surroundings(x, tokens, cache, before)
        func = solvable(
            lambda state: self.block(state, around), x.dtype, real, self._compiles(before), self
        )
        solved, info = solve(self.deq, func, x)
        jac_loss = self._jac_loss(func, solved, real, jac_weights)
        state = solved.to(x.dtype)
        if use_cache:
            self._remember(cache, state, around, tokens)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        attentions = None
        if output_attentions:
            attentions = self._attentions(solved.to(x.dtype), around)
        states = self._dropped(state)
        self._joins.watch(states, jac_loss)
        return DEQModelOutput(
            last_hidden_state=states,
            **{CACHE: cache if use_cache else None},
            hidden_states=_selected((x, states), output_hidden_states),
            attentions=attentions,
            jac_loss=jac_loss,
            equilibrium_info=info,
        )

    def _compiles(self, before: int) -> bool | str:
        """Return how to compile F; with a cache it is not compiled, since each length would be."""
        return False if before else self.config.compile

    def _cache(
        self, use_cache: bool | None, cache: Cache | None
    ) -> tuple[bool, DynamicCache | None]:
        """Return whether to return a cache, and the cache to continue."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if not isinstance(cache, DynamicCache | None):
            raise ValueError(
                f"the cache is a {type(cache).__name__}; expected a DynamicCache, which `generate` "
                "makes with cache_implementation='dynamic'"
            )
        return use_cache, cache

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

    @never_compiled  # the training step changes, and would cause a new compilation each time
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
        if real is not None or weights is not None:
            func = by_sequence(func, state, real, weights)
        return self.config.jacobian_regularization()(func, state.detach(), step)

    def _remember(self, cache: Any, state: Tensor, around: Surroundings, tokens: Tokens) -> None:
        """Add the keys and values of the equilibrium to a cache."""
        _, key, value = self.block(state.detach(), around, of="heads")
        cache.update(key.detach(), value.detach(), 0)
        if tokens.documents is not None:
            cache.several_documents = True

    def _attentions(self, state: Tensor, around: Surroundings) -> tuple[Tensor]:
        """Return the attention weights at a state, shape (B, heads, L, P + L), in a tuple."""
        _, weights = self.block(state, around, of="attention")
        if weights is None:
            raise ValueError(
                f"output_attentions=True with attn_implementation="
                f"{self.config._attn_implementation!r}, which does not return attention weights; "
                "expected 'eager': call model.set_attn_implementation('eager')"
            )
        return (weights,)

    @never_compiled
    def follow_config(self) -> None:
        """Apply the changes of the config.

        Changes of `grad`, of the solver and of the positions are applied here. The other values are
        read where they are used.

        Raises:
            ValueError: if a value was changed that only has an effect before the model is built, or
                if the values do not fit together.
        """
        config = self.config
        config.check()
        now = _made_with(config)
        for name, value in self._made_with.items():
            if now[name] != value:
                raise ValueError(
                    f"config.{name}={now[name]!r} was written after a model was made with "
                    f"{value!r}, and the model cannot change it; write {value!r} again, or make a "
                    "new model"
                )
        # A module that takes the place of the embeddings may lack this attribute.
        embeddings = getattr(self.embed_tokens, "num_embeddings", config.vocab_size)
        if config.vocab_size != embeddings:
            raise ValueError(
                f"config.vocab_size={config.vocab_size} with {embeddings} embeddings; expected as "
                "many: call model.resize_token_embeddings, which changes both"
            )
        solver = config.solver
        if solver != self._followed["solver"]:
            change_solver(self.deq, *solver)
            self._followed["solver"] = solver
        # What `dpp.set_grad` has set stays, unless that very setting was written since.
        if config.writes("grad") != self._followed["writes"]:
            dpp.set_grad(self, config.grad)
            self._followed["writes"] = config.writes("grad")
        if config.writes("grad_in_eval") != self._followed.get("writes_in_eval", 0):  # old pickles
            self.deq.grad_in_eval = config.grad_in_eval
            self._followed["writes_in_eval"] = config.writes("grad_in_eval")
        positions = _positions(config)
        if positions != self._followed["positions"]:
            config.convert_rope_params_to_dict()
            config.validate_rope()
            device = self.rotary_emb.inv_freq.device
            self.rotary_emb = _rotary(config).to(device)
            self._followed["positions"] = _positions(config)

    def acting_grad(self) -> str:
        """Return the spec of the gradient in force, or `config.grad` if it has no spec."""
        acting = self.deq.produce_grad[-1].strategy
        if acting == dpp.get_strategy(self.config.grad):
            return self.config.grad
        text = written(acting)
        if text is None:
            warn_once(
                "grad is not saved",
                f"the gradient in force, {acting!r}, cannot be written in a config, so a model "
                f"that is loaded from it has another one: config.grad={self.config.grad!r}. Call "
                "dpp.set_grad after loading",
                AssumptionWarning,
            )
            return self.config.grad
        return text

    @torch.no_grad()
    def spectral_radius(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        lam: float | None = None,
        **options: Any,
    ) -> Tensor:
        """Estimate the spectral radius of dF/dh at the equilibrium of each sample.

        Args:
            input_ids: tokens, shape (B, L).
            attention_mask: shape (B, L).
            lam: a damping factor, for the radius of the damped map instead.
            **options: further arguments of `dpp.spectral_radius`.

        Returns:
            One radius per sample, shape (B,).
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


def _selected(
    states: tuple[Tensor, ...], which: bool | int | list[int] | None
) -> tuple[Any, ...] | None:
    """Return all states, or those of some indices with None in the place of the others."""
    if isinstance(which, bool) or which is None:
        return states if which else None
    indices = [which] if isinstance(which, int) else list(which)
    wanted = {i % len(states) for i in indices if -len(states) <= i < len(states)}
    return tuple(state if i in wanted else None for i, state in enumerate(states))


def _check_documents(cache: Any, before: int, tokens: Tokens) -> None:
    """Refuse a cache of several documents, since a cache does not know which token is of which."""
    prepared = tokens.mask is not None and tokens.mask.dim() == 4
    if before and getattr(cache, "several_documents", False) and not prepared:
        raise ValueError(
            "the cache holds rows of several documents, and new tokens would attend to all of "
            "them; expected a cache of one document per row, or a prepared attention_mask"
        )


def _made_with(config: DEQTransformerConfig) -> dict[str, Any]:
    """Return the values with which a model is built, and which cannot change later."""
    names = "hidden_size intermediate_size num_attention_heads hidden_act layer_norm_eps"
    return {name: getattr(config, name) for name in names.split()}


def _positions(config: DEQTransformerConfig) -> tuple[Any, ...]:
    """Return the values from which rotary positions are computed."""
    return copy.deepcopy(config.rope_parameters), config.max_position_embeddings


def _rotary(config: Any) -> LlamaRotaryEmbedding:
    """Return Llama's rotary positions, which need only values that our config has."""
    return LlamaRotaryEmbedding(config)


AutoModel.register(DEQTransformerConfig, DEQTransformerModel, exist_ok=True)
