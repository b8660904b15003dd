"""What `watch` reports is what the model did, and its losses are exact however a batch is split."""

from functools import partial

import pytest
import torch
from hf.tiny import FAMILIES, tiny_batch, tiny_model
from torch.testing import assert_close

import moestro
from moestro.balance.losses import load_times_probability
from moestro.hf import convert_coefficient, exact_bias, find_layers

SIGMOID = ("minimax_m2", "deepseek_v3", "glm4_moe", "dots1", "lfm2_moe", "afmoe", "llama4_text")


@pytest.mark.parametrize("family", FAMILIES)
def test_decisions_say_what_the_router_answered(family):
    model = tiny_model(family)
    answers = {}
    for name, layer in find_layers(model).items():
        layer.router.register_forward_hook(lambda m, a, out, name=name: answers.setdefault(name, out))
    log = moestro.watch(model)
    batch = tiny_batch(model, padding=3)
    with log.recording():
        model(**batch)
    assert list(log.decisions) == log.layers == list(answers)
    for name, (decision,) in log.decisions.items():
        decision.routing.check()
        tokens = batch["attention_mask"].numel()
        valid = batch["attention_mask"].bool().flatten()
        assert torch.equal(decision.notes["valid"], valid)
        assert decision.routing.load().sum() == decision.notes["kept"].sum() <= decision.notes["choice"].numel()
        matrix = decision.routing.combine_matrix()
        assert (
            matrix.shape == decision.logits.shape == decision.probs.shape == (tokens, log.found[name].num_experts)
        )
        assert not matrix[~valid].any()
        assert_close(matrix[valid], expected_matrix(family, answers[name])[valid].float())
        wanted = decision.probs + decision.notes.get("bias", 0)
        picked = wanted.gather(1, decision.notes["choice"])
        assert bool((picked[:, :-1] >= picked[:, 1:]).all())  # in order of preference
        gate = torch.sigmoid if family in SIGMOID else partial(torch.softmax, dim=-1)
        assert_close(decision.probs, gate(decision.logits))
        assert ("bias" in decision.notes) == (log.found[name].bias is not None)
        assert ("group" in decision.notes) == (family in ("deepseek_v2", "deepseek_v3", "glm4_moe"))


def expected_matrix(family, answer):
    """Combine weights straight from the router's output."""
    if family == "llama4_text":
        return answer[0]
    if family == "nllb_moe":
        return answer[1]
    if family == "switch_transformers":
        return (answer[0] * answer[1]).flatten(0, 1)
    logits, weights, index = answer
    return torch.zeros_like(logits).scatter(1, index, weights.to(logits.dtype))


def collapsed(num_layers=4):
    """A top-1 model with a different expert chosen by every token in every layer."""
    model = tiny_model("olmoe", num_experts=4, top_k=1, num_hidden_layers=num_layers)
    with torch.no_grad():
        for index, layer in enumerate(find_layers(model).values()):
            layer.router.weight.zero_()
            layer.router.register_forward_pre_hook(lambda m, args: (torch.ones_like(args[0]),))
            layer.router.weight[index % 4] = 3.0  # logit 72, the others 0
    return model


def test_four_collapsed_layers_score_four_where_transformers_says_one():
    model = collapsed()
    batch = tiny_batch(model)
    log = moestro.watch(model)
    with log.recording():
        theirs = model(**batch, output_router_logits=True).aux_loss
    assert_close(theirs.detach(), torch.tensor(1.0))
    assert_close(log.auxiliary_loss().detach(), torch.tensor(4.0))
    assert list(log.layer_losses().values()) == pytest.approx([4.0] * 4)
    assert_close(log.auxiliary_loss(convention="transformers", layers="pooled").detach(), theirs.detach())


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss", "jamba", "granitemoe"])
def test_pooled_transformers_convention_is_what_transformers_computes(family):
    model = tiny_model(family)
    batch = tiny_batch(model, padding=4)
    log = moestro.watch(model)
    with log.recording():
        theirs = model(**batch, output_router_logits=True).aux_loss
    assert_close(log.auxiliary_loss(convention="transformers", layers="pooled"), theirs)


@pytest.mark.parametrize("convention", ["megatron", "transformers"])
def test_conventions_convert_exactly(convention):
    model = tiny_model("qwen3_moe", top_k=3)
    log = moestro.watch(model)
    with log.recording():
        model(**tiny_batch(model))
    other = "megatron" if convention == "transformers" else "transformers"
    one = 0.3 * log.auxiliary_loss(convention=convention)
    assert_close(convert_coefficient(0.3, convention, other, top_k=3) * log.auxiliary_loss(convention=other), one)
    with pytest.raises(ValueError, match="first choices only"):
        convert_coefficient(0.3, convention, "switch", top_k=3)
    assert convert_coefficient(0.3, convention, "switch", top_k=1) == 0.3
    for name, value in log.layer_losses(convention).items():
        assert value == pytest.approx(
            float(load_times_probability(log.decisions[name][0], convention).detach()), rel=1e-6
        )


