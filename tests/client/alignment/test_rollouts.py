"""Sampling, and what policy and reference say to what was sampled."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from client.alignment.rollouts import (
    reference_log_probabilities,
    sample,
    sampled_log_probabilities,
    token_log_probabilities,
)
from client.model import adapted_model
from client.prompts import prompt_sequences
from client.text import Example, collate
from conf.model import ExpertTraining, LoraConfig, RouterTraining
from conf.schema import DataConfig, Template
from tests.client.local_training import noisy
from tests.client.tiny_models import save_tiny_base

DATA = DataConfig(template=Template.plain, max_length=48)
EXAMPLES = [Example("Name a colour.", "", "red"), Example("A fruit, please.", "sweet", "plum"), Example("Go", "", "on")]
NEW_TOKENS = 5


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    config = save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")
    # Trained routers too: the reference has to take the base's own.
    return adapted_model(replace(config, router=RouterTraining.averaged), LoraConfig(rank=2), torch.device("cpu"))


@pytest.fixture(autouse=True)
def loaded(adapted):
    adapted.load_adapter(noisy(adapted.initial_adapter(0)))
    torch.manual_seed(0)


@pytest.fixture
def prompts(adapted):
    return prompt_sequences(EXAMPLES, adapted.tokenizer, DATA, NEW_TOKENS)


def rollout_of(adapted, prompts, temperature=1.0, per_prompt=2):
    return sample(adapted, prompts, per_prompt=per_prompt, max_new_tokens=NEW_TOKENS, temperature=temperature)


def batch_of(adapted, sequences):
    return collate(sequences, adapted.tokenizer.pad_token_id)


def test_each_prompts_completions_follow_one_another(adapted, prompts):
    rollout = rollout_of(adapted, prompts)
    assert rollout.prompts == [text for text in ("Name a colour.", "A fruit, please.\nsweet", "Go") for _ in range(2)]
    for index, sequence in enumerate(rollout.sequences):
        prompt = prompts[index // 2].prompt_ids
        assert sequence.input_ids[: len(prompt)] == prompt
        completion = sequence.input_ids[len(prompt) :]
        assert 1 <= len(completion) <= NEW_TOKENS
        assert sequence.num_targets == len(completion)
        assert adapted.tokenizer.decode(completion, skip_special_tokens=True) == rollout.completions[index]


def test_a_prompt_is_cut_to_leave_room_and_keeps_its_beginning(adapted):
    (long,) = prompt_sequences([Example("x" * 99 + "end", "", "red")], adapted.tokenizer, DATA, NEW_TOKENS)
    assert len(long.prompt_ids) == DATA.max_length - NEW_TOKENS
    assert long.prompt_ids[0] == adapted.tokenizer.bos_token_id
    assert adapted.tokenizer.decode(long.prompt_ids).endswith("end\n")


def test_the_same_seed_draws_the_same_and_another_one_does_not(adapted, prompts):
    drawn = [rollout_of(adapted, prompts).completions]
    for seed in (0, 1):
        torch.manual_seed(seed)
        drawn.append(rollout_of(adapted, prompts).completions)
    assert drawn[0] == drawn[1] != drawn[2]


def test_generation_settings_of_the_base_do_not_shape_what_is_sampled(adapted, prompts, monkeypatch):
    """Log-probabilities are judged without them, so samples must be drawn without them."""
    own = adapted.model.get_base_model().generation_config
    torch.manual_seed(0)
    plain = rollout_of(adapted, prompts).completions
    for name, value in {
        "min_p": 0.9, "typical_p": 0.1, "epsilon_cutoff": 0.5, "no_repeat_ngram_size": 1, "top_k": 1,
        "suppress_tokens": [*range(60)], "repetition_penalty": 9.0, "bad_words_ids": [[7], [8]], "num_beams": 2,
        "exponential_decay_length_penalty": (1, 9.0), "min_new_tokens": NEW_TOKENS,
    }.items():  # fmt: skip
        monkeypatch.setattr(own, name, value)
    torch.manual_seed(0)
    assert rollout_of(adapted, prompts).completions == plain


@pytest.mark.parametrize("use_cache", [True, False])
def test_every_token_but_the_first_is_read_by_itself(adapted, prompts, monkeypatch, use_cache):
    """With the KV cache of what stands before, whatever the base's own settings say."""
    monkeypatch.setattr(adapted.model.get_base_model().generation_config, "use_cache", use_cache)
    widths = []
    embedding = adapted.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0].shape[1]))
    rollout_of(adapted, prompts)
    handle.remove()
    assert widths == [max(len(prompt.prompt_ids) for prompt in prompts)] + [1] * (NEW_TOKENS - 1)


