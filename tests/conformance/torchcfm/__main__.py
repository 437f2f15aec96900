"""Run TorchCFM's own tests over sbot: ``python -m tests.conformance.torchcfm --tests DIR [--path SITE]``.

DIR is TorchCFM's ``tests`` folder, from its public source; SITE is a folder that has the package, where it is not installed.
Nothing is fetched.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .run import judge, run, summary
from .swap import MODES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.torchcfm", description=__doc__)
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES)
    options = parser.parse_args()
    verdicts = []
    for mode in options.modes:
        report = run(options.tests, mode, options.path)
        print(f"{mode}: {summary(report)}", flush=True)
        verdicts.append(judge(mode, report))
        if not verdicts[-1]:
            print("\n".join([report["output"][-4000:], *report["differences"][:10]]))
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
