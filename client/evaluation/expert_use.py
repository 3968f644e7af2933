"""How evenly a model uses its experts, on a site's own held-out data: told by sites that share nothing, too."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from client.evaluation.held_out import response_logits
from client.evaluation.measured import ExpertUse
from client.model import AdaptedModel
from client.text import TokenSequence, collate
from strategies.adapters import Arrays


def expert_use(
    adapted: AdaptedModel, adapter: Arrays, sequences: Sequence[TokenSequence], batch_size: int
) -> dict[str, ExpertUse]:
    """MoE layer -> how all tokens of the sequences, prompts too, are spread over its experts; empty for a dense model.

    ``adapter`` stays loaded.

    Raises:
        ValueError: If ``adapter`` does not fit the model.
    """
    if not adapted.layers:
        return {}
    adapted.load_adapter(adapter)
    with torch.no_grad(), adapted.evaluating(), adapted.count_expert_tokens() as counter:
        for first in range(0, len(sequences), batch_size):
            batch = collate(sequences[first : first + batch_size], adapted.tokenizer.pad_token_id)
            counter.set_mask(batch["token_mask"])
            response_logits(adapted, batch)
    return {
        layer: ExpertUse(tuple((tokens_E / tokens_E.sum()).tolist())) for layer, tokens_E in counter.totals().items()
    }
