"""Language models small enough for a test, with weights large enough to matter."""

from typing import Any

import torch

from moestro.balance import RoutingLog
from moestro.methods import all_methods
from moestro.models import DecoderLM, build_language_model

CAUSAL_METHODS = [name for name, method in all_methods().items() if method.causal]


def tiny_model(method: str | None = "mixtral", **arguments: Any) -> DecoderLM:
    """Three layers of width 32, for two domains; drawn wider than usual, so that every part changes the logits."""
    options = arguments.pop("options", {})
    takes = all_methods()[method].options if method else {}
    needed: dict[str, Any] = {"num_domains": 2} if "num_domains" in takes else {}
    if "top_k" in takes and (takes["top_k"].default or 0) > arguments.get("num_experts", 8):
        needed["top_k"] = 2
    defaults = {
        "options": needed | options,
        "vocab_size": 64,
        "width": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_experts": 8,
        "expert_hidden": 24,
        "max_length": 128,
        "seed": 0,
    }
    model = build_language_model(method=method, **(defaults | arguments))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def facts(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What some methods need besides tokens: two domains, by the first token of a text."""
    return {"domain": (tokens[:, :1] % 2).expand_as(tokens)}


def train_a_little(model: DecoderLM, steps: int = 4, rate: float = 1e-2) -> None:
    """A few optimiser steps on random tokens, controllers included."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    log = RoutingLog(model)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        tokens = torch.randint(model.vocab_size, (4, 17), generator=generator)
        with log.recording():
            logits = model(tokens[:, :-1], **facts(tokens[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        (loss + log.auxiliary_loss()).backward()
        optimiser.step()
        optimiser.zero_grad()
        log.update_controllers()
    log.close()
    model.eval()


def tokens_for(model: DecoderLM, batch: int = 2, length: int = 24, seed: int = 3) -> torch.Tensor:
    return torch.randint(model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
