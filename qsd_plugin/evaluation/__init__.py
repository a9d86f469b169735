"""Retrieval evaluation: exact ranking, ROC, re-ranking and query expansion in bounded memory, for any host or none."""
