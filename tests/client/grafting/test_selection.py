"""The losses that choose an expert, against a layer from which all others are taken away by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import client.grafting.selection
from client.grafting.selection import select_experts, surviving_weights
from client.model import AdaptedModel
from client.text import TokenSequence
from tests.client.grafting.test_grafts import FAMILIES, grafted_model, shared_part
from tests.client.tiny_models import NUM_EXPERTS, random_tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("deepseek_v3", {"norm_topk_prob": False}),
]


def sequences(lengths: tuple[int, ...] = (9, 4, 7)) -> list[TokenSequence]:
    """Of different lengths, so that batches are padded."""
    ids = [random_tokens(1, length, seed=length)[0].tolist() for length in lengths]
    return [TokenSequence(tokens, tokens, [len(tokens)]) for tokens in ids]


def block_inputs(adapted: AdaptedModel, layer: str) -> Tensor:
    """(N, D) what reaches the base model's layer, sequence by sequence, without padding."""
    model, inputs = adapted.base.model, []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        for sequence in sequences():
            model(torch.tensor([sequence.input_ids]))
    hook.remove()
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in inputs])


def routed(adapted: AdaptedModel, layer: str, x_ND: Tensor) -> Tensor:
    """(N, D) F: the base model's whole layer without its shared expert."""
    block: Any = adapted.base.model.get_submodule(layer)
    output = block(x_ND[None])
    output = (output[0] if isinstance(output, tuple) else output).reshape(x_ND.shape)
    return output - shared_part(block, x_ND)


