"""What docs/parallel.md takes from the code is what the code says."""

import importlib.util
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parallel_page", DOCS / "parallel_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_bytes_is_that_of_the_closed_forms(generator: ModuleType) -> None:
    text = (DOCS / "parallel.md").read_text()
    assert generator.page(text) == text, "run: python docs/parallel_page.py"


def test_every_transport_is_in_the_table_or_named_below_it(generator: ModuleType) -> None:
    from moestro.parallel import all_transports

    assert set(all_transports()) - set(generator.USES) == {"drop-copies", "measured", "granular"}


def test_the_picture_is_drawn_from_the_groups(generator: ModuleType) -> None:
    drawn = (DOCS / "mesh.svg").read_text()
    assert generator.mesh_picture() == drawn, "run: python docs/parallel_page.py"
    words = ["".join(each.itertext()) for each in ElementTree.fromstring(drawn).iter() if each.tag.endswith("text")]
    assert [word for word in words if word.startswith("rank ")] == [f"rank {rank}" for rank in range(8)]
