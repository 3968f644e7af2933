"""Routers fitted by k-means send what is alike to the same expert."""

from __future__ import annotations

import torch

from client.differentiate import router_rows


def clustered_inputs(num_clusters: int = 4, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (400, width) around a few directions, all with a long common part as a layer's inputs have."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(num_clusters, width, generator=generator)
    labels = torch.arange(400) % num_clusters
    common = 6.0 * torch.randn(width, generator=generator)
    return common + centres[labels] + 0.2 * torch.randn(400, width, generator=generator), labels


def test_each_cluster_goes_first_to_an_expert_of_its_own() -> None:
    inputs, labels = clustered_inputs()
    rows_ED = router_rows(inputs, 4, torch.Generator().manual_seed(0))
    chosen = (inputs @ rows_ED.T).argmax(dim=1)
    experts = [set(chosen[labels == label].tolist()) for label in range(4)]
    assert all(len(of_cluster) == 1 for of_cluster in experts)
    assert set.union(*experts) == {0, 1, 2, 3}


def test_logits_have_unit_variance_whatever_the_inputs_length() -> None:
    inputs, _ = clustered_inputs()
    for scale in (0.01, 100.0):
        rows_ED = router_rows(scale * inputs, 4, torch.Generator().manual_seed(0))
        assert abs(float((scale * inputs @ rows_ED.T).std()) - 1) < 1e-3


def test_more_experts_than_clusters_leave_no_row_undefined() -> None:
    inputs, _ = clustered_inputs(num_clusters=2)
    rows_ED = router_rows(inputs[:6].repeat(20, 1), 8, torch.Generator().manual_seed(0))
    assert torch.isfinite(rows_ED).all()
