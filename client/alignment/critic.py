"""A value head per objective on the policy's hidden states; it belongs to a site and never leaves it.

Shape suffixes: T tokens, D model width, M objectives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from strategies.adapters import Arrays


class Critic(nn.Module):
    """V_j(h) = w_j . layernorm(h) + b_j, which starts at 0; no gradient goes on into the policy.

    FIRM leaves open what a critic is. A linear head is the smallest, and sees what the output layer does.
    """

    def __init__(self, width: int, num_objectives: int, learning_rate: float, device: torch.device) -> None:
        super().__init__()
        self.weight_MD = nn.Parameter(torch.zeros(num_objectives, width, device=device))
        self.bias_M = nn.Parameter(torch.zeros(num_objectives, device=device))
        self._adam = torch.optim.Adam(self.parameters(), lr=learning_rate)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """(T, M) value of each token's state under each objective."""
        hidden_TD = functional.layer_norm(hidden_TD.detach().float(), hidden_TD.shape[-1:])
        return functional.linear(hidden_TD, self.weight_MD, self.bias_M)

    def fit(self, hidden_TD: Tensor, returns_TM: Tensor) -> float:
        """Take a step towards the returns; half the mean squared error before it."""
        self._adam.zero_grad()
        error = 0.5 * (self(hidden_TD) - returns_TM).square().mean()
        torch.autograd.backward(error)
        self._adam.step()
        return float(error.detach())

    def load(self, arrays: Arrays) -> None:
        """Go on from what ``arrays`` returned."""
        with torch.no_grad():
            self.weight_MD.copy_(torch.tensor(arrays["weight"]))
            self.bias_M.copy_(torch.tensor(arrays["bias"]))

    def arrays(self) -> Arrays:
        """Weights as float32 arrays; Adam's moments start afresh each round, as the adapter's do by default."""
        return {
            "weight": self.weight_MD.detach().cpu().numpy().copy(),
            "bias": self.bias_M.detach().cpu().numpy().copy(),
        }
