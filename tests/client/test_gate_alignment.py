"""Routing statistics and the alignment term: against loops over tokens, and in the real loop of a tiny model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.gate_alignment import GateAlignment, RoutingStatistics, Target, divergence, log_probabilities
from client.model import AdaptedModel
from client.text import collate
from conf.methods import RoutingProbability
from conf.model import ExpertTraining, LoraConfig, RouterTraining
from strategies.fedalign_moe import MARGIN, PROBABILITY, SEMANTICS
from tests.client.local_training import distance, eight_sequences, noisy, run
from tests.client.tiny_models import NUM_EXPERTS, TOP_K, save_tiny_base

CPU = torch.device("cpu")
PRIVATE = "fedalign_moe/"


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")


@pytest.fixture(scope="module")
def adapted(base_config):
    config = replace(base_config, router=RouterTraining.local)
    return AdaptedModel(load_base(config, CPU), config, LoraConfig(rank=2))


@pytest.fixture
def start(adapted):
    return noisy(adapted.initial_adapter(0))


def router_of(weight, *, bias=False):
    router = torch.nn.Linear(weight.shape[1], weight.shape[0], bias).requires_grad_(requires_grad=False)
    router.weight.copy_(torch.tensor(weight))
    return router


def some_target():
    return Target(torch.tensor([0.7, 0.1, 0.15, 0.05]), torch.tensor([0.5, 0.4, 0.6, 0.3]))


def naive_divergence(logits, target, num_chosen, num_selected):
    """Eq. 11 for one token, term by term, with p over the ``num_selected`` largest."""
    selected = {int(e) for e in np.argsort(logits)[-num_selected:]}
    total = sum(math.exp(logits[e]) for e in selected)
    p = {e: math.exp(logits[e]) / total for e in selected}
    reference, weight = target.reference_E.tolist(), target.weight_E.tolist()
    chosen = {int(e) for e in [*np.argsort(logits)[-num_chosen:], *np.argsort(reference)[-num_chosen:]]}
    return sum(weight[e] * p[e] * math.log(p[e] / reference[e]) for e in chosen & selected)


def identity():
    """A router whose logits are what it is given."""
    return router_of(np.eye(4, dtype=np.float32))


@pytest.mark.parametrize("is_selected", [False, True])
@pytest.mark.parametrize("num_chosen", [1, 2, 4])
def test_divergence_is_the_naive_one(num_chosen, is_selected):
    logits_NE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    log_p_NE = log_probabilities(logits_NE, identity(), num_chosen if is_selected else None)
    found = divergence(log_p_NE, some_target(), num_chosen)
    num_selected = num_chosen if is_selected else 4
    expected = [naive_divergence(row, some_target(), num_chosen, num_selected) for row in logits_NE.tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_over_the_selected_probabilities_are_the_routers_weights_made_to_sum_to_1():
    """And over all of them they are what they are over all."""
    logits_NE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    everyone_NE = logits_NE.softmax(dim=1)
    largest_N2, expert_N2 = everyone_NE.topk(2, dim=1)
    expected_NE = torch.zeros(6, 4).scatter_(1, expert_N2, largest_N2 / largest_N2.sum(dim=1, keepdim=True))
    np.testing.assert_allclose(log_probabilities(logits_NE, identity(), 2).exp(), expected_NE, rtol=1e-5)
    np.testing.assert_allclose(log_probabilities(logits_NE, identity(), 4).exp(), everyone_NE, rtol=1e-6)


def test_over_all_experts_it_is_least_where_the_routing_is_the_reference():
    """With equal weights and every expert chosen it is half the Kullback-Leibler divergence: 0 there, else above."""
    reference = torch.tensor([0.7, 0.1, 0.15, 0.05])
    target = Target(reference, torch.full((4,), 0.5))
    assert divergence(reference.log()[None], target, 4).abs().item() < 1e-6
    others_NE = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).log_softmax(dim=1)
    assert (divergence(others_NE, target, 4) > 0).all()


def test_a_reference_of_zero_costs_much_and_not_infinitely():
    found = divergence(torch.zeros(1, 4).log_softmax(dim=1), Target(torch.tensor([1.0, 0, 0, 0]), torch.ones(4)), 2)
    assert 0 < found.item() < 20


def logit_gradient(num_selected, num_chosen):
    logits_NE = torch.tensor([[0.1, 0.2, 0.3, 0.0]], requires_grad=True)
    log_p_NE = log_probabilities(logits_NE, identity(), num_selected)
    divergence(log_p_NE, some_target(), num_chosen).sum().backward()
    return logits_NE.grad[0]


def test_top_1_routing_has_a_gradient_over_all_experts_and_none_over_the_one():
    assert logit_gradient(None, 1).abs().max() > 0.01
    assert logit_gradient(1, 1).tolist() == [0.0] * 4


def test_over_the_selected_the_others_have_no_gradient():
    found = logit_gradient(2, 2)
    assert found.isfinite().all()
    assert found[1:3].abs().min() > 0.01
    assert found[[0, 3]].tolist() == [0.0, 0.0]


def test_statistics_by_hand():
    """Two tokens with probabilities (.5, .3, .2) and (.1, .2, .7): margins .2 for expert 0 and .5 for expert 2."""
    statistics = RoutingStatistics(router_of(np.zeros((3, 2), np.float32)))
    for p, hidden in (((0.5, 0.3, 0.2), (1.0, 2.0)), ((0.1, 0.2, 0.7), (4.0, 6.0))):
        statistics.add(torch.tensor([p]), torch.tensor([hidden]))
    found = statistics.arrays()
    np.testing.assert_allclose(found[PROBABILITY], [0.3, 0.25, 0.45], rtol=1e-6)
    np.testing.assert_allclose(found[MARGIN], [0.1, 0, 0.25], rtol=1e-6)
    np.testing.assert_allclose(found[SEMANTICS], [[1, 2], [0, 0], [4, 6]], rtol=1e-6)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}


def aligned(adapted, targets=None, strength=0.1):
    over_all = {"keep_under": PRIVATE, "probability": RoutingProbability.all}
    return GateAlignment(adapted.routers(), adapted.experts_per_token, targets or {}, strength, **over_all)


def targets_for(adapted):
    return dict.fromkeys(adapted.layers, some_target())


def measured(adapted, start, sequences, targets=None, **settings):
    """Statistics of an epoch in which the adapter stays where it is."""
    rule = aligned(adapted, targets)
    run(adapted, sequences, start, rule=rule, learning_rate=1e-12, **settings)
    return rule


def test_statistics_are_those_of_the_routers_own_outputs(adapted, start):
    """Token by token from the logits that transformers' router returns, without padding or any code of ours."""
    sequences = eight_sequences()
    found = measured(adapted, start, sequences).to_send()
    adapted.load_adapter(start)
    for layer, router in adapted.routers().items():
        caught = []
        handle = router.register_forward_hook(
            lambda module, given, returned, to=caught: to.append((given[0], returned[0]))
        )
        for sequence in sequences:
            adapted.model(input_ids=torch.tensor([sequence.input_ids]))
        handle.remove()
        rows = [
            (h, z.softmax(0))
            for hidden, logits in caught
            for h, z in zip(hidden.detach(), logits.detach(), strict=True)
        ]
        probability, margin, mean = np.zeros(NUM_EXPERTS), np.zeros(NUM_EXPERTS), [[] for _ in range(NUM_EXPERTS)]
        for hidden, p in rows:
            e = int(p.argmax())
            probability += p.numpy() / len(rows)
            margin[e] += float(p[e] - max(p[other] for other in range(NUM_EXPERTS) if other != e)) / len(rows)
            mean[e].append(hidden.numpy())
        np.testing.assert_allclose(found[PROBABILITY + layer], probability, rtol=1e-4)
        np.testing.assert_allclose(found[MARGIN + layer], margin, rtol=1e-4, atol=1e-7)
        for e in range(NUM_EXPERTS):
            expected = np.mean(mean[e], axis=0) if mean[e] else 0.0
            np.testing.assert_allclose(found[SEMANTICS + layer][e], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [{"micro_batch": 1}, {"gradient_checkpointing": True}], ids=str)
