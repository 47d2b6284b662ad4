"""``python -m qexport``."""

from qexport.cli import main

main()
