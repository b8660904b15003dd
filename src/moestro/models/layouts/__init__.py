"""How models are written so that other libraries open them; the room that knows their names of weights."""

from moestro.models.layouts.choose import LAYOUTS, Choice, choose_layout
from moestro.models.layouts.layout import Layout
from moestro.models.layouts.rules import to_ours, to_theirs

__all__ = ["LAYOUTS", "Choice", "Layout", "choose_layout", "to_ours", "to_theirs"]
