# Copyright (c) the torchrl_vecnorm authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What `make matrix` makes of what it finds. It is not run: each torch is gigabytes."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bench", reason="the source folder is not on the path")

from bench import matrix

SUITE = """
import pytest
def test_good(): pass
def test_bad(): assert False
def test_worse(missing): pass
@pytest.mark.skip(reason="not here")
def test_left_out(): pass
@pytest.mark.skip(reason="not here")
def test_left_out_too(): pass
"""


def test_what_became_of_tests(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    report = tmp_path / "report.xml"
    pytest_program = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    subprocess.run(
        [*pytest_program, f"--junitxml={report}"], cwd=tmp_path, capture_output=True
    )
    tests = matrix.counted(report)
    assert tests == {
        "passed": 1,
        "failed": ["test_suite::test_bad", "test_suite::test_worse"],
        "skipped": {"not here": 2},
    }
    assert matrix.counts(tests) == "1 passed, 2 failed, 2 skipped"


@pytest.mark.slow
def test_a_file_that_cannot_be_imported_fails(tmp_path, monkeypatch):
    """pytest counts it as an error of no test."""
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    environment = matrix.Environment("any")
    environment.python = Path(sys.executable)
    tests = environment.folder / "sdist" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_suite.py").write_text("import a_module_that_is_not_there")
    found = environment.test(["test_suite.py"])
    assert found["passed"] == 0 and len(found["failed"]) == 1
    # Nor is a run that ends before its report well.
    found = environment.test(["test_that_is_not_there.py"])
    assert found["passed"] == 0 and "test_that_is_not_there" in found["failed"][0]


@pytest.mark.parametrize(
    "text,error",
    [
        (
            "ok\nerror: subprocess-exited-with-error\n a.h(7): error: too much\nERROR: no",
            "a.h(7): error: too much",
        ),
        ("Traceback\nImportError: no such name\n", "ImportError: no such name"),
        ("killed\n", "killed"),
        ("", "no output"),
    ],
)
def test_what_went_wrong(text, error):
    assert matrix.error_in(text) == error


def test_a_page():
    rows = {
        "1": {"installed": False, "built": False, "imported": False, "error": "none"},
        "2": {
            **{"installed": True, "built": True, "imported": True},
            **{"torch": "2.0", "import_ms": 20.4},
            "tests": {"passed": 3, "failed": ["a::b"], "skipped": {"old": 2}},
            "beside": {"error": "no torchrl"},
        },
    }
    text = f"before\n{matrix.BEGIN}what was here\n{matrix.END}\nafter"
    assert matrix.page(text, rows).splitlines() == [
        "before",
        matrix.BEGIN.strip(),
        "| torch | built | imported | with torch alone | against torchrl's class |",
        "|---|---|---|---|---|",
        "| 1 | – | no | – | – |",
        "| 2.0 | yes | 20 ms | 3 passed, 1 failed, 2 skipped | – |",
        "",
        "- 1: `none`",
        "- 2.0 fails `a::b`",
        "- 2.0 skips 2: old",
        "- 2.0: `no torchrl`",
        matrix.END,
        "after",
    ]
    assert not any(map(matrix.is_good, rows.values()))


def test_the_committed_page():
    """It is of the committed results, and these of what the metadata promise."""
    results = matrix.results()
    assert results.keys() >= set(matrix.VERSIONS)
    text = matrix.PAGE.read_text()
    assert matrix.page(text, results) == text
    metadata = (matrix.ROOT / "pyproject.toml").read_text()
    assert f'"torch>={matrix.VERSIONS[0]}"' in metadata
