"""The code of the page about transformers runs as written, from top to bottom, and its tables are complete."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from hf.test_trainer import rows
from hf.tiny import tiny_batch, tiny_model

import moestro
from moestro.hf import all_families

PAGE = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()


class LightningModule(torch.nn.Module):
    """What the page's block needs of Lightning, which is not installed here: the optimiser's step."""

    def optimizer_step(self, optimizer):
        optimizer.step()


def test_every_python_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("deepseek_v3").train()
    batch = tiny_batch(model)
    arguments = transformers.TrainingArguments(
        output_dir="out", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    scope = {
        "model": model,
        "batch": batch,
        "batches": [batch],
        "micro_batches": [batch, tiny_batch(model, seed=1)],
        "optimizer": torch.optim.SGD(model.parameters(), lr=1e-3),
        "partial": partial,
        "lightning": SimpleNamespace(LightningModule=LightningModule),
        "transformers": transformers,
        "arguments": arguments,
        "data": rows(model),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, "transformers.md", "exec"), scope)
    module, (layer,) = scope["Module"](), moestro.hf.find_layers(model).values()
    module.model, module.routing = model, moestro.watch(model, bias_rate=0.001)
    module.training_step(batch, 0).backward()
    before = layer.bias.clone()
    module.optimizer_step(scope["optimizer"])
    assert (layer.bias - before).abs().max() > 5e-4
    assert "model.layers.1.mlp" in capsys.readouterr().out


def test_every_family_and_finding_is_on_the_page():
    import moestro.hf.doctor

    source = Path(moestro.hf.doctor.__file__).read_text()
    findings = set(re.findall(r'Finding\("([a-z-]+)"', source))
    assert findings == set(re.findall(r"^\| `([a-z-]+)`", PAGE, flags=re.MULTILINE))
    assert all(family in PAGE for family in all_families())
