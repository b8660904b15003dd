"""Mixture of LoRA Experts."""

from moestro.balance.product import product_balance_of_layer
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers.output_gate import OutputGate


@method(
    title="Mixture of LoRA Experts",
    paper="Wu et al. 2024",
    arxiv="2404.13628",
    family="dense",
    causal=False,
)
def mole(experts: Experts, *, length: int | None = None, balance: float = 0.5) -> MoE:
    """A dense gate over trained experts that reads their outputs, one decision per sequence.

    `length` fixes the tokens of a sequence (image latents), else outputs are averaged. Freeze the experts and train
    only the gate; `moe.router.keep([...])` leaves experts out afterwards. The loss is per layer; for the paper's,
    over all blocks, add `moestro.balance.product.product_balance` yourself. The coefficient is ours.
    """
    router = OutputGate(experts, experts.num_experts, experts.width, length)
    return MoE(router, experts, losses={"balance": (balance, product_balance_of_layer)})
