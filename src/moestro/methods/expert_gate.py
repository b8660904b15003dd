"""Expert Gate."""

from moestro.balance.reconstruction import Reconstruction
from moestro.experts import Experts
from moestro.layers import MoE
from moestro.methods.registry import method
from moestro.routers import TokenChoice, TopK, softmax
from moestro.routers.autoencoders import Autoencoders
from moestro.routers.dense import ones


@method(
    title="Expert Gate: Lifelong Learning with a Network of Experts",
    paper="Aljundi et al. 2017",
    arxiv="1611.06194",
    family="token-choice",
)
def expert_gate(
    experts: Experts, *, gate_hidden: int = 100, temperature: float = 2.0, reconstruction: float = 1.0
) -> MoE:
    """The expert whose autoencoder reconstructs the input best, with weight one.

    Each autoencoder learns from the tokens of its own task (`Context.domain`) through the reconstruction loss only,
    so adding a task leaves the gates of the others as they are.
    """
    scorer = Autoencoders(experts.width, experts.num_experts, gate_hidden, temperature)
    router = TokenChoice(scorer, TopK(1), softmax, ones)
    return MoE(router, experts, losses={"reconstruction": (reconstruction, Reconstruction(temperature))})
