"""`python -m twinweight` is the command `twinweight`."""

from twinweight.cli import main

main()
