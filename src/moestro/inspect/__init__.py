"""From what a run recorded to a number, a table or a page: statistics, specialisation, the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moestro.inspect.model_page import write_model_page
    from moestro.inspect.report import write_report
    from moestro.inspect.specialisation import SpecialisationCounter
    from moestro.inspect.statistics import LayerTally, layer_statistics, record_of, routing_record, tally_of
    from moestro.inspect.strip import load_strip
    from moestro.inspect.study_page import write_study_page
    from moestro.inspect.survey import Survey

_HOMES = {
    "LayerTally": "statistics",
    "SpecialisationCounter": "specialisation",
    "Survey": "survey",
    "layer_statistics": "statistics",
    "load_strip": "strip",
    "record_of": "statistics",
    "routing_record": "statistics",
    "tally_of": "statistics",
    "write_model_page": "model_page",
    "write_report": "report",
    "write_study_page": "study_page",
}

__all__ = [
    "LayerTally",
    "SpecialisationCounter",
    "Survey",
    "layer_statistics",
    "load_strip",
    "record_of",
    "routing_record",
    "tally_of",
    "write_model_page",
    "write_report",
    "write_study_page",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the report reads files and needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moestro.inspect' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"moestro.inspect.{_HOMES[name]}"), name)
