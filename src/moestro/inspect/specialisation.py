"""Who likes what: exact counts of domain and token by expert, and what they say about specialisation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moestro.inspect.classes import CLASSES, printable, token_class
from moestro.inspect.statistics import chosen_pairs
from moestro.routing import Decision

PSEUDO_COUNT = 10.0
"""Weight of the prior belief that an expert sees a token as often as everyone: as if 10 had been expected."""


class SpecialisationCounter:
    """Counts, for every layer, how often each expert was chosen for each domain and each token id.

    Args:
        num_domains: number of domains of the corpus.
        vocab_size: number of token ids.
        layer_names: names of the MoE layers, as `RoutingLog.layers` gives them.
    """

    def __init__(self, num_domains: int, vocab_size: int, layer_names: Sequence[str]):
        self.num_domains, self.vocab_size = num_domains, vocab_size
        self.layer_names = list(layer_names)
        self.domain_counts: dict[str, Tensor] = {}  # [domains, experts] float64, exact below 2^53
        self.token_counts: dict[str, Tensor] = {}  # [vocabulary, experts]

    def add(self, decisions: Mapping[str, Decision | Iterable[Decision]], tokens: Tensor, domain: Tensor) -> None:
        """Adds one batch.

        Args:
            decisions: by layer name; a list where a layer ran more than once on the same tokens.
            tokens, domain: token id and domain of every routed token, `[tokens]` or `[batch, length]`.
        """
        tokens, domain = tokens.detach().cpu().flatten().long(), domain.detach().cpu().flatten().long()
        for name in self.layer_names:
            if name not in decisions:
                raise ValueError(f"no decision of layer {name!r}; record the batch in all of {self.layer_names}")
            recorded = decisions[name]
            for decision in [recorded] if isinstance(recorded, Decision) else recorded:
                self._add(name, decision, tokens, domain)

    def _add(self, name: str, decision: Decision, tokens: Tensor, domain: Tensor) -> None:
        routed = decision.routing.num_tokens
        if not routed == len(tokens) == len(domain):
            raise ValueError(
                f"layer {name!r} routed {routed} tokens but was given {len(tokens)} token ids and "
                f"{len(domain)} domains; pass those of the very batch that was recorded"
            )
        pairs, experts = chosen_pairs(decision), decision.routing.num_experts
        _accumulate(self.domain_counts, name, domain, pairs, (self.num_domains, experts))
        _accumulate(self.token_counts, name, tokens, pairs, (self.vocab_size, experts))

    def result(self, domains: Sequence[str], tokenizer: Any) -> dict[str, Any]:
        """The content of specialisation.json: plain lists and numbers.

        Args:
            domains: names of the domains, in the order of their numbers.
            tokenizer: anything with `decode_bytes(ids) -> bytes`.
        """
        if len(domains) != self.num_domains:
            raise ValueError(f"{len(domains)} domain names for {self.num_domains} domains; pass one name each")
        counted = [name for name in self.layer_names if name in self.domain_counts]
        content = _contents(self.token_counts, tokenizer)
        return {
            "domains": list(domains),
            "classes": list(CLASSES),
            "pseudo_count": PSEUDO_COUNT,
            "layers": [self._layer(name, content) for name in counted],
        }

    def _layer(self, name: str, content: Mapping[int, bytes]) -> dict[str, Any]:
        by_domain, by_token = self.domain_counts[name], self.token_counts[name]
        by_class = torch.zeros(len(CLASSES), by_token.shape[1], dtype=torch.float64)
        for token, text in content.items():
            by_class[CLASSES.index(token_class(text))] += by_token[token]
        names = {token: printable(text) for token, text in content.items()}
        return {
            "name": name,
            "load_by_domain": _rounded(by_domain / by_domain.sum(1, keepdim=True).clamp_min(1)),
            "normalised_mutual_information": normalised_mutual_information(by_domain),
            "highest_possible": highest_possible(by_domain),
            "told_apart": told_apart(by_domain),
            "class_lift": _rounded(lift(by_class).T),
            "experts": _experts(by_domain, by_class, by_token, names),
        }


def normalised_mutual_information(counts: Tensor) -> float:
    """How much one label says about the other: 0 nothing, 1 everything.

        NMI = 2 I(A; B) / (H(A) + H(B))    I = Σ p_ab ln(p_ab / (p_a p_b))    arithmetic-mean normalisation

    A table with a single row or column has nothing to tell apart and answers 0 (scikit-learn says 1 if both
    are single).

    Shapes: counts `[a, b]` -> float.
    """
    joint = counts.double() / counts.double().sum().clamp_min(1e-300)
    rows, columns = joint.sum(1), joint.sum(0)
    entropies = float(_entropy(rows) + _entropy(columns))
    information = float(_entropy(rows) + _entropy(columns) - _entropy(joint.flatten()))
    return min(max(2 * information / entropies, 0.0), 1.0) if entropies > 0 else 0.0


def highest_possible(counts: Tensor) -> float:
    """The largest NMI that these totals allow: I is at most the smaller of the two entropies."""
    joint = counts.double() / counts.double().sum().clamp_min(1e-300)
    rows, columns = float(_entropy(joint.sum(1))), float(_entropy(joint.sum(0)))
    return 2 * min(rows, columns) / (rows + columns) if rows + columns > 0 else 0.0


def told_apart(counts: Tensor) -> float:
    """How often one choice of an expert gives the row away, all rows being equally likely.

        told apart = Σ_expert max_row p(expert | row) / rows

    The best guess that sees nothing but the expert. Blind choice gives 1 / rows, whatever the shares of the rows
    in the text; with a rare row, mutual information is small however well the experts tell. Rows that never occur
    do not count; with fewer than two left there is nothing to tell, and the answer is 1.

    Shapes: counts `[a, experts]` -> float.
    """
    seen = counts.double()[counts.sum(1) > 0]
    if len(seen) < 2:
        return 1.0
    return float((seen / seen.sum(1, keepdim=True)).amax(0).sum() / len(seen))


def lift(counts: Tensor, pseudo_count: float = PSEUDO_COUNT) -> Tensor:
    """How many times more often an expert meets a thing than an expert that chose blindly would.

        lift = (n + a) / (m + a)    m = n_thing · n_expert / n    DuMouchel 1999, gamma-Poisson mean

    The pseudo-count `a` draws things that were expected only a few times towards 1, so that a token which
    occurs twice does not become an expert's most characteristic one by chance.

    Shapes: counts `[things, experts]` -> `[things, experts]`.
    """
    total = counts.sum().clamp_min(1e-300)
    expected = counts.sum(1, keepdim=True) * (counts.sum(0, keepdim=True) / total)
    return (counts + pseudo_count) / (expected + pseudo_count)


def _accumulate(
    store: dict[str, Tensor],
    name: str,
    label: Tensor,
    pairs: tuple[Tensor, Tensor, Tensor],
    shape: tuple[int, int],
) -> None:
    """Adds a table label × expert to the one stored under the layer's name."""
    token, expert, amount = pairs
    num_labels, num_experts = shape
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) < num_labels:
        low, high = int(label.min()), int(label.max())
        raise ValueError(f"labels from {low} to {high}, but only 0 to {num_labels - 1} exist")
    flat = torch.bincount(label[token] * num_experts + expert, amount, minlength=num_labels * num_experts)
    counts = flat.double().view(shape)
    store[name] = store[name] + counts if name in store else counts


