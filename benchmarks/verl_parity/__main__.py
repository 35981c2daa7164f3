"""Compare our policy losses and advantages with verl's own, in fp64.

    python -m benchmarks.verl_parity

verl must be importable. Every objective is computed by verl and by the loss that our plugin
registers, under the same actor config; benchmarks/results/verl_parity.md says how far apart they
are. It takes a few seconds.
"""

import argparse
from pathlib import Path

from benchmarks.verl_parity.page import RESULTS, format_page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file to write")
    out = parser.parse_args().out
    text = format_page()
    out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
