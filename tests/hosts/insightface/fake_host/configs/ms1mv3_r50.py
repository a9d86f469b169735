"""A config of the checkout's own."""

from configs.base import Config

config = Config(network="r50", num_classes=93431)