def router_gradients(model, log, batches, totals):
    model.zero_grad()
    for batch in batches:
        with log.recording():
            model(**batch)
        log.auxiliary_loss(totals).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def split(batch, sizes, trim=False):
    pieces = [
        dict(zip(batch, each, strict=True)) for each in zip(*(v.split(sizes) for v in batch.values()), strict=True)
    ]
    if trim:  # as a collator would: no more padding than the longest needs
        for piece in pieces:
            longest = max(int(piece["attention_mask"].sum(1).max()), 1)
            piece.update({name: value[:, :longest] for name, value in piece.items()})
    return pieces


@pytest.mark.parametrize("convention", ["switch", "megatron", "transformers"])
@pytest.mark.parametrize(
    ("sizes", "trim"), [([16] * 4, False), ([1, 30, 3, 30], True), ([60, 4], True), ([1] * 64, True)]
)
def test_gradients_of_micro_batches_add_up_to_those_of_one_batch(convention, sizes, trim):
    model = tiny_model("mixtral", num_hidden_layers=2).double()
    batch = tiny_batch(model, batch=64, length=5)
    lengths = torch.randint(0, 6, (64,), generator=torch.Generator().manual_seed(1))
    lengths[-4:] = 0  # a micro-batch of nothing but padding
    batch["attention_mask"] = (torch.arange(5) < lengths.unsqueeze(1)).long()
    log = moestro.watch(model, convention=convention, z_loss=0.1)
    whole = router_gradients(model, log, [batch], None)
    batches = split(batch, sizes, trim)
    totals = log.first_pass(partial(model, **each) for each in batches)
    parts = router_gradients(model, log, batches, totals)
    router = next(n for n in whole if "gate.weight" in n)
    assert whole[router].abs().max() > 1e-4
    for name in whole:
        assert float((parts[name] - whole[name]).abs().max()) <= 1e-6 * float(whole[name].abs().max() + 1e-6)


