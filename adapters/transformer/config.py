"""The config: what each value must be, and what fits together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

import deq_phantom_plugin as dpp
from deq_phantom_plugin._plumbing.compilation import check_compile
from deq_phantom_plugin.forward import check_solve_dtype

from .solve import check_settings
from .versions import CACHE

__all__ = ["DEQTransformerConfig", "written"]


def written(strategy: Any) -> str | None:
    """Return a strategy as a config can save it, None if it cannot."""
    text = repr(strategy)
    try:
        return text if dpp.get_strategy(text) == strategy else None
    except ValueError:
        return None


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


def _compile(name: str, value: Any) -> None:
    check_compile(value)


def _solve_dtype(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}={value!r}; expected a name, such as 'bfloat16', or None")
    check_solve_dtype(value)


def _regularization(name: str, value: Any) -> None:
    field = name.removeprefix("jac_reg_")
    try:
        dpp.JacobianRegularization(**{"interval": 1, field: value})
    except ValueError as error:
        raise ValueError(f"jac_reg_{error}") from None


# What each value of a config must be, also one that is written later.
_CHECKS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), _whole),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings"), _whole),
    **dict.fromkeys(("dropout", "attention_dropout"), _probability),
    "hidden_act": _activation,
    "grad": _grad,
    **dict.fromkeys(("f_solver", "f_max_iter", "f_tol"), _solver),
    "compile": _compile,
    "solve_dtype": _solve_dtype,
    **dict.fromkeys(
        ("jac_reg_weight", "jac_reg_freq", "jac_reg_increment", "jac_reg_interval"),
        _regularization,
    ),
}


class DEQTransformerConfig(PreTrainedConfig):
    """What a `DEQTransformerForCausalLM` is made of.

    A model reads it in each forward pass. What is written later acts from the next one on and is
    saved: gradient, solver, `compile`, regulariser, dropout, attention, positions and `use_cache`.
    What the model's modules were made with is refused then, if it has changed. Models that share a
    config share what is written into it.

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
        solve_dtype: "bfloat16" or "float16" to take most of the forward solve in it; needs an
            `f_solver` of this package, such as "anderson_fast". Nothing in a model of 16 bits. See
            docs/howto/solvers.md.
        grad_in_eval: whether the gradient is attached in evaluation mode too, as `from_pretrained`
            leaves a model; for saliency maps and attacks.
        compile: whether the block is compiled for the solve and for gradients that go through its
            graph once, or a mode of `torch.compile`, see docs/howto/compile.md.
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
    solve_dtype: str | None = None
    grad_in_eval: bool = False
    compile: bool | str = False
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
        if found.get("solve_dtype") is None:  # and is what it was before there was one
            found.pop("solve_dtype", None)
        return found

    @property
    def writes(self) -> int:
        """How often the gradient was written."""
        return int(self.__dict__.get("_writes", 0))

    @property
    def solver(self) -> tuple[str, int, float, str | None]:
        """What says how the equilibrium is solved."""
        return self.f_solver, self.f_max_iter, self.f_tol, self.solve_dtype

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
        check_settings(self.grad, *self.solver, self.grad_in_eval)
        self.jacobian_regularization()

    def jacobian_regularization(self) -> dpp.JacobianRegularization:
        """Return the schedule that the `jac_reg_` fields describe."""
        names = ("weight", "freq", "increment", "interval")
        try:
            return dpp.JacobianRegularization(*(getattr(self, f"jac_reg_{name}") for name in names))
        except ValueError as error:
            raise ValueError(f"jac_reg_{error}") from None


AutoConfig.register(DEQTransformerConfig.model_type, DEQTransformerConfig, exist_ok=True)
