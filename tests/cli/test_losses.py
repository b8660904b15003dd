"""`moestro losses` lists every way of balancing, for people and for machines."""

import json

import pytest

from moestro.balance.catalogue import BALANCINGS
from moestro.cli.app import main


def output(capsys, *words):
    assert main(words) == 0
    return capsys.readouterr().out


def test_losses_controllers_and_capacities_are_listed(capsys):
    text = output(capsys, "losses")
    for entry in BALANCINGS:
        assert entry.name in text
        assert entry.formula in text
    for choice in ("micro-batch", "step", "pooled", "PerSequence", "GlobalBatchBalance"):
        assert choice in text


def test_machines_also_get_the_methods_that_use_a_part(capsys):
    rows = {row["name"]: row for row in json.loads(output(capsys, "losses", "--json"))}
    assert "mixtral" in rows['LoadTimesProbability("transformers")']["methods"]
    assert "switch" not in rows['LoadTimesProbability("transformers")']["methods"]
    assert rows["LossFreeBias(rate)"]["methods"] == ["deepseek-v3", "ernie-4-5"]
    assert "skywork-moe" in rows['LoadTimesProbability("megatron")']["methods"]
    assert rows["DropByPriority(train, evaluate)"]["methods"] == []
    assert rows["ZLoss"]["file"] == "moestro/balance/losses.py"


def test_one_kind_only_and_unknown_kinds(capsys):
    text = output(capsys, "losses", "--kind", "controller")
    assert "LossFreeBias" in text
    assert "ZLoss" not in text
    assert main(["losses", "--kind", "optimiser"]) == 2
    assert "choose one of loss, controller, capacity" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["loss", "controller", "capacity"])
def test_each_kind_has_parts(kind):
    assert [entry for entry in BALANCINGS if entry.kind == kind]
