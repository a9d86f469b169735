"""Found as ``mxnet`` when the folder above is on PYTHONPATH: what arcface_torch needs of it, see ``mxnet_standin``."""

import sys

from qsd_plugin.hosts.insightface.mxnet_standin import modules

# The name this file was imported under is replaced by the stand-in with its submodules.
sys.modules.update(modules())
