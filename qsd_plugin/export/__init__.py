"""Weights and models in and out of the plugin's stack."""
