"""Accuracy by label words, and the models it is measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import ParamWrapper

from benchmarks import measures
from benchmarks.federation import simulated
from benchmarks.measures import Judge, expert_norm, label_log_p, label_scores, mixed_label_log_p
from benchmarks.word_base import word_tokenizer
from client.assemble import held_out_sets
from client.base_model import BaseModel
from client.bases import BaseIdentity
from client.mixed_prediction import Gate, Mixture
from client.model import AdaptedModel
from client.text import Example, TokenSequence, encode
from conf.compose import load_config
from conf.model import LoraConfig, ModelConfig
from conf.schema import DataConfig, Template
from tests.client.local_training import noisy
from tests.client.tiny_models import save_tiny_base, tiny_model

WORDS = ["red", "green", "blue", "a", "colour", "of", "sky", "grass", "?"]
PLAIN = DataConfig(template=Template.plain)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    tokenizer = word_tokenizer(WORDS)
    model = tiny_model("olmoe", vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    identity = BaseIdentity("tiny", "tiny", "0", tmp_path_factory.mktemp("base"))
    return AdaptedModel(BaseModel(model, tokenizer, identity), ModelConfig(), LoraConfig(rank=2))


EXAMPLES = {
    "north": [Example("colour of sky?", "", "blue"), Example("colour of grass, a colour?", "", "green")],
    "south": [Example("colour?", "", "red")],
}


def test_label_scores_are_those_of_the_model_called_on_one_prompt_at_a_time(adapted):
    adapter = adapted.initial_adapter(0)
    examples = [example for site in EXAMPLES.values() for example in site]
    labels = torch.tensor(adapted.tokenizer.convert_tokens_to_ids(["red", "green", "blue"]))
    sequences = encode(examples, adapted.tokenizer, PLAIN)
    nll, is_right = label_scores(label_log_p(adapted, adapter, sequences, labels)[0], sequences, labels)
    for index, example in enumerate(examples):
        prompt = adapted.tokenizer(f"{example.prompt}\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_V = adapted.base.model(prompt).logits[0, -1].log_softmax(-1)
        answer = adapted.tokenizer.convert_tokens_to_ids(example.response)
        assert nll[index] == pytest.approx(-log_V[answer].item(), rel=1e-4)
        assert is_right[index] == (int(log_V[labels].argmax()) == labels.tolist().index(answer))


def test_mixed_label_scores_are_the_gated_sum_of_two_models_probabilities(adapted):
    """One prompt at a time, of either adapter; the gate's own formula, of the global model's last hidden state."""
    start = adapted.initial_adapter(0)
    adapters = [noisy(start, seed=1), noisy(start, seed=2)]
    examples = [example for site in EXAMPLES.values() for example in site]
    labels = torch.tensor(adapted.tokenizer.convert_tokens_to_ids(["red", "green", "blue"]))
    gate = Gate(torch.randn(20, 16, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        gate.weight_D.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    mixture = Mixture(*adapters, gate)
    found = mixed_label_log_p(adapted, mixture, encode(examples, adapted.tokenizer, PLAIN), labels)
    for index, example in enumerate(examples):
        prompt = adapted.tokenizer(f"{example.prompt}\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
        probabilities = []
        for adapter in adapters:
            adapted.load_adapter(adapter)
            with torch.no_grad():
                output = adapted.model(input_ids=prompt, output_hidden_states=True)
            probabilities.append(output.logits[0, -1].softmax(-1)[labels])
        hidden = output.hidden_states[-1][0, -1]
        with torch.no_grad():
            share = torch.sigmoid((hidden - gate.mean_D) * gate.scale_D @ gate.weight_D + gate.bias)
        assert 0.01 < share < 0.99
        expected = share * probabilities[0] + (1 - share) * probabilities[1]
        torch.testing.assert_close(found[index].exp(), expected, rtol=1e-4, atol=1e-7)


def test_score_is_over_examples_and_sites_apart(adapted):
    judge = Judge(adapted, load_config("data.template=plain"), EXAMPLES, ["red", "green", "blue"])
    score = judge.score_of(adapted.initial_adapter(0))
    assert score.accuracy == pytest.approx((2 * score.sites["north"] + score.sites["south"]) / 3)


def test_a_label_of_two_tokens_is_refused(adapted):
    with pytest.raises(ValueError, match="'sky blue' must be one token"):
        Judge(adapted, load_config("data.template=plain"), EXAMPLES, ["sky blue"])


def test_where_one_holds_all_data_its_model_answers_for_every_site(tmp_path, monkeypatch):
    base = save_tiny_base(tmp_path / "base", "olmoe")
    config = load_config([
        "strategy=centralised", "data.num_examples=40", "train.max_steps=1", "rounds=1", f"model.name={base.name}",
        "model.source=hub", "data.template=plain", "device=cpu", "eval.num_answers=1", "eval.max_new_tokens=2",
    ])  # fmt: skip
    federation = simulated(config, tmp_path / "private")
    judge = Judge(federation.adapted, config, held_out_sets(config), [])
    federation.play()
    asked = []

    def counted(in_use, examples, *_):
        asked.append(examples)
        return (len(asked),)

    monkeypatch.setattr(measures, "answered", counted)
    assert judge.rouge_l(federation) == np.mean(range(1, len(judge.examples) + 1))
    assert asked == [*judge.examples.values()]
    assert len(federation.sites) == 1 < len(asked)
    monkeypatch.undo()
    assert 0 <= judge.rouge_l(federation) <= 1


def test_without_a_global_model_each_site_is_judged_by_its_own(tmp_path):
    base = save_tiny_base(tmp_path / "base", "olmoe")
    config = load_config([
        "strategy=local_only", "data.num_examples=40", "train.max_steps=2", "train.learning_rate=0.1", "rounds=1",
        f"model.name={base.name}", "model.source=hub", "data.template=plain", "device=cpu",
    ])  # fmt: skip
    federation = simulated(config, tmp_path / "private")
    judge = Judge(federation.adapted, config, held_out_sets(config), [])
    before = judge.score(federation)
    federation.play()
    after = judge.score(federation)
    own = {name: site.adapter_in_use({}) for name, site in federation.sites.items()}
    assert after.sites == {name: judge.score_of(adapter).sites[name] for name, adapter in own.items()}
    assert after.loss == pytest.approx(np.mean([judge.score_of(adapter).loss for adapter in own.values()]))
    assert after != before


@pytest.fixture(scope="module")
def mixing(tmp_path_factory):
    """A federation by PFL-MoE after a round, and its judge; before that, nothing is mixed."""
    folder = tmp_path_factory.mktemp("pfl_moe")
    base = save_tiny_base(folder / "base", "olmoe")
    config = load_config([
        "strategy=pfl_moe", "data.num_examples=40", "train.max_steps=2", "train.learning_rate=0.1", "rounds=1",
        f"model.name={base.name}", "model.source=hub", "data.template=plain", "device=cpu",
    ])  # fmt: skip
    federation = simulated(config, folder / "private")
    judge = Judge(federation.adapted, config, held_out_sets(config), [])
    assert judge.score(federation).sites == pytest.approx(judge.score_of(federation.adapter).sites)
    federation.play()
    return federation, judge


def test_mixtures_are_scored_on_the_sites_own_data_and_the_global_model_on_all(mixing):
    federation, judge = mixing
    score, of_global = judge.score(federation), judge.score_of(federation.adapter)
    assert score.loss == of_global.loss
    for name, site in federation.sites.items():
        assert score.sites[name] == site.in_use(federation.adapter).loss(judge.test[name]).loss
        assert score.sites[name] != pytest.approx(of_global.sites[name], rel=1e-3)


def test_a_mixtures_choice_is_the_label_that_costs_it_least(mixing):
    """By the loss of every label at every example, each a sequence of its own, as the method itself measures it."""
    federation, _ = mixing
    adapted, labels = federation.adapted, ["a", "b", "c"]
    examples = {
        name: [Example(f"{name} {count}", "", labels[count % 3]) for count in range(5)] for name in federation.sites
    }
    judge = Judge(adapted, federation.config, examples, labels)
    score = judge.score(federation)
    for name, site in federation.sites.items():
        loss = site.in_use(federation.adapter).loss
        right = []
        for sequence in judge.test[name]:
            place = next(place for place, label in enumerate(sequence.labels) if label >= 0)
            ids = [[*sequence.input_ids[:place], label] for label in judge.label_ids.tolist()]
            costs = [loss([TokenSequence(own, [-100] * place + own[-1:], [len(own)])]).loss for own in ids]
            right.append(ids[int(np.argmin(costs))][-1] == sequence.input_ids[place])
        assert score.sites[name] == np.mean(right)


def test_expert_norm_is_the_mean_length(adapted):
    """Two experts of lengths 5 and 0: 2.5; attention is left out."""
    adapter = {
        "model.layers.0.mlp.experts.down_proj": np.array([[3.0, 4.0], [0.0, 0.0]]),
        "model.layers.0.self_attn.q_proj.lora_A": np.ones((9, 9)),
        "model.layers.0.self_attn.q_proj.lora_B": np.ones((9, 9)),
    }
    assert expert_norm(adapter, adapted, LoraConfig()) == 2.5


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_expert_norm_by_lora_is_of_the_weights_that_peft_computes_with(family):
    """PEFT's own change of each fused weight, which GPT-OSS holds transposed; at the start the base's weights alone."""
    lora = LoraConfig(rank=3, alpha=12.0)
    model = tiny_model(family)
    identity = BaseIdentity("tiny", "tiny", "0", Path("tiny"))
    adapted = AdaptedModel(BaseModel(model, word_tokenizer(WORDS), identity), ModelConfig(), lora)
    adapter = noisy(adapted.initial_adapter(0))
    adapted.load_adapter(adapter)
    layers = {layer: np.zeros(count) for layer, count in adapted.layers.items()}
    frozen = {layer: np.zeros(count) for layer, count in adapted.layers.items()}
    for path, module in adapted.model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            layer = path.partition(".experts")[0]
            weight = tiny_model(family).get_parameter(f"{layer}.experts.{module.parameter_name}").detach()
            whole = weight + module.get_delta_weight("default").detach()
            layers[layer] += whole.double().square().sum(dim=(1, 2)).numpy()
            frozen[layer] += weight.double().square().sum(dim=(1, 2)).numpy()
    of_weights, of_base = (np.mean([np.sqrt(squares).mean() for squares in of.values()]) for of in (layers, frozen))
    assert expert_norm(adapter, adapted, lora) == pytest.approx(of_weights, rel=1e-5)
    assert expert_norm(adapted.initial_adapter(0), adapted, lora) == pytest.approx(of_base, rel=1e-6)
    assert of_weights > 1.05 * of_base
