"""Compare our losses with TRL's own, option by option, in fp64.

    python -m benchmarks.trl_parity

Every combination of the options is computed by TRL, by grpo_kernels and by the reference, in a few
minutes; benchmarks/results/trl_parity.md says how far apart they are. options.py has what is
compared, differences.py what is not.
"""

import argparse
from pathlib import Path

from benchmarks.trl_parity.options import combinations
from benchmarks.trl_parity.page import RESULTS, format_page, sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file to write")
    out = parser.parse_args().out
    text = format_page(sweep(combinations()))
    out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
