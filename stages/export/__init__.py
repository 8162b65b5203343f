"""Export: write a captured graph to a file that runs without Python, or without what wrote it.

One file per kind; each takes what a trace gives. `optpipe.runtimes` runs what they write.
"""

from . import aotinductor, executorch, onnx, openvino, tensorrt, torchscript

__all__ = ["aotinductor", "executorch", "onnx", "openvino", "tensorrt", "torchscript"]
