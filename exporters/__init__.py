"""From a float model and a quantization table to the file that a runtime executes."""

from .qdq import export_qdq, write_model

__all__ = ["export_qdq", "write_model"]
