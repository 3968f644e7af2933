"""Operations against a count by hand; a model that does everything twice costs twice as much."""

from functools import partial

import pytest
import torch

from client.base_model import load_base
from client.evaluation.held_out import held_out_loss
from client.evaluation.relative_cost import counted_flops, relative_cost
from client.model import AdaptedModel
from client.text import TokenSequence
from conf.model import LoraConfig
from tests.client.local_training import eight_sequences, noisy
from tests.client.tiny_models import NUM_EXPERTS, NUM_LAYERS, TOP_K, save_tiny_base


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    config = save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")
    return AdaptedModel(load_base(config, torch.device("cpu")), config, LoraConfig(rank=4))


@pytest.fixture
def plain(adapted):
    return partial(held_out_loss, adapted, adapted.initial_adapter(0), batch_size=8)


def test_operations_are_two_for_each_weight_that_a_token_meets(adapted, plain):
    """2 a weight and token, of experts those of the top k; attention 4 x width a layer and pair of tokens; the output
    layer meets those positions alone that predict the response.

    One sequence, and a rank that fits the grouped products, so nothing is padded. The embedding is looked up; norms
    are no products.
    """
    length = 12
    sequence = TokenSequence([*range(length)], [-100] * 6 + [*range(6, length)], [length])
    expected = 0
    for name, weight in adapted.model.named_parameters():
        if weight.ndim >= 2 and "embed_tokens" not in name:
            share = TOP_K / NUM_EXPERTS if ".experts." in name else 1
            expected += 2 * weight.numel() * share * (6 if "lm_head" in name else length)
    expected += NUM_LAYERS * 4 * 16 * length**2
    assert counted_flops(plain, [sequence]) == expected


def test_a_second_pass_costs_as_much_as_the_first(plain):
    def twice(sequences):
        plain(sequences)
        return plain(sequences)

    cost = relative_cost(twice, plain, eight_sequences())
    assert cost.flops == 2
    assert 1 < cost.seconds < 4


def test_another_adapter_costs_nothing_more(adapted, plain):
    other = partial(held_out_loss, adapted, noisy(adapted.initial_adapter(0)), batch_size=8)
    assert relative_cost(other, plain, eight_sequences()[:2]) is None
