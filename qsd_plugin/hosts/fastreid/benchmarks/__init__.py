"""Benchmarks that need the host, in the form of :mod:`qsd_plugin.report.benchmarks`."""
