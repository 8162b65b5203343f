"""optpipe's own stages, imported as optpipe.stages: one file, or folder, per family.

They register themselves when they are imported, as a third party's do, and import torch only when they run.
"""

from . import benchmark, distill, export, prune, quantize, simplify, trace

__all__ = ["benchmark", "distill", "export", "prune", "quantize", "simplify", "trace"]