def test_dividing_a_batch_and_computing_layers_twice_change_nothing(adapted, start, settings):
    """The term is a mean over the step's real tokens, each measured once."""
    sequences, results = eight_sequences(), []
    for changed in ({}, settings):
        rule = aligned(adapted, targets_for(adapted), strength=1.0)
        results.append((run(adapted, sequences, start, rule=rule, **changed).adapter, rule.to_send()))
    (adapter, sent), (other_adapter, other_sent) = results
    assert distance(adapter, other_adapter) < 1e-4
    for name in sent:
        np.testing.assert_allclose(other_sent[name], sent[name], atol=1e-4, err_msg=name)


def mean_divergence(adapted, adapter, sequences):
    adapted.load_adapter(adapter)
    rule = aligned(adapted, targets_for(adapted), strength=1.0)
    batch = collate(sequences, adapted.tokenizer.pad_token_id)
    with torch.no_grad(), rule.watching():
        rule.begin_pass(batch["token_mask"])
        adapted.model(batch["input_ids"], attention_mask=batch["attention_mask"])
        return float(rule.penalty()) / int(batch["token_mask"].sum())


def test_the_term_pulls_routing_towards_the_reference(adapted, start):
    sequences = eight_sequences()
    before = mean_divergence(adapted, start, sequences)
    after = [
        mean_divergence(
            adapted,
            run(adapted, sequences, start, rule=aligned(adapted, targets_for(adapted), strength), max_steps=12).adapter,
            sequences,
        )
        for strength in (0.0, 10.0)
    ]
    assert after[1] < before - 0.05
    assert after[1] < after[0] - 0.05


