"""moe: train, study and scale sparse Mixture-of-Experts language models in JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `import moe.config` needs nothing but the standard library.
    if name == "load":
        from moe.train.load import load

        return load
    raise AttributeError(f"module 'moe' has no attribute {name!r}")
