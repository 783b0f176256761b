"""The version of this code, which need not be installed to run."""

__version__ = "0.1.0"
