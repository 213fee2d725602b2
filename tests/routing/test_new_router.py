"""A router that is not in the package, one class with `route`, keeps the whole contract; broken ones are found out."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from moe.routing import noise
from moe.routing.base import Context, LinearRouter, LinearRouterConfig, RouterConfig, Routing
from moe.routing.choice import token_choice, top_k
from tests.routing import contract


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareConfig(LinearRouterConfig):
    """Weights are the squares of softmax scores."""

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        probs_BSE = jax.nn.softmax(logits_BSE, axis=-1)
        expert_BSK, margin_BS = top_k(probs_BSE + bias_E, self.num_selected)
        return token_choice(
            context,
            expert_BSK=expert_BSK,
            weight_BSK=jnp.take_along_axis(probs_BSE, expert_BSK, axis=-1) ** 2,
            probs_BSE=probs_BSE,
            log_z_BS=jax.nn.logsumexp(logits_BSE, axis=-1),
            margin_BS=margin_BS,
        )


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_a_router_of_one_class_keeps_the_contract(check: contract.Check) -> None:
    check(SquareConfig(), contract.EXPERTS)


class Leaks(SquareConfig):
    """Looks at the mean of its sequence: the future, and the padding."""

    def inputs(self, x_BSD: jax.Array, context: Context) -> jax.Array:
        return x_BSD + x_BSD.mean(axis=1, keepdims=True)


class Timid(SquareConfig):
    """Declares less than it keeps."""

    causal: ClassVar[bool] = False
    padding_invariant: ClassVar[bool] = False
    uses_bias: ClassVar[bool] = False


class Biased(SquareConfig):
    """Lets the bias into the weights."""

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        return super().route(logits_BSE + bias_E, context, jnp.zeros_like(bias_E))


class Stopped(SquareConfig):
    """Learns from nothing. (Here be no word on why.)"""

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        return super().route(jax.lax.stop_gradient(logits_BSE), context, bias_E)


class Noisy(SquareConfig):
    """Draws from the shape of its batch."""

    def inputs(self, x_BSD: jax.Array, context: Context) -> jax.Array:
        return x_BSD + jax.random.normal(context.key, x_BSD.shape)


class Partial(SquareConfig):
    """The first expert is treated unlike the others."""

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        return super().route(logits_BSE.at[..., 0].multiply(2.0), context, bias_E)


class Twice(SquareConfig):
    """Takes its best expert twice."""

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        found = super().route(logits_BSE, context, bias_E)
        return dataclasses.replace(found, expert_BR=found.expert_BR // 2 * 2)


class Awake(SquareConfig):
    """Routes padding."""

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        return super().route(logits_BSE, dataclasses.replace(context, segment_BS=context.segment_BS * 0 + 1), bias_E)


BROKEN = [
    (Leaks(), contract.later_tokens_change_nothing_unless_declared, "later tokens"),
    (Leaks(), contract.the_content_of_padding_changes_nothing, "Arrays are not equal"),
    (Leaks(), contract.appended_padding_changes_nothing_unless_declared, "appended padding"),
    (Timid(), contract.later_tokens_change_nothing_unless_declared, "causal, but declares it is not"),
    (Timid(), contract.appended_padding_changes_nothing_unless_declared, "invariant to padding, but declares"),
    (Timid(), contract.a_bias_moves_the_selection_and_not_the_weights, "declares that it ignores it"),
    (Biased(), contract.a_bias_moves_the_selection_and_not_the_weights, "a bias changes"),
    (Stopped(), contract.the_task_teaches_the_router_and_dispatchers_agree, "no task gradient to"),
    (Noisy(), contract.a_batch_in_two_halves_routes_the_same, "sequences from"),
    (Partial(), contract.renaming_experts_renames_everything, "renamed experts"),
    (Twice(), contract.shapes_ranges_and_dtypes, "an expert is chosen twice"),
    (Awake(), contract.padding_is_void_and_the_load_sums_to_one, "a padding token reaches an expert"),
]


@pytest.mark.parametrize(("config", "check", "message"), BROKEN, ids=[f"{type(c).__name__}-{m}" for c, _, m in BROKEN])
def test_a_broken_router_is_found_out(config: RouterConfig, check: contract.Check, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(config, contract.EXPERTS)


class Silent(SquareConfig):
    """Declares that the task teaches it nothing."""

    task_gradient: ClassVar[bool] = False


def test_a_router_without_gradient_must_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    check = contract.the_task_teaches_the_router_and_dispatchers_agree
    with pytest.raises(AssertionError, match="docstring does not say why"):
        check(Silent(), contract.EXPERTS)
    monkeypatch.setattr("tests.routing.test_new_router.__doc__", "No task gradient: it is a test.")
    check(Silent(), contract.EXPERTS)


def test_noise_by_token_survives_the_cut_that_noise_by_shape_does_not() -> None:
    class Steady(SquareConfig):
        def inputs(self, x_BSD: jax.Array, context: Context) -> jax.Array:
            return x_BSD + noise.uniform(context, x_BSD.shape[-1])

    contract.a_batch_in_two_halves_routes_the_same(Steady(), contract.EXPERTS)
    contract.any_number_of_devices_routes_the_same(Steady(), contract.EXPERTS)


def test_only_what_its_config_declares_may_be_renamed() -> None:
    class Fixed(SquareConfig):
        def permutation(self, key: jax.Array, num_experts: int) -> jax.Array | None:
            return None

    router = Fixed().build(jax.random.key(0), 4, 8)
    assert isinstance(router, LinearRouter) and router.symmetry(jax.random.key(1), 8) is None
    contract.renaming_experts_renames_everything(Fixed(), contract.EXPERTS)
