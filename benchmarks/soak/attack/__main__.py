"""Runs all attacks, or only the named ones, and exits with 1 if a goal was missed."""

import argparse
import sys

from ...support.measure import report
from . import SECONDS, run, run_alone
from .attacks import BY_NAME

parser = argparse.ArgumentParser(prog="python -m benchmarks.soak.attack")
parser.add_argument("names", nargs="*", metavar="NAME", help=f"attacks to run alone, of {', '.join(BY_NAME)}")
parser.add_argument("--seconds", type=float, default=SECONDS, help="of all together, or of each named attack")
options = parser.parse_args()
if unknown := set(options.names) - set(BY_NAME):
    parser.error(f"unknown: {', '.join(sorted(unknown))}")
sys.exit(report(run_alone(options.names, options.seconds) if options.names else run(options.seconds)))
