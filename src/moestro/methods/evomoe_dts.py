"""EvoMoE's dense-to-sparse gate."""

from moestro.balance import LoadTimesProbability
from moestro.balance.steps import CountSteps, WhenSparse
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear
from moestro.routers.dense_to_sparse import CosineTemperature, DenseToSparse


@method(
    title="EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate",
    paper="Nie et al. 2021",
    arxiv="2112.14397",
    family="dense",
)
def evomoe_dts(
    experts: Experts,
    *,
    threshold: float = 0.02,
    first_temperature: float = 2.0,
    last_temperature: float = 0.3,
    dense_steps: int = 10_000,
    balance: float = 1e-2,
) -> MoE:
    """Starts with all experts under a Gumbel softmax, whose temperature falls until one expert is left.

    After `dense_steps` optimiser steps, and in evaluation: the best expert, weighted by its probability, with a
    load-balancing loss. `dense_steps` and `balance` are our choice; the paper starts from one expert, cloned.
    """
    temperature = CosineTemperature(first_temperature, last_temperature, dense_steps)
    router = DenseToSparse(Linear(experts.width, experts.num_experts), threshold, temperature)
    losses = {"balance": (balance, WhenSparse(LoadTimesProbability("switch")))}
    return MoE(router, experts, losses=losses, controllers=[CountSteps()])
