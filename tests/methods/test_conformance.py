"""What every registered method must do, whoever registered it."""

from dataclasses import replace

import pytest
import torch
from oracles.layer import run_layer
from torch import Tensor
from torch.testing import assert_close

import moestro
from moestro.balance import RoutingLog
from moestro.experts import all_kernels
from moestro.layers import MoE
from moestro.methods import Method
from moestro.routing import Context

METHODS = list(moestro.all_methods().values())
VOCAB = 31
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
# One method of every kind of routing meets every back end; the others meet two, since kernels know no methods.
ON_EVERY_KERNEL = {
    "switch",
    "gshard-top2",
    "shazeer-noisy-topk",
    "mixtral",
    "deepseek-v3",
    "expert-choice",
    "soft-moe",
    "smear",
    "hash-layers",
}


def domains(num_experts: int) -> int:
    """How many domains the tokens come from, for so many experts."""
    return 1 if num_experts % 2 else 2


def sample_options(method: Method, num_experts: int) -> dict[str, object]:
    """Options that fit a small layer: defaults, with a vocabulary, domains and at most two choices."""
    options: dict[str, object] = {}
    for name, option in method.options.items():
        if name == "vocab_size":
            options[name] = VOCAB
        elif name == "num_domains":
            options[name] = domains(num_experts)
        elif name == "top_k" and option.default is not None:
            options[name] = min(option.default, num_experts, 2)
        elif name == "segment_length":
            options[name] = 12
        elif name == "capacity_factor" and method.family == "expert-choice":
            options[name] = min(option.default, float(num_experts))
    return options


def fits(method: Method, num_experts: int, width: int = 6, **options: object) -> bool:
    try:
        make(method, num_experts=num_experts, width=width, **options)
    except ValueError:  # two choices among one expert, or more experts than places
        return False
    return True


def make(
    method: Method,
    num_experts: int = 4,
    width: int = 6,
    hidden: int = 5,
    kernel: str = "auto",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **options: object,
) -> MoE:
    """A layer with lively weights: biases and whatever starts at zero are drawn too."""
    torch.manual_seed(seed)
    moe = moestro.build(
        method.name,
        width=width,
        hidden=hidden,
        num_experts=num_experts,
        kernel=kernel,
        bias=True,
        **{**sample_options(method, num_experts), **options},
    ).to(dtype)
    with torch.no_grad():
        for parameter in moe.parameters():
            if parameter.dim():
                parameter.normal_(0, 0.5)
    return moe


def context(
    num_tokens: int, length: int | None = None, valid: Tensor | None = None, num_experts: int = 4
) -> Context:
    length = length or max(num_tokens, 1)
    place = torch.arange(num_tokens)
    ids = torch.randint(VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))
    return Context(
        token_ids=ids,
        sequence=place // length,
        position=place % length,
        valid=valid,
        domain=ids % domains(num_experts),
    )


def gradients(y: Tensor, moe: MoE, x: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*[("x", x), *moe.named_parameters()], strict=True)
    target = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    grads = torch.autograd.grad((y * target).sum(), parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, grads, strict=True)
    }


CASES = {
    "zero tokens": {"tokens": 0},
    "one token": {"tokens": 1},
    "many": {"tokens": 24},
    "every expert chosen": {"tokens": 7, "every": True},
    "one expert": {"tokens": 5, "experts": 1},
    "all to one expert": {"tokens": 9, "tilt": True},
    "tied logits": {"tokens": 6, "tie": True},
    "width 1": {"tokens": 8, "width": 1},
    "width 7": {"tokens": 8, "width": 7, "hidden": 3},
    "width 250": {"tokens": 4, "width": 250, "hidden": 17, "experts": 3},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize(
    ("method", "kernel"),
    [
        pytest.param(method, kernel, id=f"{method.name}-{kernel}")
        for method in METHODS
        for kernel in (all_kernels("cpu") if method.name in ON_EVERY_KERNEL else ["auto", "padded"])
    ],
)
def test_layer_equals_the_loop(
    method: Method, dtype: torch.dtype, tolerance: float, case: str, kernel: str
) -> None:
    settings = CASES[case]
    num_experts = settings.get("experts", 4)
    width, hidden = settings.get("width", 6), settings.get("hidden", 5)
    options = {"top_k": num_experts} if "every" in settings and "top_k" in method.options else {}
    if not fits(method, num_experts, width, **options):
        small = num_experts == 1 or width < num_experts or options
        assert small, "only one expert, a narrow layer or a choice of all experts may be refused"
        return
    moe = make(method, num_experts, width, hidden, kernel, dtype, **options)
    tokens = settings["tokens"]
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    if "tie" in settings:
        with torch.no_grad():
            for parameter in moe.router.parameters():
                parameter.zero_() if parameter.dim() else None
    if "tilt" in settings:
        with torch.no_grad():
            x += 3
            for parameter in moe.router.parameters():
                if parameter.dim() == 2:
                    parameter[0] = 1.0
    facts = context(tokens, num_experts=num_experts)
    torch.manual_seed(1)
    decision = moe.route(x, facts)
    decision.routing.check()
    fast, slow = moe.run(x, decision), run_layer(moe, x, decision)
    scale = max(1.0, float(slow.detach().abs().max())) if slow.numel() else 1.0
    assert_close(fast, slow, rtol=tolerance, atol=tolerance * scale)
    torch.manual_seed(1)
    expected = gradients(run_layer(moe, x, moe.route(x, facts)), moe, x)
    torch.manual_seed(1)
    # gradients of routers are differences of products with outputs, and round as these do
    for name, gradient in gradients(moe(x, facts), moe, x).items():
        size = max(scale, float(expected[name].abs().max())) if expected[name].numel() else scale
        assert_close(
            gradient, expected[name], rtol=tolerance, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}"
        )


