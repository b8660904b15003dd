"""Mixture of conditional Gaussian scale mixtures: a density whose gate is a quadratic energy."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from moestro.experts import AffineExperts
from moestro.layers import MoE
from moestro.routers import Scorer, TokenChoice, as_is, softmax
from moestro.routers.dense import EveryExpert
from moestro.routing import Context
from moestro.routing.context import NO_CONTEXT


class Energies(Scorer):
    """Quadratic energies of components and scales; a component's logit sums its scales.

        e[c, s] = η_cs - ½ e^{α_cs} (sum_f β_cf² (b_fᵀx)² - 2 w_cᵀx),   logits[c] = logsumexp_s e[c, s]
        Theis, Hosseini & Bethge 2012, eqs. 6-8

    Features and weights start at the size of whitened inputs. The authors' code starts both a hundred times
    smaller; the gate then hardly moves at first, and fits end in worse places.

    Args:
        width: inputs.
        num_experts: components.
        num_scales: scales of each.
        num_features: features b shared by all components.

    Parameters: offset η and log_precision α `[components, scales]`, weight β `[components, features]`, feature b
    `[features, width]`, slope w `[components, width]` (zero at the start).
    """

    def __init__(self, width: int, num_experts: int, num_scales: int, num_features: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.offset = nn.Parameter(torch.zeros(num_experts, num_scales))
        self.log_precision = nn.Parameter(torch.randn(num_experts, num_scales) / 20)
        self.weight = nn.Parameter(0.5 + 0.5 * torch.rand(num_experts, num_features))
        self.feature = nn.Parameter(torch.randn(num_features, width) * max(width, 1) ** -0.5)
        self.slope = nn.Parameter(torch.zeros(num_experts, width))

    def joint(self, x: Tensor) -> Tensor:
        """Energies `[tokens, components, scales]`."""
        offset, alpha, beta, b, w = (p.to(x.dtype) for p in self.parameters())
        inside = (x @ b.t()).square() @ beta.square().t() - 2 * x @ w.t()  # [tokens, components]
        return offset - 0.5 * alpha.exp() * inside.unsqueeze(-1)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        return self.joint(x).logsumexp(-1)


class MCGSM(nn.Module):
    """A mixture of experts for a conditional density: linear predictors whose noise is a scale mixture.

        p(c, s | x) ∝ exp(e[c, s]),   p(y | c, s, x) = N(y; A_c x + u_c, e^{-α_cs} (L_c L_cᵀ)^{-1})
        Theis, Hosseini & Bethge 2012; Theis & Bethge 2015

    The scales α act in the gate and in the experts. L is lower triangular with a positive diagonal whose first
    entry is 1. Standardise the inputs first; `initialise` puts the experts at the pooled linear predictor.

    Args:
        width: inputs.
        outputs: size of y.
        num_components: experts.
        num_scales: scales of each.
        num_features: quadratic features of the gate; None = as many as inputs.

    Shapes: x `[rows, width]`, y `[rows, outputs]`.
    """

    def __init__(
        self,
        width: int,
        outputs: int = 1,
        num_components: int = 8,
        num_scales: int = 4,
        num_features: int | None = None,
    ) -> None:
        super().__init__()
        num_features = width if num_features is None else num_features
        self.energies = Energies(width, num_components, num_scales, num_features)
        self.experts = AffineExperts(num_components, width, outputs)
        nn.init.normal_(self.experts.weight, std=0.1)
        self.factor = nn.Parameter(torch.zeros(num_components, outputs, outputs))  # logarithms on the diagonal

    @property
    def layer(self) -> MoE:
        """The dense mixture of the same gate and experts, whose output is the mean of y."""
        router = TokenChoice(self.energies, EveryExpert(self.energies.num_experts), softmax, as_is)
        return MoE(router, self.experts)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`log p(y | x)`, `[rows]`."""
        energy = self.energies.joint(x)
        joint = energy + self._log_experts(x, y)
        return joint.logsumexp((1, 2)) - energy.logsumexp((1, 2))

    def log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """`log p(y | x)` in nats, `[rows]`."""
        density: Tensor = self(x, y)
        return density

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of `-log2 p(y | x)` per output, in bits."""
        return -self.log_prob(x, y).mean() / (y.shape[1] * math.log(2))

    def prior(self, x: Tensor) -> Tensor:
        """`p(c | x)`, `[rows, components]`."""
        return self.energies(x).softmax(-1)

    def posterior(self, x: Tensor, y: Tensor) -> Tensor:
        """`p(c | x, y)`, `[rows, components]`."""
        return (
            (self.energies.joint(x) + self._log_experts(x, y))
            .flatten(1)
            .softmax(1)
            .unflatten(1, (self.energies.num_experts, -1))
            .sum(-1)
        )

    def predict(self, x: Tensor) -> Tensor:
        """Mean of y, `sum_c p(c | x) (A_c x + u_c)`, `[rows, outputs]`."""
        mean: Tensor = self.layer(x)
        return mean

    @torch.no_grad()
    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw of y for each row, `[rows, outputs]`."""
        share = self.energies.joint(x).flatten(1).softmax(1)
        chosen = torch.multinomial(share, 1, generator=generator).squeeze(1)
        scales = self.energies.log_precision.shape[1]
        component, scale = chosen // scales, chosen % scales
        noise = torch.randn(len(x), self.factor.shape[1], 1, generator=generator, dtype=x.dtype, device=x.device)
        spread = torch.linalg.solve_triangular(self._lower()[component].mT.to(x.dtype), noise, upper=True)
        size = (-0.5 * self.energies.log_precision[component, scale]).exp().to(x.dtype)
        mean = self._means(x)[torch.arange(len(x), device=x.device), component]
        return mean + size.unsqueeze(1) * spread.squeeze(2)

    @torch.no_grad()
    def initialise(self, x: Tensor, y: Tensor) -> Self:
        """Experts near the pooled least-squares predictor, noise of its residuals, features of the whitened x."""
        ones = torch.cat([x, x.new_ones(len(x), 1)], 1)
        coef = torch.linalg.lstsq(ones, y, driver="gelsd").solution
        residual = y - ones @ coef
        covariance = residual.t() @ residual / len(x)
        floor = 1e-6 * y.var(0, correction=0).mean().clamp(min=1e-12)
        precision = torch.linalg.inv(covariance + floor * torch.eye(y.shape[1], dtype=x.dtype, device=x.device))
        lower = torch.linalg.cholesky(precision)
        size = lower[0, 0].clone()
        experts, factor = self.experts, (lower / size).tril(-1)
        factor = factor + torch.diag_embed((lower.diagonal() / size).log())
        self.factor.copy_(factor.expand_as(self.factor))
        self.energies.log_precision.add_(2 * size.log())
        experts.weight.copy_(coef[:-1] + 0.1 * coef[:-1].square().mean().sqrt() * torch.randn_like(experts.weight))
        experts.bias.copy_(coef[-1].expand_as(experts.bias))
        self.energies.feature.div_(x.std(0, correction=0).clamp(min=1e-12))
        self.energies.weight.div_(size)  # the precisions multiply the energies too
        return self

    def fit(self, x: Tensor, y: Tensor, max_iter: int = 500, tolerance: float = 1e-9) -> Self:
        """Raise the mean log-likelihood by L-BFGS, on all rows at once, from where the parameters are."""
        optimiser = torch.optim.LBFGS(
            self.parameters(),
            max_iter=max_iter,
            max_eval=2 * max_iter,
            tolerance_grad=1e-7,
            tolerance_change=tolerance,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = -self.log_prob(x, y).mean()
            loss.backward()
            return loss

        optimiser.step(closure)
        return self

    def _means(self, x: Tensor) -> Tensor:
        """`[rows, components, outputs]`."""
        weight, bias = self.experts.weight.to(x.dtype), self.experts.bias.to(x.dtype)
        return torch.einsum("rw,cwo->rco", x, weight) + bias

    def _lower(self) -> Tensor:
        """L, `[components, outputs, outputs]`."""
        free = torch.ones_like(self.factor[0]).tril()
        free[0, 0] = 0
        factor = self.factor * free
        return factor.tril(-1) + torch.diag_embed(factor.diagonal(dim1=1, dim2=2).exp())

    def _log_experts(self, x: Tensor, y: Tensor) -> Tensor:
        """`log p(y | c, s, x)`, `[rows, components, scales]`."""
        alpha, lower = self.energies.log_precision.to(x.dtype), self._lower().to(x.dtype)
        white = torch.einsum("rco,cop->rcp", y.unsqueeze(1) - self._means(x), lower)
        distance = white.square().sum(-1, keepdim=True)  # [rows, components, 1]
        volume = lower.diagonal(dim1=1, dim2=2).log().sum(-1, keepdim=True)
        q = y.shape[1]
        return volume + 0.5 * q * (alpha - math.log(2 * math.pi)) - 0.5 * alpha.exp() * distance
