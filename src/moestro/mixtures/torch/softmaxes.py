"""Mixture of softmaxes: a language model's output layer without the rank limit of one softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moestro.experts import AffineExperts
from moestro.routers import Linear, TokenChoice, as_is, softmax
from moestro.routers.dense import EveryExpert


class MixtureOfSoftmaxes(nn.Module):
    """Mixes the word distributions of several context vectors, after the softmax.

        P(w | c) = sum_i π_i softmax(O v_i + b)_w,   π = softmax(W c),   v_i = tanh(W_i c + b_i)
        Yang et al. 2018, section 2.4; one O and b for all i

    Log-probabilities are summed by logsumexp; the authors' code adds 1e-8 to the probabilities instead.

    Args:
        width: size of a hidden state c.
        vocabulary: number of words.
        num_experts: softmaxes in the mixture.
        embedding: size of a context vector v.
        tie_weight: the input embedding `[vocabulary, embedding]`, used as O; None = an O of its own.
        dropout: share of the context vectors' entries set to 0 in training; one mask per sequence, as in
            AWD-LSTM, where c is `[batch, length, width]`.
        chunk: positions per piece in `loss`, which needs `chunk * num_experts * vocabulary` numbers at a time.

    Raises:
        ValueError: a tied weight of another shape.

    Shapes: c `[..., width]` -> log-probabilities `[..., vocabulary]`.
    """

    def __init__(
        self,
        width: int,
        vocabulary: int,
        num_experts: int = 15,
        embedding: int = 280,
        *,
        tie_weight: nn.Parameter | None = None,
        dropout: float = 0.0,
        chunk: int = 256,
    ) -> None:
        super().__init__()
        if tie_weight is not None and tie_weight.shape != (vocabulary, embedding):
            raise ValueError(
                f"tie_weight has shape {list(tie_weight.shape)}; pass [vocabulary, embedding] = "
                f"[{vocabulary}, {embedding}]"
            )
        if not 0 <= dropout < 1 or chunk < 1:
            raise ValueError(f"dropout={dropout} must be at least 0 and below 1, chunk={chunk} at least 1")
        self.num_experts, self.dropout, self.chunk = num_experts, dropout, chunk
        self.router = TokenChoice(Linear(width, num_experts), EveryExpert(num_experts), softmax, as_is)
        self.context = AffineExperts(num_experts, width, embedding, link="tanh")
        self.decoder = nn.Linear(embedding, vocabulary)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if tie_weight is not None:
            self.decoder.weight = tie_weight

    def forward(self, c: Tensor) -> Tensor:
        log_share, context = self._contexts(c)
        return self._mix(log_share, context).view(*c.shape[:-1], -1)

    def loss(self, c: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Weighted mean of `-log P(target | c)`, piece by piece: backward computes the logits again.

        Shapes: c `[..., width]`, target `[...]` int, weight `[...]` (0 leaves a position out) -> scalar.
        """
        log_share, context = self._contexts(c)
        target = target.reshape(-1, 1)
        weight = torch.ones_like(log_share[:, 0]) if weight is None else weight.reshape(-1).to(log_share.dtype)
        total = log_share.new_zeros(())
        for begin in range(0, len(target), self.chunk):
            part = slice(begin, begin + self.chunk)
            piece = checkpoint(self._piece, log_share[part], context[part], target[part], use_reentrant=False)
            total = total - weight[part] @ piece
        return total / weight.sum().clamp(min=1e-12)

    def _piece(self, log_share: Tensor, context: Tensor, target: Tensor) -> Tensor:
        return self._mix(log_share, context).gather(1, target).squeeze(1)

    def _contexts(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the gate `[tokens, experts]` and context vectors `[tokens, experts, embedding]`."""
        x = c.reshape(-1, c.shape[-1])
        decision = self.router(x)
        rows = self.context(decision.routing.dispatch(x), decision.routing.offsets)
        context = rows.view(self.num_experts, len(x), -1).transpose(0, 1)
        if self.training and self.dropout:
            context = context * self._mask(c, context)
        return decision.logits.log_softmax(-1), context

    def _mask(self, c: Tensor, context: Tensor) -> Tensor:
        sequences = len(c) if c.dim() == 3 else len(context)
        mask = F.dropout(context.new_ones(sequences, *context.shape[1:]), self.dropout)
        return mask.repeat_interleave(len(context) // sequences, dim=0) if sequences else mask

    def _mix(self, log_share: Tensor, context: Tensor) -> Tensor:
        words = self.decoder(context).log_softmax(-1)  # [tokens, experts, vocabulary]
        return (log_share.to(words.dtype).unsqueeze(-1) + words).logsumexp(1)
