"""`python -m xushi`, and so `torchrun -m xushi`."""

from xushi.cli import main

main()
