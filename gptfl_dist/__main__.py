"""`python -m gptfl_dist` is `gptfl`."""

from gptfl_dist.cli.main import main

main()
