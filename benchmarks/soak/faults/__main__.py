"""Runs all of it and exits with 1 if a goal was missed."""

import argparse
import sys

from ...support.measure import report
from . import SECONDS, run

parser = argparse.ArgumentParser(prog="python -m benchmarks.soak.faults")
parser.add_argument("--seconds", type=float, default=SECONDS)
sys.exit(report(run(parser.parse_args().seconds)))