def test_gradient_is_that_of_the_written_loss(adapted, start):
    """By finite differences along a random direction of the last router; another choice of experts would be a jump."""
    sequences = eight_sequences()[:3]
    *_, name = (name for name in start if name.endswith("gate.weight"))
    direction = np.random.default_rng(0).normal(size=start[name].shape).astype(np.float32)
    values = []
    for sign in (1, -1):
        moved = {**start, name: start[name] + np.float32(sign * 1e-3) * direction}
        values.append(mean_divergence(adapted, moved, sequences))
    adapted.load_adapter(start)
    rule = aligned(adapted, targets_for(adapted), strength=1.0)
    batch = collate(sequences, adapted.tokenizer.pad_token_id)
    parameter = adapted.parameters_by_name()[name]
    with rule.watching():
        rule.begin_pass(batch["token_mask"])
        adapted.model(batch["input_ids"], attention_mask=batch["attention_mask"])
        (gradient,) = torch.autograd.grad(rule.penalty() / int(batch["token_mask"].sum()), parameter)
    along = float((gradient.numpy() * direction).sum())
    assert along == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.02)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("experts", [ExpertTraining.lora, ExpertTraining.full])
def test_every_checked_family_is_measured(tmp_path, family, experts):
    config = replace(save_tiny_base(tmp_path, family), experts=experts, router=RouterTraining.local)
    adapted = AdaptedModel(load_base(config, CPU), config, LoraConfig(rank=2))
    rule = aligned(adapted, targets_for(adapted))
    result = run(adapted, eight_sequences(), noisy(adapted.initial_adapter(0)), rule=rule, max_steps=1)
    sent = rule.to_send()
    assert adapted.experts_per_token == TOP_K
    assert sent.keys() == {kind + layer for kind in (PROBABILITY, MARGIN, SEMANTICS) for layer in adapted.layers}
    for layer in adapted.layers:
        assert sent[PROBABILITY + layer].sum() == pytest.approx(1, rel=1e-5)
        assert result.expert_tokens[layer].sum() > 0
    assert rule.to_keep().keys() == {f"{PRIVATE}{PROBABILITY}{layer}" for layer in adapted.layers}


def test_logits_count_a_routers_bias():
    router = router_of(np.float32([[1, 0], [0, 2]]), bias=True)
    router.bias.copy_(torch.tensor([0.5, -0.5]))
    found = log_probabilities(torch.tensor([[1.0, 1.0]]), router)
    np.testing.assert_allclose(found, torch.tensor([[1.5, 1.5]]).log_softmax(dim=1), rtol=1e-6)
