"""Trained networks as files for other programs; every file is compared with the network it was made from."""
