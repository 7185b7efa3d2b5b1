"""`python -m benchmarks.peers` runs only this comparison. `--hurry` only checks that each peer works."""

import argparse
import signal
import sys

from ..support.measure import report
from .contest import run
from .field import OURS, PEERS

RIVALS = (*PEERS, *OURS)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--hurry", action="store_true", help="too few images to count")
parser.add_argument("--only", default="", metavar="WORD", help="peers with this word in their names")
args = parser.parse_args()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end with it
sys.exit(report(run([each for each in RIVALS if each.is_ours or args.only in each.name], hurry=args.hurry)))