def _contents(token_counts: Mapping[str, Tensor], tokenizer: Any) -> dict[int, bytes]:
    """The bytes of every token that occurred in any layer."""
    seen: set[int] = set()
    for counts in token_counts.values():
        seen.update(counts.sum(1).nonzero().flatten().tolist())
    return {token: tokenizer.decode_bytes([token]) for token in sorted(seen)}


def _experts(
    by_domain: Tensor, by_class: Tensor, by_token: Tensor, names: Mapping[int, str]
) -> list[dict[str, Any]]:
    share = by_domain.sum(0) / by_domain.sum().clamp_min(1e-300)
    of_class, of_token = lift(by_class), lift(by_token)
    return [
        {
            "share": float(f"{float(share[expert]):.6g}"),
            "top_classes": _top(of_class[:, expert], dict(enumerate(CLASSES)), 3),
            "top_tokens": _top(of_token[:, expert], names, 8),
        }
        for expert in range(len(share))
    ]


def _top(lifts: Tensor, names: Mapping[int, str], count: int) -> list[list[Any]]:
    """The things with the highest lift above 1, highest first, ties in order of their number."""
    order = lifts.argsort(descending=True, stable=True)[:count].tolist()
    best = [(names[i], round(float(lifts[i]), 2)) for i in order if i in names]
    return [[name, value] for name, value in best if value > 1]


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum()


def _rounded(table: Tensor) -> list[list[float]]:
    return [[float(f"{value:.6g}") for value in row] for row in table.tolist()]
