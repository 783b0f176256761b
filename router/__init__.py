"""router: one address in front of many LLM workers, which finds the cached prefix and hides failures.

Speaks HTTP to SGLang-, vLLM- and jaxserve-compatible workers; knows nothing of models or devices.
"""

__version__ = "0.1.0"
