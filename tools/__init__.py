"""Command-line tools; installed as ``qsd_plugin.tools`` with console scripts of their own."""
