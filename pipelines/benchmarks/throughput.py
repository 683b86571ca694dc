"""Speed beside the limits of the machine and beside peers, every figure measured in turn with what it is compared to.

`make bench-throughput` writes docs/benchmarks/speed.md with two pictures; `--only` measures some of the sections and
leaves the others on the page as they are. `make bench-gpu` (gpu.py) writes the section on CUDA devices.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import files
import growth
import page
import peers
import profiles
import scoring
import start_up

REPORT = Path("docs/benchmarks/speed.md")
SECTIONS = {
    "scoring": "Limits and scoring",
    "profiles": "Where the time goes",
    "peers": "Peers",
    "growth": "Growth",
    "files": "Memory and files",
    "start-up": "Start-up",
}
PICTURES = {"growth": ".png", "files": "_files.png"}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int
    rounds: int
    max_rows: int
    training_rows: int
    peer_rows: int
    epochs: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Sizes:
        """As asked; `--quick` shows that the program runs, its figures say little."""
        if arguments.quick:
            return cls(arguments.rows or 4_000, arguments.rounds or 1, arguments.max_rows or 10_000, 2_000, 2_000, 1)
        return cls(
            arguments.rows or 200_000, arguments.rounds or 7, arguments.max_rows or 1_000_000, 20_000, 20_000, 30
        )


def measure(name: str, sizes: Sizes, folder: Path) -> tuple[list[str], list[growth.Curve]]:
    """One section's text and curves."""
    if name == "scoring":
        return scoring.section(sizes.rows, sizes.rounds, folder), []
    if name == "profiles":
        return profiles.section(sizes.rows // 4, sizes.training_rows, sizes.rounds, short=sizes.epochs == 1), []
    if name == "peers":
        return peers.section(sizes.training_rows, sizes.peer_rows, sizes.rounds, epochs=sizes.epochs), []
    if name == "growth":
        return growth.section(max(sizes.rows // 4, 1_000), sizes.training_rows, sizes.rounds, short=sizes.epochs == 1)
    if name == "files":
        text, curve = files.section(sizes.max_rows, max(1, sizes.rounds // 2), folder)
        return text, [curve]
    return start_up.section(sizes.rounds, folder), []


def main() -> None:
    """Measure, section by section; each stands on the page as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="rows scored at a time; default 200,000")
    parser.add_argument("--rounds", type=int, help="default 7")
    parser.add_argument(
        "--max-rows", type=int, help="most rows of a file, up to 1e8 (43 GB on disk); default 1,000,000"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
                        help=f"of {', '.join(SECTIONS)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a minute or so")
    parser.add_argument("--output", type=Path, default=REPORT)
    arguments = parser.parse_args()
    sizes = Sizes.of(arguments)
    given = "throughput.py --quick" if arguments.quick else "make bench-throughput"
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as place:
            text, curves = measure(name, sizes, Path(place))
        if curves:
            drawn = arguments.output.with_name(f"{arguments.output.stem}{PICTURES[name]}")
            growth.picture(curves, drawn)
            text += ["", f"![the same as curves]({drawn.name})"]
        page.write_section(arguments.output, SECTIONS[name], [page.measured_on(given), "", *text])
        print(f"## {SECTIONS[name]}\n", *text, sep="\n", flush=True)
    print(f"written {arguments.output}")


if __name__ == "__main__":
    main()
