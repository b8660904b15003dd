"""The Trainer mix-in adds the exact loss, whatever the accumulation, and trains the selection bias."""

import pytest
import torch
from hf.tiny import tiny_batch, tiny_model
from torch.testing import assert_close

import moestro
from moestro.hf import BalancedTrainer

transformers = pytest.importorskip("transformers")


class Trainer(BalancedTrainer, transformers.Trainer):
    """As users write it; remembers the gradients of the first step."""

    gradients = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return loss


def rows(model, count=8):
    batch = tiny_batch(model, batch=count, length=6)
    batch["attention_mask"] = (torch.arange(6) < torch.arange(count).unsqueeze(1) % 6 + 1).long()
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return [{name: value[row] for name, value in batch.items()} for row in range(count)]


def trained(tmp_path, model, per_step, accumulation, dtype=torch.float64, kind=Trainer, **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=per_step,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        max_grad_norm=0.0,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = kind(model.to(dtype), arguments, train_dataset=rows(model), **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_accumulated_steps_have_the_gradient_of_one_batch(tmp_path, family):
    settings = {"balance": 5.0, "balance_z_loss": 0.1}
    whole = trained(tmp_path, tiny_model(family), 8, 1, **settings).gradients
    for size in (4, 2, 1):
        parts = trained(tmp_path, tiny_model(family), size, 8 // size, **settings).gradients
        for name in whole:
            assert (parts[name] - whole[name]).abs().max() <= 1e-6 * whole[name].abs().max() + 1e-9
    single = trained(tmp_path, tiny_model(family), 2, 4, exact=False, **settings).gradients
    assert any(not torch.allclose(single[name], whole[name], rtol=1e-3) for name in whole)


def test_the_loss_added_is_coefficient_times_the_mean_over_layers(tmp_path):
    model = tiny_model("olmoe")
    trainer = trained(tmp_path, model, 8, 1, balance=3.0)
    fresh = tiny_model("olmoe").double().train()
    log = moestro.watch(fresh, convention="transformers")
    batch = {n: torch.stack([row[n] for row in rows(fresh)]) for n in rows(fresh)[0]}
    with log.recording():
        loss = fresh(**batch).loss
    (loss + 3.0 * log.auxiliary_loss()).backward()
    for name, parameter in fresh.named_parameters():
        if parameter.grad is not None:
            assert_close(trainer.gradients[name], parameter.grad)
    logged = next(each for each in trainer.state.log_history if "balance_loss" in each)
    assert logged["balance_loss"] == pytest.approx(float(log.losses()["balance"]))


class LooksTwice(transformers.Trainer):
    """Runs the model once more for its statistics, as TRL's SFTTrainer does."""

    def compute_loss(self, model, inputs, **settings):
        answer = super().compute_loss(model, inputs, **settings)
        with torch.no_grad():
            model(**inputs)
        return answer


def test_a_look_without_gradient_does_not_count(tmp_path):
    expected = trained(tmp_path, tiny_model("deepseek_v3"), 2, 4, balance=5.0, bias_rate=0.01)
    kind = type("Twice", (Trainer, LooksTwice), {})
    found = trained(tmp_path, tiny_model("deepseek_v3"), 2, 4, kind=kind, balance=5.0, bias_rate=0.01)
    for name, gradient in expected.gradients.items():
        assert_close(found.gradients[name], gradient)
    biases = [[layer.bias for layer in moestro.hf.find_layers(each.model).values()] for each in (expected, found)]
    assert all(torch.equal(a, b) for a, b in zip(*biases, strict=True))


def test_the_bias_moves_once_per_optimiser_step(tmp_path):
    model = tiny_model("deepseek_v3")
    before = {name: layer.bias.clone() for name, layer in moestro.hf.find_layers(model).items()}
    trainer = trained(tmp_path, model, 2, 4, dtype=torch.float32, bias_rate=0.25)
    for name, layer in trainer.routing_log.found.items():
        steps = (layer.bias - before[name]) / 0.25
        assert_close(steps, steps.round(), atol=1e-5, rtol=0)
        assert steps.abs().max().round() == 1


def test_what_cannot_balance_is_refused(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    dense = transformers.LlamaConfig(vocab_size=16, hidden_size=64, intermediate_size=8, num_hidden_layers=1)
    for model, settings, message in (
        (transformers.LlamaForCausalLM(dense), {"balance": 0.1}, "no mixture layer"),
        (tiny_model("deepseek_v3"), {}, "no router_aux_loss_coef"),
        (tiny_model("mixtral"), {"bias_rate": 0.1}, "no selection bias"),
        (tiny_model("mixtral"), {"balance": 0}, "balances nothing"),
        (tiny_model("mixtral", output_router_logits=True), {}, "output_router_logits"),
        (tiny_model("mixtral"), {"balance_convention": "gshard2"}, "unknown convention"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(model, arguments, **settings)
