"""A gate by reconstruction: the task whose autoencoder knows the input best."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moestro.routers.scorers import Scorer
from moestro.routing.context import NO_CONTEXT, Context


class Autoencoders(Scorer):
    """One small autoencoder per expert; small errors are large logits.

        v = sigmoid((x - mean) / std);   error_e = |v - r_e(v)|^2;   logits_e = -error_e / temperature
        r_e(v) = sigmoid(W'_e relu(W_e v + b_e) + b'_e)        Aljundi et al. 2017, eqs. 1-3

    Inputs count as fixed features: no gradient flows into x.

    Args:
        width: model width.
        num_experts: autoencoders.
        hidden: size of the code.
        temperature: of the softmax over errors.

    Shapes: x `[tokens, width]` -> `[tokens, experts]`.

    Raises:
        ValueError: a temperature that is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, num_experts: int, hidden: int = 100, temperature: float = 2.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        self.num_experts, self.temperature = num_experts, temperature
        self.encode = nn.Parameter(torch.randn(num_experts, width, hidden) * width**-0.5)
        self.decode = nn.Parameter(torch.randn(num_experts, hidden, width) * hidden**-0.5)
        self.encode_bias = nn.Parameter(torch.zeros(num_experts, 1, hidden))
        self.decode_bias = nn.Parameter(torch.zeros(num_experts, 1, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Take mean and standard deviation of the features from data `[tokens, width]`."""
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0, correction=0).clamp(min=1e-6))

    def errors(self, x: Tensor) -> Tensor:
        """Squared reconstruction errors, `[tokens, experts]`."""
        v = self._features(x)
        return (v - self._decoded(v).sigmoid()).square().sum(-1).t()

    def cross_entropy(self, x: Tensor) -> Tensor:
        """Cross-entropy of reconstructions and features, by which the paper trains, `[tokens, experts]`."""
        v = self._features(x)
        back = self._decoded(v)
        return F.binary_cross_entropy_with_logits(back, v.expand_as(back), reduction="none").sum(-1).t()

    def _features(self, x: Tensor) -> Tensor:
        return ((x.detach() - self.mean.to(x.dtype)) / self.std.to(x.dtype)).sigmoid()

    def _decoded(self, v: Tensor) -> Tensor:
        """Reconstructions before the sigmoid, `[experts, tokens, width]`."""
        code = (v @ self.encode.to(v.dtype) + self.encode_bias.to(v.dtype)).relu()  # [experts, tokens, hidden]
        return code @ self.decode.to(v.dtype) + self.decode_bias.to(v.dtype)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        return -self.errors(x) / self.temperature

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, temperature={self.temperature}"


def relatedness(error: Tensor, own_error: Tensor) -> Tensor:
    """How close a new task is to an old one: `1 - |Er_old - Er_new| / Er_new`        Aljundi et al. 2017, eq. 4

    Args:
        error: mean error of the old task's autoencoder on the new task's validation data.
        own_error: that of the new task's own.
    """
    return 1 - (error - own_error).abs() / own_error
