"""Names the catalogue entry of a test, so that `pytest -k <id>` finds it."""

import pytest


def entry(*names: str) -> pytest.MarkDecorator:
    """The test gets the entry's name as its argument `method`."""
    return pytest.mark.parametrize("method", names)
