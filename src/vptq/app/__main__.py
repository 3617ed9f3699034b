"""`python -m vptq.app`: the same as `vptq app`."""

import sys

from vptq.cli import main

main(["app", *sys.argv[1:]])
