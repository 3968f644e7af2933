"""Use of experts against the routers' own outputs, of one sequence at a time."""

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.evaluation.expert_use import expert_use
from client.model import AdaptedModel
from conf.model import LoraConfig
from tests.client.local_training import eight_sequences, noisy
from tests.client.tiny_models import NUM_EXPERTS, TOP_K, save_tiny_base


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    config = save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")
    return AdaptedModel(load_base(config, torch.device("cpu")), config, LoraConfig(rank=4))


def test_it_is_that_of_the_adapter_in_use_over_all_tokens_but_padding(adapted):
    sequences, adapter = eight_sequences(), noisy(adapted.initial_adapter(0), seed=1)
    found = expert_use(adapted, adapter, sequences, batch_size=3)
    counts = {layer: np.zeros(NUM_EXPERTS) for layer in adapted.layers}
    for sequence in sequences:
        inputs = torch.tensor([sequence.input_ids])
        with torch.no_grad():
            logits = adapted.model(inputs, output_router_logits=True).router_logits
        for layer, logits_NE in zip(counts, logits, strict=True):
            for expert in logits_NE.topk(TOP_K).indices.reshape(-1).tolist():
                counts[layer][expert] += 1
    assert found.keys() == counts.keys()
    for layer, count_E in counts.items():
        assert found[layer].shares == tuple(count_E / count_E.sum())
    plain = expert_use(adapted, adapted.initial_adapter(0), sequences, batch_size=8)
    assert any(plain[layer] != found[layer] for layer in found)
