"""The tables of the documentation are those that the code makes."""

import re

import doc_tables
import pytest

from gradjax.cure.remedies import REMEDIES
from gradjax.diagnosis.rules import CAUSAL
from gradjax.replay.reasons import REASONS
from support import ROOT

PLACES = (
    ("diagnosis.md", "pathologies", CAUSAL),
    ("my-loss-is-nan.md", "meanings", CAUSAL),
    ("my-loss-is-nan.md", "reasons", REASONS),
    ("cure.md", "remedies", REMEDIES),
)


def test_no_table_is_stale():
    assert not doc_tables.stale(ROOT / "docs"), "run python scripts/doc_tables.py"


@pytest.mark.parametrize(("page", "name", "entries"), PLACES)
def test_a_page_has_its_table_with_every_row(page, name, entries):
    marked = doc_tables.MARKED.findall((ROOT / "docs" / page).read_text())
    assert [found[1] for found in marked] == [table for at, table, _ in PLACES if at == page]
    (text,) = (found[2] for found in marked if found[1] == name)
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(entries)


def test_a_stale_table_is_found_and_mended(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("above\n\n<!-- table: meanings -->\n| old |\n<!-- end -->\n\nbelow\n")
    monkeypatch.setattr(doc_tables, "DOCS", tmp_path)
    monkeypatch.setattr("sys.argv", ["doc_tables.py", "--check"])
    assert doc_tables.main() == 1 and "stale" in capsys.readouterr().err
    assert "| old |" in page.read_text()
    monkeypatch.setattr("sys.argv", ["doc_tables.py"])
    assert doc_tables.main() == 0
    text = page.read_text()
    assert text.startswith("above\n\n<!--") and text.endswith("<!-- end -->\n\nbelow\n")
    assert "`dead_units`" in text and "| old |" not in text
    monkeypatch.setattr("sys.argv", ["doc_tables.py", "--check"])
    assert doc_tables.main() == 0


def test_an_unknown_table_is_one_clear_error():
    with pytest.raises(ValueError, match="no table 'remedy'; there are pathologies, meanings"):
        doc_tables.rewritten("<!-- table: remedy -->\n<!-- end -->")
