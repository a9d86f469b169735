"""Weights and models in and out of the plugin's stack; exported files are compared with the network they came from."""
