"""`DEQTransformerConfig`, the config of the deep equilibrium Transformer.

Each value is checked when it is written, also later in the life of the config. `check` then tests
whether the values fit together.
"""

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
    """Return the text of a strategy as a config saves it, or None if it has no such text."""
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
    # The other values are chosen so that any valid value goes with them.
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


# The check of each value of a config. It also runs when a value is written later.
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


# The settings whose writes are counted, and the attributes that count them.
_COUNTS = {"grad": "_writes", "grad_in_eval": "_writes_in_eval"}


class DEQTransformerConfig(PreTrainedConfig):
    """The architecture, the solver and the gradient of a `DEQTransformerForCausalLM`.

    A model reads its config in each forward pass. These values may be changed later; a change acts
    from the next forward pass on, and is saved: gradient, solver, `compile`, regulariser, dropout,
    attention, positions and `use_cache`. If a value changes with which the modules of the model
    were built, such as `hidden_size`, the next forward pass raises an error. Models that share a
    config also share its changes.

    Attributes:
        vocab_size: the number of tokens in the vocabulary.
        hidden_size: the size of each token's state; a multiple of twice `num_attention_heads`.
        intermediate_size: the inner width of the feed-forward part.
        num_attention_heads: the number of attention heads.
        max_position_embeddings: the longest sequence, or document within a row, before the factor
            of `rope_parameters`. Positions are rotary, and so relative.
        hidden_act: the activation of the feed-forward part; the official code has relu.
        pre_layer_norm: False for the source's DEQ (PostLN), True for DEQ (PreLN).
        dropout: the probability of dropping a feature of the embeddings, of the two parts of the
            block, and of the output. All positions drop the same features.
        attention_dropout: the probability that a head does not attend to a position.
        initializer_range: the standard deviation of the embeddings. The weights of the block are
            drawn so that it is a contraction at the start of training, whatever its size.
        layer_norm_eps: the eps of the normalisations.
        tie_word_embeddings: whether the output layer uses the embeddings as its weights.
        rope_parameters: see Transformers' Llama. The types linear, dynamic, yarn, llama3 and
            longrope have a `factor`, by which sequences may be longer.
        use_cache: whether to return the keys and values of the equilibrium, outside training.
        grad: the gradient of the equilibrium, a spec of `dpp.get_strategy` as a string.
        f_solver: TorchDEQ's name of the forward solver.
        f_max_iter: the largest number of iterations of the forward solve.
        f_tol: the relative residual at which the solve of a sample stops.
        solve_dtype: "bfloat16" or "float16" to compute most of the forward solve in this dtype. It
            needs an `f_solver` of this package, such as "anderson_fast", and has no effect in a
            model of 16 bits. See docs/howto/solvers.md.
        grad_in_eval: whether the gradient is attached in evaluation mode too, for saliency maps and
            attacks. `from_pretrained` returns a model in evaluation mode.
        compile: whether the block is compiled for the solve, and for gradients that go through its
            graph once; or a mode of `torch.compile`, see docs/howto/compile.md.
        jac_reg_weight: the weight of ||J||_F^2 / numel in the loss, see
            `dpp.JacobianRegularization`.
        jac_reg_freq: the probability that a training step has the regulariser.
        jac_reg_increment: the number by which the weight grows every `jac_reg_interval` steps.
        jac_reg_interval: a number of training steps. `dpp.set_step` or `SetStep` pass the step.

    Raises:
        ValueError: if a value is invalid, or if the values do not fit together; the message says
            what is accepted.
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
        self.num_hidden_layers = 1  # Transformers' caches read these two
        self.num_key_value_heads = self.num_attention_heads
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        if check is not None:
            check(name, value)
        super().__setattr__(name, value)
        # `dpp.set_grad` can change these two at the model as well; the last change of each counts.
        if name in _COUNTS:
            self.__dict__[_COUNTS[name]] = self.writes(name) + 1

    def to_dict(self) -> dict[str, Any]:
        """Return the values to save."""
        found: dict[str, Any] = super().to_dict()
        for count in _COUNTS.values():
            found.pop(count, None)
        if found.get("solve_dtype") is None:  # the file is then as before this setting existed
            found.pop("solve_dtype", None)
        return found

    def writes(self, name: str) -> int:
        """Return how often `grad` or `grad_in_eval` was written."""
        return int(self.__dict__.get(_COUNTS[name], 0))

    def write_uncounted(self, **values: Any) -> None:
        """Write `grad` and `grad_in_eval` for a while, such that no model follows."""
        vars(self).update(values)

    @property
    def solver(self) -> tuple[str, int, float, str | None]:
        """The settings of the forward solve: solver, iterations, tolerance and dtype."""
        return self.f_solver, self.f_max_iter, self.f_tol, self.solve_dtype

    def check(self) -> None:
        """Refuse values that do not fit together.

        Raises:
            ValueError: if there are such values; the message names them and what is accepted.
        """
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} with num_attention_heads="
                f"{self.num_attention_heads}; expected a multiple of twice the heads, since rotary "
                "positions turn pairs of features in each head"
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
