"""Write the README's figures, all tables and the charts from benchmarks/results/*.json.

    python -m benchmarks.report

No figure is typed by hand; the tests fail if a written figure is not that of the result files.
"""

import argparse

from benchmarks.core.results import load
from benchmarks.report import charts, pages


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    devices = load()
    for path, text in pages.texts(devices).items():
        path.write_text(text, encoding="utf-8")
    for path, chart in pages.all_charts(devices).items():
        charts.draw(chart, path)
        print(pages.link(path))


if __name__ == "__main__":
    main()
