"""Puts this folder on the import path, so that host tests can ``from toy import write_market``."""
