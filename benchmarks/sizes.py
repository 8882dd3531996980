"""The size of every network in the tables of the papers: our counts beside the published ones."""

from collections.abc import Sequence

from engine.summary import CONVENTION, reported_table
from models.reported import REPORTED
from utils import cli

from . import harness


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="networks to keep, by name; 'RepMLPNet-*'")
    args = parser.parse_args(argv)
    names = set(harness.chosen(dict.fromkeys(row.name for row in REPORTED), args.only))
    print(f"{CONVENTION}\n\n{reported_table(row for row in REPORTED if row.name in names)}")


if __name__ == "__main__":
    cli.run(main)
