"""The guide's code runs as written, from top to bottom."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["guide.md"])
def test_every_python_block_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert blocks
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
    assert "balance loss x" in capsys.readouterr().out


def test_the_page_of_methods_is_the_registry() -> None:
    import moestro
    from moestro.cli.methods import method_facts, methods_page

    ours = [method for method in moestro.all_methods().values() if "moestro/methods/" in method.file]
    page = (DOCS / "methods.md").read_text()
    assert page == methods_page([method_facts(method) for method in ours]), (
        "run: moestro methods --markdown > docs/methods.md"
    )
