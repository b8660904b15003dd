"""What there is to keep experts busy: every loss, controller and capacity policy, with its formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moestro.balance import (
    adaptive,
    controllers,
    levels,
    losses,
    overload,
    quantile,
    smooth,
    sparsity,
    special,
    steps,
)
from moestro.balance.depth import DepthLoss
from moestro.balance.distilled import Distillation, SignedOverload
from moestro.balance.information import TokenInformation
from moestro.balance.localised import LocalisedBalance
from moestro.balance.loss import PerSequence
from moestro.balance.product import ProductBalance
from moestro.balance.reconstruction import Reconstruction
from moestro.balance.selectors import SelectorEntropy
from moestro.routers import capacities, drops, gating_dropout, masks

Kind = Literal["loss", "controller", "capacity"]


@dataclass(frozen=True)
class Balancing:
    """One way of keeping experts busy.

    Attributes:
        kind: what it is.
        part: its class.
        options: what the part is built with where one class has several conventions.
        formula: in the words of its docstring; E experts, k choices, T tokens, D groups, p probabilities, z logits.
        even: a loss's value with even choices and uniform probabilities, as an expression; "" for the others.
        counted: whose tokens or choices it counts.
        paper: where it comes from.
    """

    kind: Kind
    part: type
    formula: str
    counted: str
    paper: str
    even: str = ""
    options: str = ""

    @property
    def name(self) -> str:
        """The part as one would build it."""
        return f"{self.part.__name__}({self.options})" if self.options else self.part.__name__


def _loss(part: type, formula: str, even: str, counted: str, paper: str, options: str = "") -> Balancing:
    return Balancing("loss", part, formula, counted, paper, even, options)


_FP = "E sum_e f_e P_e, P_e = mean p_e, "
LTP = losses.LoadTimesProbability

BALANCINGS: tuple[Balancing, ...] = (
    _loss(LTP, _FP + "f_e = count_e / T", "1", "first choices", "Fedus et al. 2021", '"switch"'),
    _loss(LTP, _FP + "f_e = count_e / (k T)", "1", "all choices", "Qiu et al. 2025", '"megatron"'),
    _loss(LTP, _FP + "f_e = count_e / T", "k", "all choices", "Jiang et al. 2024", '"transformers"'),
    _loss(
        levels.GlobalBatchBalance,
        _FP + "f_e = count_e / (k T) over all ranks",
        "1",
        "all choices of all ranks",
        "Qiu et al. 2025",
    ),
    _loss(
        losses.UnbiasedBalance,
        _FP + "of scores / their sum, counts without bias",
        "1",
        "k best scores",
        "DeepSeek-AI 2024",
    ),
    _loss(
        losses.SequenceBalance,
        "mean over sequences of UnbiasedBalance",
        "1",
        "tokens of a sequence",
        "DeepSeek-AI 2024",
    ),
    _loss(
        PerSequence,
        "mean over sequences of any loss of tokens",
        "that loss",
        "tokens of a sequence",
        "DeepSeek-AI 2024",
        "loss",
    ),
    _loss(
        levels.GroupBalance,
        "sum_g f_g P_g, f_g = D count_g / (k T)",
        "1",
        "all choices per group (device)",
        "Dai et al. 2024",
        "num_groups",
    ),
    _loss(
        levels.CommunicationBalance,
        "sum_g f_g P_g, f_g = D / (M T) tokens sent to g",
        "1",
        "tokens per group (device)",
        "DeepSeek-AI 2024",
        "num_groups, groups_kept",
    ),
    _loss(
        special.PlaceBalance,
        "m sum_j f_j Q_j over m places in a node",
        "1",
        "all choices per place",
        "He et al. 2022",
        "num_nodes",
    ),
    _loss(
        special.SingleChoiceBalance,
        _FP + "f_e of tokens with one expert",
        "1",
        "tokens with one expert",
        "Li et al. 2023",
    ),
    _loss(
        sparsity.AtTemperature,
        _FP + "p = softmax(z / temperature)",
        "1",
        "first choices",
        "Chi et al. 2022",
        "temperature",
    ),
    _loss(
        sparsity.DearExperts,
        "sum_e price_e f_e P_e",
        "k mean(price) / E",
        "all choices",
        "Jin et al. 2024",
        "prices",
    ),
    _loss(
        sparsity.LoadWeightedL1,
        "mean_t sum_e f_e R_e, f_e = E count_e / (k T)",
        "1",
        "experts used",
        "Wang et al. 2024",
        "top_k",
    ),
    _loss(
        losses.Importance,
        "CV^2 of summed combine weights",
        "0",
        "combine weights",
        "Shazeer et al. 2017",
        "variance",
    ),
    _loss(
        losses.SmoothLoad,
        "CV^2 of sum_t Phi((z - threshold without e) / std)",
        "0",
        "chances of a choice",
        "Shazeer et al. 2017",
        "variance",
    ),
    _loss(
        smooth.SoftmaxImportance,
        "CV^2 of summed softmax(z)",
        "0",
        "probabilities",
        "Riquelme et al. 2021",
        "variance",
    ),
    _loss(
        smooth.ThresholdLoad,
        "CV^2 of mean_t Phi((z - threshold) / std)",
        "0",
        "chances of a choice",
        "Riquelme et al. 2021",
        "variance",
    ),
    _loss(
        smooth.TwoLevelLoad,
        "CV^2 of Load_i Load_ij / tokens sent to i",
        "0",
        "chances of a choice",
        "Shazeer et al. 2017",
        "variance",
    ),
    _loss(losses.ZLoss, "mean_t logsumexp(z)^2", "log(E)^2 at z = 0", "tokens", "Zoph et al. 2022"),
    _loss(sparsity.RouterEntropy, "mean_t H(p)", "log(E)", "tokens", "Huang et al. 2024"),
    _loss(TokenInformation, "mean_t H(p) - H(mean_t p)", "0", "tokens", "Shen et al. 2023"),
    _loss(special.TaskInformation, "-I(task; expert)", "0", "tokens per task", "Chen et al. 2023", "num_domains"),
    _loss(ProductBalance, "-log prod_e mean_t p_e", "E log(E)", "tokens", "Wu et al. 2024"),
    _loss(
        LocalisedBalance,
        "Var(Z) / Mean(Z)^2, Z = (1 +- delta) p per sample",
        "delta^2 n / (n - 1)",
        "tokens of a sequence",
        "Dou et al. 2023",
        "delta",
    ),
    _loss(
        special.Locality,
        "KL(devices gone to || own device)",
        "KL(even || own device)",
        "tokens per device",
        "Li et al. 2024",
        "num_devices, smoothing",
    ),
    _loss(special.GateBudget, "|mean(g) - budget|", "|mean(g) - budget|", "tokens", "NLLB team 2022", "budget"),
    _loss(SelectorEntropy, "mean_t sum_j H(r_j)", "k log(E)", "tokens", "Hazimeh et al. 2021"),
    _loss(DepthLoss, "cross entropy of guess and pick", "log(2) at guess 0", "tokens", "Raposo et al. 2024"),
    _loss(SignedOverload, "mean_t (n_e / n - 1) sigmoid(z_e)", "0", "first choices", "Dai et al. 2022"),
    _loss(Distillation, "cross entropy of the light router and the choice", "log(E)", "tokens", "Dai et al. 2022"),
    _loss(
        Reconstruction,
        "mean error of the own autoencoder",
        "that error",
        "tokens",
        "Aljundi et al. 2017",
        "temperature",
    ),
    _loss(
        adaptive.AdaptiveLoss,
        "scale * any loss; a controller moves the scale",
        "scale times that loss",
        "as that loss",
        "Wei et al. 2024",
        "loss, start",
    ),
    _loss(
        steps.WhenSparse,
        "any loss, 0 while tokens choose several experts",
        "that loss",
        "as that loss",
        "Nie et al. 2021",
        "loss",
    ),
    Balancing(
        "controller",
        controllers.LossFreeBias,
        "b_e += rate sign(mean load - load_e)",
        "all choices of a step",
        "Wang et al. 2024",
        options="rate",
    ),
    Balancing(
        "controller",
        quantile.QuantileBias,
        "b_e to the k/E quantile of e's margins",
        "tokens of a step",
        "NVIDIA 2025",
        options="select, rate",
    ),
    Balancing(
        "controller",
        adaptive.AdaptiveSparsity,
        "scale *= rate^sign(used - k T)",
        "experts used in a step",
        "Wang et al. 2024",
        options="loss, top_k, rate",
    ),
    Balancing(
        "controller",
        adaptive.FollowDrops,
        "scale to min(gain * dropped share, largest)",
        "choices dropped in a step",
        "Wei et al. 2024",
        options="loss, gain, largest, decay",
    ),
    Balancing("controller", steps.CountSteps, "router.step += 1", "optimiser steps", "Nie et al. 2021"),
    Balancing(
        "controller",
        overload.CountCarried,
        "total += mean over tokens of g; an expert sits out while its total leads by more than the margin",
        "combine weights in a step",
        "Eigen et al. 2013",
    ),
    Balancing("capacity", capacities.Dropless, "every expert takes all that come", "-", "Gale et al. 2022"),
    Balancing(
        "capacity",
        capacities.DropByPosition,
        "the first `slots` choices: all first ones, then all second ones",
        "valid tokens of a call",
        "Fedus et al. 2021",
        options="train, evaluate",
    ),
    Balancing(
        "capacity",
        capacities.InTraining,
        "another capacity, in training only",
        "as that capacity",
        "DeepSeek-AI 2024",
        options="capacity",
    ),
    Balancing(
        "capacity",
        drops.DropByPriority,
        "as DropByPosition, tokens of the largest weight first",
        "valid tokens of a call",
        "Riquelme et al. 2021",
        options="train, evaluate",
    ),
    Balancing(
        "capacity",
        drops.DropByPositionPerExpert,
        "as DropByPosition, slots of each expert's own",
        "valid tokens of a call",
        "Jin et al. 2024",
        options="slots",
    ),
    Balancing(
        "capacity",
        drops.DropLeastAffine,
        "a budget per group; the lowest weights go",
        "choices of a call",
        "DeepSeek-AI 2024",
        options="num_groups, factor, protected",
    ),
    Balancing(
        "capacity",
        drops.RetryByPosition,
        "as DropByPosition; who overflows tries its next choice",
        "valid tokens of a call",
        "Fedus et al. 2021",
        options="train, evaluate",
    ),
    Balancing(
        "capacity",
        masks.DropAtRandom,
        "as DropByPosition, in random order in training",
        "valid tokens of a call",
        "Kim et al. 2021",
        options="train, evaluate",
    ),
    Balancing(
        "capacity",
        masks.OutputMask,
        "pairs or tokens left out with a probability, in training",
        "-",
        "NLLB team 2022",
        options="capacity, probability, whole_token",
    ),
    Balancing(
        "capacity",
        gating_dropout.SkipLayer,
        "nobody is served in a random share of the calls",
        "-",
        "Liu et al. 2022",
        options="probability",
    ),
    Balancing(
        "capacity",
        gating_dropout.StayLocal,
        "tokens stay on their device in a random share of the calls",
        "-",
        "Liu et al. 2022",
        options="probability, num_devices",
    ),
)