@each_method
def test_routing_says_what_was_chosen(method: Method) -> None:
    moe = make(method)
    decision = moe.route(torch.randn(12, 6, dtype=torch.float64), context(12, valid=torch.arange(12) % 5 > 0))
    matrix = decision.routing.combine_matrix()
    assert matrix.shape == (12, moe.experts.num_experts)
    assert not matrix[::5].any(), "padding has no expert"
    choice = decision.notes.get("choice")
    if choice is None:
        return
    kept = decision.notes["kept"]
    chosen = torch.zeros_like(matrix, dtype=torch.bool)
    for t in range(12):
        for j in range(choice.shape[1]):
            chosen[t, choice[t, j]] |= kept[t, j]
    assert not matrix[~chosen].any()
    if "shared_weight" not in decision.notes:  # a mixing gate may be exactly zero
        assert torch.equal(matrix != 0, chosen)
    if "gradient_only" not in decision.notes:  # pairs of weight zero that only teach the router
        assert torch.equal(decision.routing.load(), chosen.sum(0))


@each_method
def test_padding_changes_nothing(method: Method) -> None:
    moe = make(method).eval()
    x = torch.randn(12, 6, dtype=torch.float64)
    valid = torch.tensor([True, True, False, True, True, False, True, True, True, False, True, False])
    whole, inner = context(12, 6, valid), context(12, 6)
    padded = moe(x, whole)
    assert not padded[~valid].any()
    fields = {name: getattr(inner, name)[valid] for name in ("token_ids", "sequence", "position", "domain")}
    assert_close(padded[valid], moe(x[valid], Context(**fields)), rtol=1e-12, atol=1e-12)


@each_method
def test_padding_may_hold_anything(method: Method) -> None:
    moe = make(method)
    log = RoutingLog(moe)
    x = torch.randn(9, 6, dtype=torch.float64)
    valid = torch.arange(9) % 3 > 0
    x[~valid] = torch.nan
    x.requires_grad_()
    with log.recording():
        y = moe(x, context(9, valid=valid))
    (y.sum() + log.auxiliary_loss()).backward()
    assert y.isfinite().all()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@each_method
