"""Where the router, the experts and the selection bias of each family are found in a live transformers model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moestro.hf.outputs import GateMatrix, OneHotOfSequences, RouterOutput, ScoresOnInput, Triple
from moestro.hf.weighing import SparseMixerWeighing, TopTwoGates, Weigh, Weighing, sigmoid, softmax

SOFTMAX = Weighing(softmax)
CHOSEN_SOFTMAX = Weighing(softmax, among_chosen=True)
OPTIONAL = Weighing(softmax, normalised="norm_topk_prob")
NORMALISED = Weighing(softmax, normalised=True)
DEEPSEEK_V3 = Weighing(sigmoid, normalised="norm_topk_prob", epsilon=1e-20, scale="routed_scaling_factor")
GROUPS = ("num_group", "topk_group")


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: `model_type` of the configuration.
        block: class name of the module that holds router and experts.
        router: the router's name in the block.
        gate: logits -> scores, what `Decision.probs` holds.
        weigh: logits and choices -> combine weights; None = unknown, so that routing cannot be replayed.
        output: form of the router's output.
        bias: path of the bias for selection only, from the block.
        groups: the router's attributes with the number of expert groups and of groups kept.
        own_loss: whether transformers computes a balance loss for this family at all.
        jitter: path from the block of the range of a jitter that changes its input in place.
        drops_counts: whether the language-model loss ignores how many tokens the whole step has.
        honours_interface: whether `set_experts_implementation` has an effect.
        in_order: whether the router's own order of choices is the order of preference, and not the scores.
    """

    name: str
    block: str
    router: str = "gate"
    gate: Callable[[Tensor], Tensor] = softmax
    weigh: Weigh | None = SOFTMAX
    output: RouterOutput = Triple()  # noqa: RUF009 stateless
    bias: str | None = None
    groups: tuple[str, str] | None = None
    own_loss: bool = True
    jitter: str | None = None
    drops_counts: bool = False
    honours_interface: bool = True
    in_order: bool = False


_V3: dict[str, Any] = {
    "gate": sigmoid,
    "weigh": DEEPSEEK_V3,
    "bias": "gate.e_score_correction_bias",
    "groups": GROUPS,
    "own_loss": False,
}
TABLE = (
    Family("mixtral", "MixtralSparseMoeBlock", weigh=NORMALISED, jitter="jitter_noise"),
    Family(
        "phimoe",
        "PhimoeSparseMoeBlock",
        "router",
        weigh=SparseMixerWeighing(),
        jitter="input_jitter_noise",
        in_order=True,
    ),
    Family(
        "minimax_m2",
        "MiniMaxM2SparseMoeBlock",
        gate=sigmoid,
        weigh=Weighing(sigmoid, normalised=True),
        bias="e_score_correction_bias",
        jitter="jitter_noise",
    ),
    Family("qwen2_moe", "Qwen2MoeSparseMoeBlock", weigh=OPTIONAL),
    Family("qwen3_moe", "Qwen3MoeSparseMoeBlock", weigh=OPTIONAL),
    Family("olmoe", "OlmoeSparseMoeBlock", weigh=OPTIONAL),
    Family("flex_olmo", "FlexOlmoSparseMoeBlock", weigh=OPTIONAL),
    Family(
        "deepseek_v2",
        "DeepseekV2Moe",
        weigh=Weighing(softmax, scale="routed_scaling_factor"),
        groups=GROUPS,
        own_loss=False,
    ),
    Family("deepseek_v3", "DeepseekV3MoE", **_V3),
    Family("glm4_moe", "Glm4MoeMoE", **_V3),
    Family("dots1", "Dots1MoE", **_V3),
    Family("gpt_oss", "GptOssMLP", "router", weigh=CHOSEN_SOFTMAX),
    Family("granitemoe", "GraniteMoeMoE", "router", weigh=CHOSEN_SOFTMAX),
    Family("granitemoeshared", "GraniteMoeSharedMoE", "router", weigh=CHOSEN_SOFTMAX),
    Family("jamba", "JambaSparseMoeBlock", "router"),
    Family(
        "lfm2_moe",
        "Lfm2MoeSparseMoeBlock",
        gate=sigmoid,
        weigh=Weighing(sigmoid, normalised="norm_topk_prob", epsilon=1e-6, scale="routed_scaling_factor"),
        bias="expert_bias",
        own_loss=False,
    ),
    Family(
        "afmoe",
        "AfmoeSparseMoeBlock",
        "router",
        gate=sigmoid,
        weigh=Weighing(sigmoid, normalised=True, epsilon=1e-20, scale="route_scale"),
        bias="expert_bias",
        own_loss=False,
    ),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeSparseMoeBlock",
        weigh=Weighing(softmax, normalised=True, floor="norm_min"),
        bias="gate.moe_statics.e_score_correction_bias",
    ),
    Family("hunyuan_v1_moe", "HunYuanMoEV1Moe", weigh=NORMALISED, own_loss=False),
    Family(
        "llama4_text",
        "Llama4TextMoe",
        "router",
        gate=sigmoid,
        weigh=Weighing(sigmoid),
        output=ScoresOnInput(),
        own_loss=False,
        honours_interface=False,
    ),
    Family(
        "longcat_flash",
        "LongcatFlashMoE",
        "router",
        weigh=Weighing(softmax, scale="routed_scaling_factor"),
        bias="router.e_score_correction_bias",
        own_loss=False,
        honours_interface=False,
    ),
    Family(
        "switch_transformers",
        "SwitchTransformersSparseMLP",
        "router",
        output=OneHotOfSequences(),
        jitter="router.jitter_noise",
        drops_counts=True,
        honours_interface=False,
    ),
    Family(
        "nllb_moe",
        "NllbMoeSparseMLP",
        "router",
        weigh=TopTwoGates(),
        output=GateMatrix(),
        drops_counts=True,
        honours_interface=False,
    ),
)
_BY_BLOCK = {family.block: family for family in TABLE}


