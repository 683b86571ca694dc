"""Find rows that are unlikely given their context: conditional variational autoencoders for anomaly detection."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomaly_cvae.detector import CVAEDetector

__version__ = "0.1.0"
__all__ = ["CVAEDetector", "__version__", "errors", "presets"]

_LAZY = {"CVAEDetector": "anomaly_cvae.detector"}
_MODULES = ("errors", "presets")


def __getattr__(name: str) -> Any:
    """Import on first use: `import anomaly_cvae` itself loads neither torch nor pandas."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(f"anomaly_cvae.{name}")
    raise AttributeError(f"module 'anomaly_cvae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