def test_no_valid_token_gives_zeros_and_no_nan(method: Method) -> None:
    moe = make(method)
    log = RoutingLog(moe)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    with log.recording():
        y = moe(x, context(5, valid=torch.zeros(5, dtype=torch.bool)))
    (y.sum() + log.auxiliary_loss()).backward()
    assert not y.detach().any()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether outputs differ by more than rounding at their size."""
    return not torch.allclose(first, second, rtol=0, atol=1e-12 * max(1.0, float(first.detach().abs().max())))


def changes_earlier(method: Method, seed: int, training: bool) -> bool:
    """Whether new values of the last tokens change what earlier ones get; a capacity is made to bind."""
    capacity = method.options.get("capacity_factor")
    tight = {"capacity_factor": 0.5} if capacity is not None and capacity.default else {}
    moe = make(method, seed=seed, **tight).train(training)
    x = torch.randn(1, 16, 6, dtype=torch.float64)
    other = x.clone()
    other[:, 10:] += 3 * torch.randn(1, 6, 6, dtype=torch.float64)
    facts = context(16)
    torch.manual_seed(seed)
    first = moe(x, facts)[:, :10]
    torch.manual_seed(seed)
    return differ(first, moe(other, facts)[:, :10])


@each_method
def test_causal_is_true_exactly_when_later_tokens_cannot_reach_back(method: Method) -> None:
    assert make(method).causal == method.causal
    reaches_back = any(changes_earlier(method, seed, training) for seed in range(12) for training in (False, True))
    assert reaches_back != method.causal


@each_method
def test_a_causal_rule_for_evaluation_is_causal(method: Method) -> None:
    if make(method).causal_evaluation:
        assert not any(changes_earlier(method, seed, training=False) for seed in range(12))


def changes_neighbours(method: Method, seed: int) -> bool:
    """Whether new values and ids of one sequence change what another one gets."""
    moe = make(method, seed=seed, num_experts=4).eval()
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    other = x.clone()
    other[0] = 3 * torch.randn(8, 6, dtype=torch.float64) + 2
    facts = context(24, 8)
    ids = torch.cat([torch.randint(VOCAB, (8,)), facts.token_ids[8:]])
    renamed = replace(facts, token_ids=ids, domain=ids % domains(4))
    return differ(moe(x, facts)[1:], moe(other, renamed)[1:])


@each_method
def test_batch_independent_is_true_exactly_when_neighbours_do_not_matter(method: Method) -> None:
    assert make(method).batch_independent == method.batch_independent
    assert any(changes_neighbours(method, seed) for seed in range(40)) != method.batch_independent


@each_method
def test_permuting_sequences_permutes_outputs(method: Method) -> None:
    if not method.batch_independent:
        return
    moe = make(method).eval()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    facts, order = context(12, 3), torch.tensor([2, 0, 3, 1])
    moved = {name: getattr(facts, name).view(4, 3)[order].flatten() for name in ("token_ids", "domain")}
    permuted = Context(position=facts.position, **moved)
    assert_close(moe(x[order], permuted), moe(x, facts)[order], rtol=1e-12, atol=1e-12)


@each_method
def test_one_expert_is_that_expert(method: Method) -> None:
    if not fits(method, 1):
        return
    moe = make(method, num_experts=1).eval()
    if moe.experts.num_experts > 1 or hasattr(moe.experts, "network"):  # the method brings more than that expert
        return
    x = torch.randn(3, 6, dtype=torch.float64)
    decision = moe.route(x, context(3, num_experts=1))
    if method.family == "soft" and len(decision.routing.token) == 1:  # the only slot is one mixture of all tokens
        assert_close(moe.run(x, decision), moe.run(x, decision)[:1].expand(3, 6))
        return
    weight = decision.routing.combine_matrix()
    scaled = getattr(decision.routing, "scale", "output") == "input"
    rows = moe.experts(x * weight if scaled else x, torch.tensor([0, 3]))
    expected = rows if scaled else rows * weight
    if moe.shared is not None:
        expected = expected + moe.shared(x) * decision.notes.get("shared_weight", torch.ones(3)).unsqueeze(1)
    assert_close(moe.run(x, decision), expected)


@each_method
def test_evaluation_is_deterministic(method: Method) -> None:
    moe = make(method).eval()
    x, facts = torch.randn(2, 8, 6, dtype=torch.float64), context(16, 8)
    assert torch.equal(moe(x, facts), moe(x, facts))


@each_method
def test_bfloat16_stays_bfloat16_and_the_router_decides_in_float32(method: Method) -> None:
    moe = make(method, dtype=torch.bfloat16)
    x = torch.randn(10, 6, dtype=torch.bfloat16)
    decision = moe.route(x, context(10))
    assert moe.run(x, decision).dtype == torch.bfloat16
    for scores in (decision.logits, decision.probs):
        assert scores is None or scores.dtype == torch.float32
    exact = moe.float().run(x.float(), decision)
    assert_close(
        moe.bfloat16().run(x, decision).float(), exact, rtol=0.05, atol=0.1 * float(exact.detach().abs().max())
    )


@each_method
def test_options_and_weights_round_trip(method: Method) -> None:
    moe = make(method).eval()
    again = moestro.build(method.name, width=6, hidden=5, num_experts=4, bias=True, **moe.options).double().eval()
    again.load_state_dict(moe.state_dict())
    x, facts = torch.randn(2, 4, 6, dtype=torch.float64), context(8, 4)
    assert torch.equal(moe(x, facts), again(x, facts))
    assert again.options == moe.options


@each_method
def test_gradients_are_finite_and_reach_a_router_that_learns(method: Method) -> None:
    moe = make(method)
    log = RoutingLog(moe)
    x = torch.randn(2, 16, 6, dtype=torch.float64, requires_grad=True)
    with log.recording():
        y = moe(x, context(32, 16))
    log.auxiliary_loss().backward(retain_graph=True) if log.auxiliary_loss().requires_grad else None
    taught = {name for name, p in moe.router.named_parameters() if p.grad is not None and p.grad.any()}
    moe.zero_grad()
    y.square().sum().backward()
    for name, parameter in moe.named_parameters():
        if parameter.grad is None:
            by_loss = name.removeprefix("router.") in taught  # e.g. autoencoders that only reconstruct
            rewarded = name.startswith("router.value")  # a baseline learns from rewards, after the model has run
            assert by_loss or rewarded or name.startswith("router.noise"), (
                f"{name} received no gradient from task or loss"
            )
        else:
            assert parameter.grad.isfinite().all(), name
    reached = [p.grad is not None and bool(p.grad.any()) for p in moe.router.parameters()]
    separate = taught and all(p.grad is None for p in moe.router.parameters())  # by design, only a loss teaches it
    assert any(reached) or separate or not reached


@each_method
def test_the_entry_is_complete(method: Method) -> None:
    assert method.summary.endswith(".")
    assert method.title
    assert 1990 < method.year < 2100
    assert method.catalogue
    assert f"{method.year}" in method.bibtex()
    counts = make(method).parameter_counts()
    assert counts.total == sum(p.numel() for p in make(method).parameters())
    assert 0 < counts.active <= counts.total


@each_method
def test_a_misspelt_option_names_what_the_method_takes(method: Method) -> None:
    with pytest.raises(ValueError, match=f"{method.name} has no option 'capacity_facto'.*it takes"):
        make(method, capacity_facto=1)
