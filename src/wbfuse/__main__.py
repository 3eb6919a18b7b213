"""`python -m wbfuse`."""

from wbfuse.cli.main import main

main()