def naive_weights(adapted: AdaptedModel, layer: str, x_ND: Tensor, survivors: tuple[int, ...]) -> Tensor:
    """(N, survivors) by each family's own rule, with the dropped experts' logits left out of every sum."""
    config, block = adapted.base.model.config, adapted.base.model.get_submodule(layer)
    router: Any = block.router if hasattr(block, "router") else block.gate
    logits_NS = torch.nn.functional.linear(x_ND, router.weight, getattr(router, "bias", None))[:, survivors]
    if not hasattr(config, "routed_scaling_factor"):
        return logits_NS.softmax(dim=1)
    score_NS = logits_NS.sigmoid()
    groups = {expert // (NUM_EXPERTS // config.n_group) for expert in survivors}
    if len(groups) > config.topk_group:  # of two groups with one survivor each, only the better is looked at
        score_NS = score_NS * (score_NS == score_NS.max(dim=1, keepdim=True).values)
    if config.norm_topk_prob:
        score_NS = score_NS / score_NS.sum(dim=1, keepdim=True)
    return score_NS * config.routed_scaling_factor


def naive_loss(adapted: AdaptedModel, layer: str, survivors: tuple[int, ...]) -> float:
    """Sum of ||F - F_S|| over the tokens, with F_S by transformers' own experts, one token's survivors at a time."""
    x_ND = block_inputs(adapted, layer)
    experts: Any = adapted.base.model.get_submodule(f"{layer}.experts")
    indices_NS = torch.tensor([survivors] * len(x_ND))
    with torch.no_grad():
        left_ND = experts(x_ND, indices_NS, naive_weights(adapted, layer, x_ND, survivors))
        return float((routed(adapted, layer, x_ND) - left_ND).norm(dim=1).sum())


def select(adapted: AdaptedModel, num_experts: int, batch_size: int = 2) -> client.grafting.selection.Selection:
    adapted.load_adapter(adapted.initial_adapter(seed=0))
    return select_experts(adapted, sequences(), num_experts, batch_size)


@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_losses_are_those_of_the_layer_without_all_others(family: str, overrides: dict[str, Any]) -> None:
    adapted = grafted_model(family, **overrides)
    found = select(adapted, 2)
    assert found.layers.keys() == adapted.layers.keys()
    for layer, choice in found.layers.items():
        alone = [naive_loss(adapted, layer, (expert,)) for expert in range(NUM_EXPERTS)]
        best, second = np.sort(alone)[:2]
        first = int(np.argmin(alone))
        pairs = {other: naive_loss(adapted, layer, (first, other)) for other in range(NUM_EXPERTS) if other != first}
        assert choice.experts == (first, min(pairs, key=lambda other: pairs[other]))
        assert choice.loss == pytest.approx(min(pairs.values()), rel=1e-4)
        (single,) = (select(adapted, 1).layers[layer],)
        assert single.experts == (first,)
        assert single.loss == pytest.approx(best, rel=1e-4)
        assert single.spread == pytest.approx((second - best) / second, rel=1e-2)
        assert not single.is_tie


@pytest.mark.parametrize("family", ["phimoe", "minimax_m2"])
def test_one_expert_alone_counts_whole_under_routers_that_need_more_than_logits(family: str) -> None:
    adapted = grafted_model(family)
    for layer, choice in select(adapted, 1).layers.items():
        x_ND, experts = block_inputs(adapted, layer), adapted.base.model.get_submodule(f"{layer}.experts")
        F_ND, one = routed(adapted, layer, x_ND), torch.ones(len(x_ND), 1)
        alone = [
            float((F_ND - experts(x_ND, torch.full_like(one, expert, dtype=torch.int64), one)).norm(dim=1).sum())
            for expert in range(NUM_EXPERTS)
        ]
        assert choice.experts == (int(np.argmin(alone)),)
        assert choice.loss == pytest.approx(min(alone), rel=1e-4)


def test_a_layer_without_finite_answers_is_named() -> None:
    adapted = grafted_model("olmoe")
    with torch.no_grad():
        adapted.experts()["model.layers.1.mlp"].down_proj[2] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp: .* is not finite"):
        select(adapted, 1)


def test_the_third_is_the_best_beside_the_first_two() -> None:
    adapted = grafted_model("olmoe", num_experts_per_tok=3)
    two, three = select(adapted, 2), select(adapted, 3)
    for layer, choice in three.layers.items():
        both = two.layers[layer].experts
        left = {other: naive_loss(adapted, layer, (*both, other)) for other in set(range(NUM_EXPERTS)) - {*both}}
        assert choice.experts == (*both, min(left, key=lambda other: left[other]))
        assert choice.loss == pytest.approx(min(left.values()), rel=1e-4)


def test_with_every_expert_chosen_and_used_nothing_is_left_to_lose() -> None:
    """Where each token goes to all experts, dropping none changes nothing."""
    adapted = grafted_model("mixtral", num_experts_per_tok=NUM_EXPERTS)
    for choice in select(adapted, NUM_EXPERTS).layers.values():
        assert sorted(choice.experts) == list(range(NUM_EXPERTS))
        assert choice.loss == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("num_experts", [1, 2])
def test_neither_batches_nor_pieces_matter(monkeypatch: pytest.MonkeyPatch, num_experts: int) -> None:
    adapted = grafted_model("gpt_oss")
    whole = select(adapted, num_experts, batch_size=3)
    monkeypatch.setattr(client.grafting.selection, "_VALUES_AT_A_TIME", 1)
    apart = select(adapted, num_experts, batch_size=1)
    assert whole.num_tokens == apart.num_tokens == 20
    for layer, choice in whole.layers.items():
        assert apart.layers[layer].experts == choice.experts
        assert apart.layers[layer].loss == pytest.approx(choice.loss, rel=1e-5)


def calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[torch.Size]:
    """Filled with the shape of the first result at each call of a function of ``selection``'s."""
    shapes, function = [], getattr(client.grafting.selection, name)

    def watched(*args: Any) -> Any:
        result = function(*args)
        shapes.append(result.shape)
        return result

    monkeypatch.setattr(client.grafting.selection, name, watched)
    return shapes


def test_all_candidates_are_routed_at_once_and_outputs_that_fit_are_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two batches of 13 and 7 tokens in two layers: for the first expert four candidates, for the second three."""
    adapted = grafted_model("olmoe")
    routed, computed = calls(monkeypatch, "surviving_weights"), calls(monkeypatch, "every_expert")
    select(adapted, 2)
    assert routed == [(sets, tokens, survivors) for sets, survivors in ((4, 1), (3, 2)) for tokens in (13, 7)] * 2
    assert computed == [(NUM_EXPERTS, tokens, 16) for tokens in (13, 7)] * 2


def test_pieces_keep_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 4 experts, of each 2 * 24 and 24 values a token, and 16 for the router: 352; of 1,800, 5 fit."""
    adapted = grafted_model("olmoe")
    monkeypatch.setattr(client.grafting.selection, "_VALUES_AT_A_TIME", 1800)
    computed = calls(monkeypatch, "every_expert")
    select(adapted, 1)
    assert [tokens for _, tokens, _ in computed] == [5, 5, 3, 5, 2] * 2


@pytest.mark.parametrize(
    ("family", "overrides", "is_same"),
    [*((family, {}, True) for family in FAMILIES), ("nemotron_h", {"moe_latent_size": 8}, False)],
)
def test_what_router_and_experts_are_both_given_is_kept_once(
    family: str, overrides: dict[str, int], is_same: bool
) -> None:
    adapted = grafted_model(family, None, **overrides)
    for layer, seen in client.grafting.selection._observed(adapted, sequences(), 2).items():
        torch.testing.assert_close(torch.cat(seen.routed_by), block_inputs(adapted, layer))
        for routed_by, inputs in zip(seen.routed_by, seen.inputs, strict=True):
            assert (routed_by is inputs) == is_same


@pytest.mark.parametrize("num_experts", [1, 2])
def test_copies_of_one_expert_are_a_tie(num_experts: int) -> None:
    adapted = grafted_model("olmoe")
    with torch.no_grad():
        for experts in adapted.experts().values():
            for weight in experts.parameters(recurse=False):
                weight.copy_(weight[:1].expand_as(weight))
    found = select(adapted, num_experts)
    for choice in found.layers.values():
        assert choice.is_tie
        assert choice.experts == tuple(range(num_experts))


def test_two_of_the_same_kind_and_one_better_are_no_tie() -> None:
    adapted = grafted_model("olmoe")
    before = select(adapted, 1)
    for layer, choice in before.layers.items():
        (best,) = choice.experts
        others = [expert for expert in range(NUM_EXPERTS) if expert != best]
        with torch.no_grad():
            for weight in adapted.experts()[layer].parameters(recurse=False):
                weight[others[0]] = weight[others[1]]
    assert not next(iter(select(adapted, 1).layers.values())).is_tie


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_a_router_is_as_it_was_afterwards(family: str) -> None:
    adapted = grafted_model(family)
    layer, router = next(iter(adapted.routers().items()))
    hidden_ND = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    before = [tensor.clone() for tensor in router(hidden_ND)]
    pairs = list(itertools.combinations(range(NUM_EXPERTS), 2))
    weights_CNS = surviving_weights(router, hidden_ND, NUM_EXPERTS, torch.tensor(pairs))
    for weights_NS, survivors in zip(weights_CNS, pairs, strict=True):
        torch.testing.assert_close(weights_NS, naive_weights(adapted, layer, hidden_ND, survivors))
    for tensor, again in zip(before, router(hidden_ND), strict=True):
        torch.testing.assert_close(tensor, again)


def test_a_router_may_answer_in_reverse() -> None:
    """As Granite's does under older versions of transformers: experts, weights, logits."""

    class Reversed(torch.nn.Module):
        def forward(self, hidden_ND: Tensor) -> tuple[Tensor, ...]:
            return router(hidden_ND)[::-1]

    router = next(iter(grafted_model("granitemoe").routers().values()))
    hidden_ND = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    survivors_CS = torch.tensor([[0, 2], [3, 1]])
    found, expected = (surviving_weights(asked, hidden_ND, NUM_EXPERTS, survivors_CS) for asked in (Reversed(), router))
    torch.testing.assert_close(found, expected)
