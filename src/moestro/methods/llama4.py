"""Llama 4."""

from moestro.balance import LoadTimesProbability
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import Linear, TokenChoice, TopK, WeighsInputs, sigmoid_of_selected, softmax


@method(
    title="The Llama 4 Herd: The Beginning of a New Era of Natively Multimodal AI Innovation",
    paper="Meta 2025",
    family="token-choice",
)
def llama4(experts: Experts, *, top_k: int = 1, balance: float = 1e-3) -> MoE:
    """One expert per token beside a shared one; the sigmoid of its logit multiplies the expert's input.

    y = f_e(sigmoid(z_e) x) + f_shared(x). The balance loss, of softmax probabilities, is that of `transformers`.
    """
    router = TokenChoice(
        scorer=Linear(experts.width, experts.num_experts),
        gate=softmax,
        select=TopK(top_k),
        weigh=sigmoid_of_selected,
    )
    losses = {"balance": (balance, LoadTimesProbability("transformers"))}
    return MoE(WeighsInputs(router), experts, experts.dense(), losses=losses)