def all_families() -> tuple[str, ...]:
    """Names of the supported families, as `model_type` spells them."""
    return tuple(family.name for family in TABLE)


@dataclass(frozen=True, eq=False)
class FoundLayer:
    """A mixture layer inside a transformers model.

    Attributes:
        name: of the block in `model.named_modules()`.
        family: its row of the table.
        block: the module that holds router and experts.
        router: decides.
        experts: compute.
    """

    name: str
    family: Family
    block: Any
    router: Any
    experts: Any

    @property
    def num_experts(self) -> int:
        """Experts that the router chooses among, those that compute nothing included."""
        return int(getattr(self.router, "n_routed_experts", None) or self.router.num_experts)

    @property
    def bias(self) -> Tensor | None:
        """The selection bias as the module holds it now, or None."""
        if self.family.bias is None:
            return None
        *path, name = self.family.bias.split(".")
        holder = self.block.get_submodule(".".join(path))
        return getattr(holder, name, None)

    @property
    def groups(self) -> tuple[int, int] | None:
        """Number of expert groups and of groups that a token may use; None where all experts compete."""
        if self.family.groups is None:
            return None
        count, kept = (getattr(self.router, name) for name in self.family.groups)
        if not count or not kept or count == 1 or getattr(self.router, "topk_method", "") == "greedy":
            return None
        return count, kept


def find_layers(model: nn.Module) -> dict[str, FoundLayer]:
    """Every mixture layer of a transformers model by name, in model order.

    Families that the table does not know work if their experts follow transformers' experts interface and their
    router answers `(logits, weights, indices)`.

    Raises:
        ValueError: a model without a mixture layer that we know how to read.
    """
    found = {}
    for name, module in model.named_modules():
        family = _family_of(module)
        if family is not None:
            router = getattr(module, family.router)
            found[name] = FoundLayer(name, family, module, router, module.experts)
    if not found:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"{type(model).__name__} ({kind}) has no mixture layer that moestro can read; it may be dense. "
            f"Supported families: {', '.join(all_families())}"
        )
    return found


def _family_of(module: nn.Module) -> Family | None:
    """The row of a block: by the name of its class or of one that it extends, as wrappers do."""
    for kind in type(module).__mro__:
        if kind.__name__ in _BY_BLOCK:
            return _BY_BLOCK[kind.__name__]
    if not hasattr(getattr(module, "experts", None), "has_gate"):
        return None
    for router in ("gate", "router"):
        if isinstance(getattr(module, router, None), nn.Module):
            return Family("other", type(module).__name__, router, weigh=None, own_loss=False)
    return None
