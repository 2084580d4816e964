"""Write the tables of the documentation that follow from the code.

    python scripts/doc_tables.py           # rewrite what is stale
    python scripts/doc_tables.py --check   # exit status 1 where a table is stale; writes nothing

A page marks the place with `<!-- table: pathologies -->` and `<!-- end -->`; what stands between is
replaced. `TABLES` names the tables.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from gradjax.cure.remedies import REMEDIES
from gradjax.diagnosis.rules import PATHOLOGIES
from gradjax.replay.reasons import REASONS

DOCS = Path(__file__).parents[1] / "docs"
MARKED = re.compile(r"(<!-- table: ([\w ]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with links for what reads `arXiv NNNN.NNNNN`."""
    lines = [header, ["---"] * len(header), *rows]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def pathologies() -> str:
    """What each pathology is called by, most causal first, and the source of that."""
    rows = [(f"`{entry.name}`", entry.criterion, entry.source) for entry in PATHOLOGIES]
    return table(["pathology", "called so when", "source"], rows)


def meanings() -> str:
    """What each pathology means, and the first remedy."""
    rows = [(f"`{entry.name}`", entry.meaning, entry.first_remedy) for entry in PATHOLOGIES]
    return table(["pathology", "what it means", "first remedy"], rows)


def remedies() -> str:
    """What each remedy changes, for which pathologies, at which cost."""
    rows = [
        (
            f"`{name}`",
            remedy.description,
            ", ".join(f"`{pathology}`" for pathology in remedy.fits),
            remedy.cost,
            remedy.reference,
        )
        for name, remedy in REMEDIES.items()
    ]
    return table(["remedy", "what it changes", "for", "cost per step", "reference"], rows)


def reasons() -> str:
    """Why an operation gives inf or NaN, and the first remedy."""
    names = {
        "operation": "the operation",
        "forward": "an operation",
        "a": "x",
        "dtype": "the dtype",
        "largest": "3.4e38 in float32, 65,504 in float16",
        "how_far": "",
        "loss_scale": "S",
    }
    rows = [
        (f"`{name}`", words.format(**names), first.format(**names))
        for name, (words, (first, *_)) in REASONS.items()
    ]
    return table(["reason", "what it means", "what to try first"], rows)


TABLES = {
    "pathologies": pathologies,
    "meanings": meanings,
    "remedies": remedies,
    "reasons": reasons,
}


def rewritten(text: str) -> str:
    """A page with its tables as they have to be."""

    def one(found: re.Match) -> str:
        begin, name, _, end = found.groups()
        if name not in TABLES:
            raise ValueError(f"doc_tables: no table {name!r}; there are {', '.join(TABLES)}.")
        return begin + "\n" + TABLES[name]() + "\n" + end

    return MARKED.sub(one, text)


def stale(folder: Path) -> dict[Path, str]:
    """The pages of a folder whose tables are not as they have to be -> what they have to hold."""
    pages = {path: path.read_text() for path in sorted(folder.rglob("*.md"))}
    wanted = {path: rewritten(text) for path, text in pages.items()}
    return {path: text for path, text in wanted.items() if text != pages[path]}


def main() -> int:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where one is stale")
    args = parser.parse_args()
    found = stale(DOCS)
    for path, text in found.items():
        if args.check:
            print(f"{path}: stale table; run python scripts/doc_tables.py", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"wrote {path}")
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
