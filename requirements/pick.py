"""Prints the pin file for the running Python."""

import sys

print("requirements/runtime.txt" if sys.version_info >= (3, 11) else "requirements/py310.txt")