def test_at_a_low_temperature_each_token_is_the_likeliest(adapted, prompts):
    """One row at a time and without a cache, from the logits."""
    rollout = rollout_of(adapted, prompts, temperature=1e-4, per_prompt=1)
    adapted.model.eval()
    for prompt, sequence in zip(prompts, rollout.sequences, strict=True):
        for place in range(len(prompt.prompt_ids), len(sequence.input_ids)):
            with torch.no_grad():
                logits = adapted.model(input_ids=torch.tensor([sequence.input_ids[:place]])).logits[0, -1]
            assert sequence.input_ids[place] == int(logits.argmax())


def test_tokens_come_as_often_as_the_policy_says(adapted, prompts):
    """First tokens of 4000 completions: each of the likely ones within four standard deviations of its expectation."""
    num = 4000
    rollout = sample(adapted, prompts[2:], per_prompt=num, max_new_tokens=1, temperature=1.0)
    with torch.no_grad():
        ids = torch.tensor([prompts[2].prompt_ids])
        probabilities = adapted.model.eval()(input_ids=ids).logits[0, -1].softmax(0).numpy()
    counts = np.bincount([sequence.input_ids[-1] for sequence in rollout.sequences], minlength=len(probabilities))
    likely = probabilities > 0.005
    assert likely.sum() > 10
    deviation = np.sqrt(num * probabilities * (1 - probabilities))
    assert (np.abs(counts - num * probabilities)[likely] < 4 * deviation[likely]).all()


def test_log_probabilities_are_of_the_tempered_distribution_token_by_token(adapted, prompts):
    rollout = rollout_of(adapted, prompts)
    adapted.model.eval()
    with torch.no_grad():
        together = token_log_probabilities(adapted, batch_of(adapted, rollout.sequences), 2.0)
        alone = []
        for sequence in rollout.sequences:
            logits = adapted.model(input_ids=torch.tensor([sequence.input_ids])).logits[0] / 2.0
            first = len(sequence.input_ids) - sequence.num_targets
            alone += [
                logits[place - 1].log_softmax(0)[sequence.input_ids[place]]
                for place in range(first, len(sequence.input_ids))
            ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_states_are_those_that_the_tokens_were_predicted_from(adapted, prompts):
    batch = batch_of(adapted, rollout_of(adapted, prompts).sequences)
    log_p, hidden = sampled_log_probabilities(adapted, batch)
    ids = batch["input_ids"][:, 1:][batch["labels"][:, 1:] != -100]
    with torch.no_grad():
        ours = adapted.model.get_output_embeddings()(hidden).log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(ours, log_p, rtol=1e-4, atol=1e-5)


def test_reference_is_the_base_and_the_adapter_is_as_it_was(adapted, prompts):
    """Adapter off gives what the untouched base model says, and changes neither values nor what is trained."""
    batch = batch_of(adapted, rollout_of(adapted, prompts).sequences)
    before, trained = adapted.read_adapter(), {n: p.requires_grad for n, p in adapted.model.named_parameters()}
    policy, _ = sampled_log_probabilities(adapted, batch)
    reference = reference_log_probabilities(adapted, batch)
    again, _ = sampled_log_probabilities(adapted, batch)
    adapted.load_adapter(adapted.initial_adapter(0))
    initial, _ = sampled_log_probabilities(adapted, batch)
    torch.testing.assert_close(reference, initial, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(policy, reference, atol=1e-2)
    torch.testing.assert_close(again, policy, rtol=0, atol=0)
    for name, array in before.items():
        assert array.shape == adapted.read_adapter()[name].shape
    assert {name: parameter.requires_grad for name, parameter in adapted.model.named_parameters()} == trained


def test_without_adapter_leaves_frozen_what_was_frozen(tmp_path):
    """GPT-OSS's experts trained whole: their biases stay the base's, and PEFT would let them train from then on."""
    config = replace(save_tiny_base(tmp_path, "gpt_oss"), experts=ExpertTraining.full)
    adapted = adapted_model(config, LoraConfig(rank=2), torch.device("cpu"))
    trained = {name: parameter.requires_grad for name, parameter in adapted.model.named_parameters()}
    with adapted.without_adapter():
        pass
    assert {name: parameter.requires_grad for name, parameter in adapted.model.named_parameters()} == trained
