# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the README and the guides show runs; ``make docs`` builds them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Those that start processes, seconds for each.
SLOW = {"processes.md", "checkpoints.md"}
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
pytestmark = pytest.mark.skipif(
    not (ROOT / "docs").exists(), reason="away from the source tree"
)


def snippets(file: Path) -> str:
    """The Python of a page, other lines left empty, so that errors name the line."""
    is_code, lines = False, []
    for line in file.read_text().splitlines():
        if line.startswith("```"):
            is_code = line == "```python"
            line = ""
        lines.append(line if is_code else "")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(
            file,
            id=str(file.relative_to(ROOT)),
            marks=[pytest.mark.slow] if file.name in SLOW else [],
        )
        for file in FILES
        if file.exists() and snippets(file).strip()
    ],
)
def test_snippets(file, tmp_path, monkeypatch):
    """All of a page, one after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    exec(compile(snippets(file), file, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links(file):
    """Sphinx looks at those between guides; here, at all files that are named."""
    targets = re.findall(r"\]\(([^)#\s]+)", file.read_text())
    missing = [t for t in targets if not (file.parent / t).exists()]
    assert missing == []
    for name in re.findall(r"\bexamples/\w+\.py\b", file.read_text()):
        assert (ROOT / name).exists(), name
