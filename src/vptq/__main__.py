"""`python -m vptq`: the same command line as `vptq`."""

from vptq.cli import main

main(program="python -m vptq")
