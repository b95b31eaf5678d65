"""The README's tables are those of the code."""

from __future__ import annotations

import readme_tables

from hotcold.formats.architectures import ARCHITECTURES


def test_tables_are_up_to_date() -> None:
    text = readme_tables.README.read_text(encoding="utf-8")
    assert readme_tables.filled(text) == text, "run tests/readme_tables.py"
    assert all(f"| `{name}` |" in text for name in ARCHITECTURES)
