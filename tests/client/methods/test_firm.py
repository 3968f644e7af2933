"""FIRM at a site: the step it takes, what of it leaves the site, and its special cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.federation import simulated
from client.alignment.experience import gather
from client.alignment.min_norm import min_norm_weights, normalised_gram, positive_part
from client.alignment.reward_models import named_rewards
from client.alignment.reward_training import train_head
from client.base_model import base_model_loads
from client.evaluation.examination import examine
from client.evaluation.measured import BASE, GLOBAL
from client.local_rule import Step
from client.methods.firm import Firm, InClientAlignment
from client.model import adapted_model
from client.private import under
from client.text import Example
from conf.alignment import Estimator, FirmConfig, Gram, Regulariser
from conf.compose import load_config
from conf.model import LoraConfig
from conf.schema import DataConfig, Template
from tests.client.local_training import live_copies
from tests.client.test_site import TRAIN, assert_same, first_global, make_site, noisy, settings_for
from tests.client.tiny_models import save_tiny_base

DATA = DataConfig(template=Template.plain, max_length=40)


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")


@pytest.fixture(scope="module")
def adapted(base_config):
    return adapted_model(base_config, LoraConfig(rank=2), torch.device("cpu"))


def firm(**settings):
    """Two rewards, two completions of at most six tokens a prompt."""
    return FirmConfig(**{"rewards": ["length", "format"], "group_size": 2, "max_new_tokens": 6, **settings})


def site_with(base_config, folder, method, **train_settings):
    config = settings_for(base_config, method, **{"max_steps": 2, **train_settings})
    return make_site(replace(config, data=DATA), folder)


def gradients_of(adapted, config, *, num_prompts=2, micro_batch=4, seed=0, steps=1, private=None, last_mask=None):
    """What ``steps`` steps without an optimiser leave in the parameters, flattened, and the rule.

    ``last_mask`` is that of a pass that was made before.
    """
    adapted.load_adapter(noisy(adapted.initial_adapter(0), seed=3))
    prompts = Firm(config).encode(TRAIN[:num_prompts], adapted.tokenizer, DATA)
    rule = InClientAlignment(config, named_rewards(config.rewards, adapted, {}), private or {})
    parameters = adapted.parameters_by_name()
    torch.manual_seed(seed)
    with adapted.count_expert_tokens() as counter:
        if last_mask is not None:
            counter.set_mask(last_mask)
        step = Step(chosen=prompts, adapted=adapted, counter=counter, micro_batch=micro_batch, loss_scale=1.0)
        for _ in range(steps):
            for parameter in parameters.values():
                parameter.grad = None
            rule.accumulate(step)
    found = torch.cat([parameter.grad.flatten() for parameter in parameters.values()]).double().numpy()
    for parameter in parameters.values():
        parameter.grad = None
    return found, rule


def naive_gradient(adapted, config, preference, completions):
    """Of GRPO's loss of the weighted advantages over some of four completions: a loop over them and their tokens."""
    torch.manual_seed(0)
    experience = gather(
        adapted, Firm(config).encode(TRAIN[:2], adapted.tokenizer, DATA), named_rewards(config.rewards, adapted, {}),
        per_prompt=2, max_new_tokens=6, temperature=1.0, batch_size=4,
    )  # fmt: skip
    rewards, total = experience.rewards_NM, torch.zeros(())
    adapted.model.train()
    for index in completions:
        sequence = experience.rollout.sequences[index]
        group = rewards[index // 2 * 2 : index // 2 * 2 + 2]
        advantages = (rewards[index] - group.mean(0)) / (group.std(0) + 1e-6)
        logits = adapted.model(input_ids=torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
        first = len(sequence.input_ids) - sequence.num_targets
        for token, place in enumerate(range(first, len(sequence.input_ids))):
            log_p = logits[place - 1, sequence.input_ids[place]]
            log_ratio = experience.reference_log_p[index][token] - log_p
            surrogate = (log_p - log_p.detach()).exp() * float(np.dot(preference, advantages))
            total = total - surrogate + config.kl * (log_ratio.exp() - log_ratio - 1)
    naive = torch.autograd.grad(total / experience.num_tokens, [*adapted.parameters_by_name().values()])
    return torch.cat([gradient.flatten() for gradient in naive]).double().numpy()


def test_the_step_is_that_on_the_weighted_loss(adapted):
    preference = [0.7, 0.3]
    config = firm(beta=math.inf, preference=preference, kl=0.3)
    found, _ = gradients_of(adapted, config)
    expected = naive_gradient(adapted, config, preference, range(4))
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_halves_weigh_by_what_two_prompts_have_in_common_and_step_along_all(adapted):
    config = firm(beta=0.3, kl=0.3, gram=Gram.halves)
    found, rule = gradients_of(adapted, config)
    one, two = (
        np.stack([naive_gradient(adapted, config, preference, half) for preference in np.eye(2)])
        for half in ([0, 1], [2, 3])
    )
    gram = positive_part(2 * (one @ two.T + two @ one.T))
    weights = min_norm_weights(normalised_gram(gram), regulariser="anchor", beta=0.3)
    np.testing.assert_allclose(rule.to_keep()["firm/weights"], weights, atol=1e-4)
    expected = weights @ (one + two)
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    _, of_whole = gradients_of(adapted, firm(beta=0.3, kl=0.3))
    assert abs(of_whole.to_keep()["firm/weights"] - weights).max() > 1e-3


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_halves_are_the_same_in_whatever_passes(adapted, micro_batch):
    whole, one = gradients_of(adapted, firm(beta=0.3, gram=Gram.halves), micro_batch=4)
    parts, other = gradients_of(adapted, firm(beta=0.3, gram=Gram.halves), micro_batch=micro_batch)
    np.testing.assert_allclose(parts, whole, atol=1e-5 * np.abs(whole).max())
    np.testing.assert_allclose(other.to_keep()["firm/weights"], one.to_keep()["firm/weights"], atol=1e-4)


def test_passes_are_whole_rollouts_and_make_room_for_each_objectives_gradients(adapted):
    """Four of two objectives and two halves, and the one that is being made."""
    prompts = Firm(firm()).encode(TRAIN[:2], adapted.tokenizer, DATA)
    passes = Firm(firm(gram=Gram.halves)).passes_over(prompts)
    assert [len(sequence.input_ids) for sequence in passes.sequences] == [len(p.prompt_ids) + 6 for p in prompts] * 2
    assert (passes.of_step(batch_size=1), passes.kept_gradients, passes.are_sampled) == (2, 5, True)
    assert Firm(firm()).passes_over(prompts).kept_gradients == 3


def test_a_single_prompt_has_no_halves(adapted):
    """As the last of an epoch may be: its step is that of the whole."""
    halves, _ = gradients_of(adapted, firm(beta=0.3, gram=Gram.halves), num_prompts=1)
    whole, _ = gradients_of(adapted, firm(beta=0.3), num_prompts=1)
    np.testing.assert_array_equal(halves, whole)


@pytest.mark.parametrize("estimator", Estimator)
def test_fixed_weights_combine_the_objectives_gradients_and_mgda_finds_a_common_direction(adapted, estimator):
    """beta = inf is linear scalarisation: linear in the preference. beta = 0 is MGDA: the least combination d of
    the gradients g, of which every g has at least its own length along it, <g_j, d> >= ||d||^2."""
    settings = {"estimator": estimator, "kl": 0.1}
    one, two, mixed = (
        gradients_of(adapted, firm(beta=math.inf, preference=preference, **settings))[0]
        for preference in ([1.0, 0.0], [0.0, 1.0], [0.3, 0.7])
    )
    np.testing.assert_allclose(mixed, 0.3 * one + 0.7 * two, atol=1e-6 * np.abs(one).max() + 1e-8)
    least, rule = gradients_of(adapted, firm(beta=0.0, **settings))
    gram = np.array([[one @ one, one @ two], [one @ two, two @ two]])
    weights = min_norm_weights(normalised_gram(gram), regulariser="anchor", beta=0.0)
    np.testing.assert_allclose(rule.to_keep()["firm/weights"], weights, atol=1e-4)
    for gradient in (one, two):
        assert gradient @ least >= least @ least * (1 - 1e-3)


def test_micro_batches_change_no_gradient(adapted):
    whole, _ = gradients_of(adapted, firm(), micro_batch=4)
    parts, _ = gradients_of(adapted, firm(), micro_batch=1)
    np.testing.assert_allclose(parts, whole, atol=1e-5 * np.abs(whole).max())


def test_sampling_does_not_take_the_last_passs_padding_for_its_own(adapted):
    first, _ = gradients_of(adapted, firm())
    later, _ = gradients_of(adapted, firm(), last_mask=torch.arange(40).reshape(2, 20) % 3 > 0)
    np.testing.assert_array_equal(first, later)


def test_a_rollout_serves_several_steps_and_weights_are_smoothed(adapted):
    """lambda goes a fourth of the way to what each step finds, from where the last round left it."""
    _, first = gradients_of(adapted, firm(beta=1.0))
    private = {"firm/weights": np.array([1.0, 0.0])}
    _, smoothed = gradients_of(adapted, firm(beta=1.0, rho=0.25), private=private)
    found, kept = first.to_keep()["firm/weights"], smoothed.to_keep()["firm/weights"]
    np.testing.assert_allclose(kept, 0.75 * private["firm/weights"] + 0.25 * found, rtol=1e-6)
    torch.manual_seed(0)
    once, _ = gradients_of(adapted, firm(steps_per_rollout=2))
    twice, _ = gradients_of(adapted, firm(steps_per_rollout=2), steps=2)
    np.testing.assert_array_equal(once, twice)  # the adapter did not move, and the completions are the same
    anew, _ = gradients_of(adapted, firm(steps_per_rollout=1), steps=2)
    assert not np.allclose(anew, once)


@pytest.mark.parametrize("estimator", Estimator)
def test_only_the_adapter_leaves_the_site(base_config, tmp_path, estimator):
    """Lambda and value heads go into the private store; the messages' types have no field for them."""
    site = site_with(base_config, tmp_path, firm(estimator=estimator))
    update = site.train(1, first_global(site))
    assert update.adapter.keys() == site.adapted.parameters_by_name().keys()
    assert update.extras == {}
    private = site.store.load()
    assert private.pop("firm/weights").sum() == pytest.approx(1)
    assert under("firm/critic/", private).keys() == ({"weight", "bias"} if estimator is Estimator.ppo else set())
    assert {"reward/length", "reward/format", "kl", "completion_tokens"} < update.metrics.keys()
    assert not any(name.startswith("lambda/") for name in update.metrics)
    for values in update.adapter.values():
        assert all(values.shape != kept.shape or not np.array_equal(values, kept) for kept in private.values())


def test_weights_are_among_the_metrics_only_if_asked(base_config, tmp_path):
    site = site_with(base_config, tmp_path, firm(send_weights=True))
    metrics = site.train(1, first_global(site)).metrics
    assert metrics["lambda/length"] + metrics["lambda/format"] == pytest.approx(1)


def test_a_round_asked_for_again_is_the_same_and_the_next_goes_on(base_config, tmp_path):
    site = site_with(base_config, tmp_path, firm(estimator=Estimator.ppo))
    first = site.train(1, first_global(site))
    assert_same(site.train(1, first_global(site)).adapter, first.adapter)
    kept = site.store.load()
    site.train(2, first.adapter)
    assert not np.array_equal(site.store.load()["firm/critic/weight"], kept["firm/critic/weight"])


def test_loss_reported_is_kl_less_the_preferred_rewards(base_config, tmp_path):
    site = site_with(base_config, tmp_path, firm(preference=[0.9, 0.1], kl=0.5), max_steps=1)
    metrics = site.train(1, noisy(first_global(site), seed=0)).metrics
    expected = 0.5 * metrics["kl"] - 0.9 * metrics["reward/length"] - 0.1 * metrics["reward/format"]
    assert metrics["train_loss"] == pytest.approx(expected)
    assert metrics["kl"] > 0


def test_held_out_rewards_are_measured_with_the_same_draws(base_config, tmp_path):
    site = site_with(base_config, tmp_path, firm(eval_prompts=2))
    adapter = noisy(first_global(site), seed=0)
    found = site.evaluate(adapter)["here"]
    assert found.metrics.keys() == {
        "held_out_reward/length", "held_out_reward/format", "held_out_kl", "held_out_completion_tokens",
    }  # fmt: skip
    torch.rand(1)
    assert site.evaluate(adapter)["here"] == found
    assert site.evaluate(first_global(site))["here"].metrics["held_out_kl"] == pytest.approx(0, abs=1e-6)
    assert site_with(base_config, tmp_path, firm(eval_prompts=0)).evaluate(adapter)["here"].metrics == {}


def test_in_the_evaluation_matrix_the_model_in_use_is_the_global_one(base_config, tmp_path):
    site = site_with(base_config, tmp_path, firm())
    received = first_global(site)
    assert {scored.model for scored in examine(site, received, received).scores} == {BASE, GLOBAL}


def test_expert_tokens_are_those_of_the_passes_that_train(base_config, tmp_path):
    """Neither sampling nor the reference counts: tokens times experts per token of prompts and completions."""
    site = site_with(base_config, tmp_path, firm(), max_steps=1)
    update = site.train(1, first_global(site))
    config, adapted = site.method.config, site.adapted
    completions = update.metrics["completion_tokens"] * config.group_size * site.config.train.batch_size
    assert update.metrics["num_tokens"] == pytest.approx(completions)
    assert update.metrics["micro_batch"] == config.group_size * site.config.train.batch_size  # the rollout in one pass
    prompts = [len(prompt.prompt_ids) for prompt in site.method.encode(TRAIN, adapted.tokenizer, DATA)]
    (tokens, *others) = (counts.sum() / adapted.experts_per_token for counts in update.expert_tokens.values())
    assert set(others) == {tokens}
    assert 2 * config.group_size * min(prompts) <= tokens - completions <= 2 * config.group_size * max(prompts)


def test_one_base_model_serves_policy_reference_reward_and_critic(base_config, tmp_path):
    """Looked at in every pass: of writing, of the reference, of a reward head, of the critic and of training."""
    site = site_with(
        base_config, tmp_path, firm(rewards=[f"loud:{tmp_path / 'head'}", "length"], estimator=Estimator.ppo)
    )
    adapted = site.adapted
    loud = [Example(f"Say {word}.", "", f"{word}!!!", f"no {word}") for word in ("sun", "tree", "road", "door")]
    train_head(adapted, loud, {}, objective="loud", data=DATA, penalty=0.1).save(tmp_path / "head")
    weight = max(adapted.base.model.parameters(), key=torch.Tensor.numel)
    copies = []
    embedding = adapted.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *_: copies.append(live_copies(weight)))
    before, loads = live_copies(weight), base_model_loads()
    site.train(1, first_global(site))
    handle.remove()
    assert len(copies) > 10
    assert set(copies) == {before}
    assert base_model_loads() == loads
    assert live_copies(weight.detach().clone()) == before + 1


def test_a_reward_that_fails_ends_the_round_by_name(base_config, tmp_path):
    site = site_with(base_config, tmp_path, firm(rewards=["length", "kindness"], regulariser=Regulariser.ridge))
    with pytest.raises(ValueError, match=r"method.rewards: 'kindness' is none of \['brevity', "):
        site.train(1, first_global(site))
    assert site.store.load() == {}


@pytest.mark.slow
def test_rounds_of_a_federation_raise_held_out_rewards(tmp_path):
    """tiny_moe and two programmatic rewards: after two rounds one is much higher and the other has not paid for it."""
    config = load_config(
        "strategy=firm partition=iid partition.num_sites=2 data.num_examples=80 rounds=2 train.max_steps=6 "
        "train.batch_size=4 train.learning_rate=2e-2 method.rewards=[length,format] method.group_size=6 method.kl=0.01 "
        "method.max_new_tokens=12 method.temperature=1.5 method.beta=1 method.eval_prompts=16"
    )
    federation = simulated(config, tmp_path)

    def held_out():
        found = [site.evaluate(federation.received(name))[name].metrics for name, site in federation.sites.items()]
        return {name: np.mean([metrics[name] for metrics in found]) for name in found[0]}

    before = held_out()
    assert len(list(federation.rounds())) == config.rounds
    after = held_out()
    assert after["held_out_reward/length"] > 1.5 * before["held_out_reward/length"]
    assert after["held_out_reward/format"] > before["held_out_reward/format"] - 0.02
    assert before["held_out_kl"] == pytest.approx(0, abs=1e-6) != after["held_out_kl"]
