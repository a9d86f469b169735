"""Exact evaluation in bounded memory: retrieval, verification, identification, templates, quality; host or none."""
