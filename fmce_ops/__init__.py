"""How mature is each functional module of a network, from its feature maps alone."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fmce-ops")
except PackageNotFoundError:  # a model folder carries the package's code without its metadata
    __version__ = "0+unknown"
