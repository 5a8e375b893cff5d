"""Low-bit post-training quantization of ONNX models with MRECG block reconstruction.

The stages as functions: `load_source`, `quantize`, `export_qdq` (in `exporters`), `validate`. They are imported from their modules
(`toolchain.source`, `toolchain.pipeline`, `toolchain.validation`), so that importing this package loads neither torch nor ONNX Runtime.
"""

__version__ = "0.1.0"
