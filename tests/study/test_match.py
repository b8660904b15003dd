"""Equal active parameters, counted by hand."""

import pytest

from moestro.study.match import TOLERANCE, dense_model, match
from moestro.study.plan import plan_rows
from moestro.study.recipe import Entry, entries, load_study


def matched(study, **entry):
    return match(study, Entry(**entry), vocab_size=256, num_domains=2)


def dense_size(study):
    """Embedding, attention, norms and three matrices of the feed-forward network, by layer."""
    model = study.model
    layer = 4 * model.width**2 + 2 * model.width + 3 * model.width * study.dense_hidden
    return 256 * model.width + model.num_layers * layer + model.width


def test_two_of_four_experts_share_the_hidden_size_of_the_dense_model(tiny_study):
    study = tiny_study(model={"num_experts": 4, "dense_hidden": 64, "width": 16, "num_layers": 1, "num_heads": 2})
    found = matched(study, method="mixtral")
    router, hidden = 4 * 16, found.model.expert_hidden
    assert found.active == dense_size(study) - 3 * 16 * 64 + router + 2 * 3 * 16 * hidden
    assert found.off == pytest.approx(found.active / dense_size(study) - 1)
    assert hidden in (31, 32)  # 2 x 32 = 64, and the router takes its share
    assert found.note == ""


def test_one_expert_gets_all_of_it(tiny_study):
    study = tiny_study(model={"num_experts": 4, "dense_hidden": 64, "width": 16, "num_layers": 1, "num_heads": 2})
    assert matched(study, method="switch").model.expert_hidden in (62, 63)
    assert matched(study, method="hash-layers").model.expert_hidden == 64


def test_options_keep_to_the_experts_per_token_of_the_study(tiny_study):
    study = tiny_study(top_k=3)
    assert matched(study, method="olmoe").model.options == {"top_k": 3}
    assert matched(study, method="llama4").model.options == {"top_k": 1}  # its own default is lower
    assert matched(study, method="olmoe", options={"top_k": 4}).model.options == {"top_k": 4}


def test_a_method_that_cannot_be_matched_says_so(tiny_study):
    found = matched(tiny_study(), method="mixtral", expert_hidden=64)
    assert found.model.expert_hidden == 64
    assert found.off > TOLERANCE
    assert "more active parameters" in found.note


def test_a_method_that_cannot_be_built_says_why(tiny_study):
    with pytest.raises(ValueError, match="top_k"):
        matched(tiny_study(), method="mixtral", options={"top_k": 9})
    row = plan_rows(tiny_study(methods=[{"method": "mixtral", "options": {"top_k": 9}}]))[1]
    assert row.match is None
    assert "top_k" in row.problem


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["study", "study-first"])
def test_every_row_of_a_shipped_study_is_matched(name):
    study = load_study(name)
    dense = dense_model(study)
    assert dense.dense_hidden == study.dense_hidden
    for entry in entries(study):
        assert abs(matched(study, **entry.model_dump()).off) <= TOLERANCE, entry.label
