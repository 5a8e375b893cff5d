"""From a piece of the ONNX graph to a torch module that runs on ONNX value names. The only room that imports onnx2torch."""

from .block import Narrowed, Observer, TorchBlock, can_import, import_block

__all__ = ["Narrowed", "Observer", "TorchBlock", "can_import", "import_block"]
