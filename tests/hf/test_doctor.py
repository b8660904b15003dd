"""The doctor finds every seeded defect, its mends work, and healthy models are healthy."""

import json
import subprocess
import sys

import pytest
import torch
from hf.tiny import FAMILIES, tiny_batch, tiny_model

import moestro
import moestro.hf
from moestro.cli import main
from moestro.hf import BalancedTrainer, diagnose, diagnose_folder, find_layers, use_experts

transformers = pytest.importorskip("transformers")


def names(model):
    return [finding.name for finding in diagnose(model)]


def healthy(family="mixtral", **settings):
    """A model that somebody watches, on our experts."""
    model = use_experts(tiny_model(family, **settings))
    moestro.watch(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_healthy_models_of_every_family_have_no_finding(family):
    assert diagnose(healthy(family)) == []
    model = healthy(family)
    model.accepts_loss_kwargs = False  # what two of them need under accumulation
    assert diagnose(model, accumulation=8) == []


@pytest.mark.parametrize("family", ["switch_transformers", "nllb_moe", "mixtral"])
def test_accumulation_multiplies_the_gradient_where_the_doctor_says_so(family, tmp_path):
    """The first gradient of a plain Trainer with four micro-batches, untold and told."""

    def gradient(accumulation, told):
        model = use_experts(tiny_model(family)).double()
        if told:
            model.accepts_loss_kwargs = False
        seen = {}

        class Trainer(transformers.Trainer):
            def training_step(self, *args, **kwargs):
                loss = super().training_step(*args, **kwargs)
                seen["norm"] = float(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
                return loss

        rows = [{name: value[0] for name, value in tiny_batch(model, batch=1).items()}] * 4  # four times the same
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=rows).train()
        return seen["norm"] ** 0.5

    bites = "accumulated-loss" in [f.name for f in diagnose(use_experts(tiny_model(family)), accumulation=4)]
    assert bites == (family != "mixtral")
    assert gradient(4, told=False) / gradient(4, told=True) == pytest.approx(4 if bites else 1, rel=1e-3)
    if family != "nllb_moe":  # whose capacity depends on the size of the batch
        assert gradient(4, told=True) == pytest.approx(gradient(1, told=True), rel=1e-3)


def test_a_model_that_wants_no_balance_is_healthy():
    assert names(tiny_model("mixtral", router_aux_loss_coef=0.0, hidden=16, width=32)) == []


SEEDED = {
    "dead-router": ("mixtral", {"top_k": 1}),
    "loss-off": ("mixtral", {}),
    "loss-missing": ("llama4_text", {}),
    "pooled-loss": ("olmoe", {"output_router_logits": True}),
    "loss-mask": ("olmoe", {"output_router_logits": True, "num_hidden_layers": 1}),
    "bias-untrained": ("deepseek_v3", {}),
    "unaligned-sizes": ("qwen3_moe", {"experts": None}),
    "slow-experts": ("qwen3_moe", {"num_experts": 32}),
    "jitter-in-place": ("mixtral", {"router_jitter_noise": 0.1}),
    "wrong-experts": ("nllb_moe", {}),
}


@pytest.mark.parametrize("defect", SEEDED)
def test_a_seeded_defect_is_found_and_its_line_mends_it(defect, tmp_path):
    family, settings = SEEDED[defect]
    model = tiny_model(family, **settings)
    found = {finding.name: finding for finding in diagnose(model)}
    assert defect in found
    assert set(found[defect].layers) <= set(find_layers(model))
    line = found[defect].mend
    if "Trainer(" in line:
        line = line.replace("Trainer(...", "Trainer(model, arguments")
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "unused"), report_to=[], use_cpu=True)
    trainer = type("Trainer", (BalancedTrainer, transformers.Trainer), {})
    exec(line, {"model": model, "moestro": moestro, "Trainer": trainer, "arguments": arguments})
    assert defect not in names(model)


def test_defects_that_only_a_state_shows():
    model = tiny_model("deepseek_v3").to(torch.bfloat16)
    assert "bias-rounded" in names(model)
    assert "bias-rounded" not in names(moestro.hf.exact_bias(model))
    model = tiny_model("longcat_flash")
    model.set_experts_implementation("moestro")
    model.config._experts_implementation_internal = "moestro"
    assert "deaf-experts" in names(model)
    assert "deaf-experts" not in names(use_experts(model))
    model = tiny_model("switch_transformers")
    (found,) = [f for f in diagnose(model, accumulation=2) if f.name == "accumulated-loss"]
    exec(found.mend, {"model": model})
    assert "accumulated-loss" not in [f.name for f in diagnose(model, accumulation=2)]
    with pytest.raises(ValueError, match="at least one micro-batch"):
        diagnose(model, accumulation=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [4, 8, 10, 12, 16])
def test_unaligned_sizes_are_those_that_crash(dtype, hidden):
    model = tiny_model("olmoe", experts="grouped_mm", hidden=hidden, width=32).to(dtype)
    predicted = "unaligned-sizes" in names(model)
    try:
        model(**tiny_batch(model))
        crashed = False
    except RuntimeError:
        crashed = True
    assert predicted == crashed


def router_gradient(model):
    model.zero_grad()
    model(**tiny_batch(model)).loss.backward()
    return max(float(p.grad.abs().max()) for n, p in model.named_parameters() if "gate.weight" in n)


def test_dead_routers_are_dead_until_revived():
    model = tiny_model("mixtral", top_k=1)
    assert router_gradient(model) < 1e-6
    assert router_gradient(moestro.hf.revive_routers(model)) > 1e-3
    with pytest.raises(ValueError, match="nothing to revive"):
        moestro.hf.revive_routers(model)
    assert "dead-router" not in names(tiny_model("olmoe", top_k=1))  # weights not normalised


def test_jitter_changes_the_caller_until_inputs_are_protected():
    model = tiny_model("mixtral", router_jitter_noise=0.1).train()
    block = next(iter(find_layers(model).values())).block
    x = torch.randn(1, 4, 24)
    before = x.clone()
    block(x)
    assert not torch.equal(x, before)
    moestro.hf.protect_inputs(model)
    x = before.clone()
    block(x)
    assert torch.equal(x, before)


@pytest.fixture
def folder(tmp_path):
    tiny_model("deepseek_v3", hidden=16, width=32).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_judged_by_its_configuration_alone(folder):
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    assert [finding.name for finding in diagnose_folder(folder)] == ["bias-untrained"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_every_family_is_judged_like_its_loaded_model(family, tmp_path):
    model = tiny_model(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [f.name for f in diagnose_folder(tmp_path)] == names(loaded)


def test_the_command_prints_findings_and_their_mends(folder, capsys):
    assert main(["doctor", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "bias-untrained" in out
    assert "mend: log = moestro.watch(model, bias_rate=0.001)" in out
    assert main(["doctor", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["name"] == "bias-untrained"
    config = json.loads((folder / "config.json").read_text())
    for broken, message in (
        ({**config, "auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
        ({**config, "model_type": "nothing"}, "nothing"),
        ({**config, "architectures": ["NoSuchModel"]}, "NoSuchModel"),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1},
            "no mixture layer",
        ),
    ):
        (folder / "config.json").write_text(json.dumps(broken))
        assert main(["doctor", str(folder)]) == 2
        assert message in capsys.readouterr().err
    assert main(["doctor", str(folder / "nowhere")]) == 2
    assert "nothing at" in capsys.readouterr().err


def test_the_package_and_its_help_stay_light():
    code = (
        "import sys, moestro\nfrom moestro.cli import main\nmain(['--help'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