def test_packed_sequences_count_like_padded_ones():
    model = tiny_model("olmoe").double()
    ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    log = moestro.watch(model)
    padded = {
        "input_ids": torch.zeros(2, 6, dtype=torch.long),
        "attention_mask": torch.zeros(2, 6, dtype=torch.long),
    }
    for row, piece in enumerate((ids[0, :6], ids[0, 6:])):
        padded["input_ids"][row, : len(piece)] = piece
        padded["attention_mask"][row, : len(piece)] = 1
    block = torch.zeros(9, 9, dtype=torch.bool)
    block[:6, :6] = block[6:, 6:] = True
    mask = (block & torch.ones(9, 9).tril().bool()).view(1, 1, 9, 9)
    positions = torch.cat([torch.arange(6), torch.arange(3)]).unsqueeze(0)
    packed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    gradients = [router_gradients(model, log, [each], None) for each in (padded, packed)]
    assert log.decisions[log.layers[0]][0].notes["sequence"].unique_consecutive(return_counts=True)[1].tolist() == [
        6,
        3,
    ]
    for name in gradients[0]:
        assert_close(gradients[1][name], gradients[0][name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("additive", [False, True])
def test_four_dimensional_masks_work_where_transformers_crashes(additive):
    model = tiny_model("mixtral")
    batch = tiny_batch(model, padding=3)
    flat = batch.pop("attention_mask")
    seen = flat.bool()[:, None, None, :] & torch.ones(9, 9).tril().bool()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen
    with pytest.raises(RuntimeError):
        model(**batch, attention_mask=mask, output_router_logits=True)
    log = moestro.watch(model)
    with log.recording():
        model(**batch, attention_mask=mask)
    assert torch.equal(log.decisions[log.layers[0]][0].notes["valid"], flat.bool().flatten())
    losses = [log.auxiliary_loss().detach()]
    with log.recording():
        model(**batch, attention_mask=flat)
    assert_close(log.auxiliary_loss().detach(), losses[0])


def test_nothing_but_padding_gives_zero_where_transformers_gives_nan():
    model = tiny_model("mixtral")
    batch = tiny_batch(model)
    batch["attention_mask"].zero_()
    log = moestro.watch(model, z_loss=1.0)
    with log.recording():
        theirs = model(**batch, output_router_logits=True).aux_loss
    assert theirs.isnan()
    loss = log.auxiliary_loss()
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_mask_that_does_not_fit_is_refused():
    model = tiny_model("mixtral")
    log = moestro.watch(model)
    batch = tiny_batch(model)
    with log.recording(valid=torch.ones(2, 4)):
        model(**batch)
    with pytest.raises(ValueError, match="saw 18 tokens"):
        log.auxiliary_loss()
    with pytest.raises(ValueError, match="nothing was recorded"):
        moestro.watch(model).auxiliary_loss()


BIASED = ["minimax_m2", "deepseek_v3", "glm4_moe", "dots1", "lfm2_moe", "afmoe", "ernie4_5_moe", "longcat_flash"]


@pytest.mark.parametrize("family", BIASED)
def test_the_selection_bias_trains(family):
    model = tiny_model(family).train()
    log = moestro.watch(model, bias_rate=0.01)
    batch = tiny_batch(model, batch=8, padding=2)
    before = {name: layer.bias.clone() for name, layer in log.found.items()}
    for half in split(batch, 4):  # two micro-batches, one update
        with log.recording():
            model(**half)
    with log.recording():
        model.eval()(**batch)  # evaluation does not count
    load = {name: decisions[0].routing.load() for name, decisions in log.decisions.items()}
    log.update_bias()
    for name, layer in log.found.items():
        moved = (layer.bias - before[name]).flatten()
        assert_close(moved, 0.01 * torch.sign(load[name].double().mean() - load[name]).float(), atol=1e-6, rtol=0)
    log.update_bias()  # nothing new was measured
    assert_close((layer.bias - before[name]).flatten(), moved)


def test_training_the_bias_evens_the_load_out():
    model = tiny_model("deepseek_v3", n_group=1, topk_group=1).train()
    batch = tiny_batch(model, batch=16, length=16)
    log = moestro.watch(model, bias_rate=0.02)
    spread = []
    for _ in range(60):
        with log.recording(), torch.no_grad():
            model(**batch)
        load = log.decisions[log.layers[-1]][0].routing.load().float()
        spread.append(float(load.std() / load.mean()))
        log.update_bias()
    assert spread[-1] < spread[0] / 2


def test_a_bias_that_cannot_train_is_refused():
    with pytest.raises(ValueError, match="mixtral has no selection bias"):
        moestro.watch(tiny_model("mixtral"), bias_rate=0.001)
    model = tiny_model("deepseek_v3").to(torch.bfloat16)
    with pytest.raises(ValueError, match="exact_bias"):
        moestro.watch(model, bias_rate=0.001)
    moestro.watch(exact_bias(model), bias_rate=0.001)
    model(**tiny_batch(model)).loss.backward()
    with pytest.raises(ValueError, match="bias_rate"):
        moestro.watch(tiny_model("deepseek_v3")).update_bias()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_records_once_or_says_why_it_cannot(reentrant):
    model = tiny_model("qwen3_moe").train()
    batch = tiny_batch(model)
    log = moestro.watch(model)
    plain = router_gradients(model, log, [batch], None)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.zero_grad()
    with log.recording():
        loss = model(**batch).loss
        if not reentrant:  # the recording is still open: recomputation is not recorded
            (0 * loss + log.auxiliary_loss()).backward()
    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant"):
            log.auxiliary_loss()
        return
    assert all(len(each) == 1 for each in log.decisions.values())
    for name, grad in plain.items():
        assert_close(dict(model.named_parameters())[name].grad, grad)


def test_a_family_that_the_table_does_not_know_is_watched_by_its_form():
    model = tiny_model("qwen3_moe")
    for layer in find_layers(model).values():
        layer.block.__class__ = type("SomeoneElsesMoe", (torch.nn.Module,), {"forward": type(layer.block).forward})
    log = moestro.watch(model)
    assert {layer.family.name for layer in log.found.values()} == {"other"}
    with log.recording():
        model(**tiny_batch(model))
    decision = log.decisions[log.layers[0]][0]
    assert_close(decision.probs, decision.logits.softmax(-1))


def test_closing_takes_every_hook_off():
    model = tiny_model("mixtral")
    count = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before = count()
    log = moestro.watch(model)
    assert count() > before
    log.close()
    assert count() == before


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_looking_without_a_gradient_does_not_take_it_from_the_loss(family):
    """A trained bias reads the decisions when the recording ends, and people print losses under no_grad."""
    gradients = []
    for rate, look in ((None, False), (0.001, False), (None, True)):
        if rate is not None and family == "mixtral":
            continue  # it has no bias
        model = tiny_model(family).train()
        log = moestro.watch(model, bias_rate=rate)
        with log.recording():
            model(**tiny_batch(model))
        if look:
            with torch.no_grad():
                log.layer_losses()
        log.auxiliary_loss().backward()
        gradients.append(next(next(iter(log.found.values())).router.parameters()).grad)
    assert gradients[0].abs().max() > 1e-4
    assert all(torch.equal(each, gradients[0]) for each in gradients)
