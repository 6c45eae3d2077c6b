"""``python -m daskshare``: the command line."""

from daskshare.cli import main

main()
