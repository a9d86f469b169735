"""Adapters to the hosts: the only place that imports fastreid or insightface."""
