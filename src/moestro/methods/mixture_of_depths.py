"""Mixture-of-Depths."""

from typing import Literal

from moestro.balance import LoadTimesProbability
from moestro.balance.depth import depth_loss
from moestro.experts import Experts
from moestro.layers import Loss, MoE
from moestro.methods.registry import method
from moestro.routers import Linear, TokenChoice, TopK, as_is, softmax
from moestro.routers.depth import MixtureOfDepths, OwnScore, Predictor


@method(
    title="Mixture-of-Depths: Dynamically allocating compute in transformer-based language models",
    paper="Raposo et al. 2024",
    arxiv="2404.02258",
    family="expert-choice",
    causal=False,
)
def mixture_of_depths(
    experts: Experts,
    *,
    capacity: float = 0.125,
    guess: Literal["network", "score"] = "network",
    predictor: float = 1e-2,
    balance: float = 1e-2,
) -> MoE:
    """The top share of each sequence's tokens passes through the layer, weighted by the raw score; others skip it.

    Evaluation is causal: a predictor, trained beside, says from a token alone whether it passes. With one expert
    this is the paper's block; with several, those who pass choose one (staged MoDE).
    """
    width, num_experts = experts.width, experts.num_experts
    inner = TokenChoice(Linear(width, num_experts), TopK(1), softmax, as_is)
    router = MixtureOfDepths(width, inner, capacity, Predictor(width) if guess == "network" else OwnScore())
    losses: dict[str, tuple[float, Loss]] = {
        "predictor": (predictor, depth_loss),
        "balance": (balance, LoadTimesProbability("switch")),
    }
    return MoE(router, experts, losses=losses)
