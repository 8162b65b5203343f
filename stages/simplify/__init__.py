"""Simplify: rewrite a model into a smaller one that computes the same. One file per stage.

`outputs` selects what a model returns, `flow` sees which module reads what, `trials` proves every rewrite on real
samples and undoes those that change the outputs, and the others are the rewrites: `folding`, `tidying`, `attention`,
`dead_code`; `fusions` tells those that are left to the runtime.
"""

from . import graph, standard
from .graph import Graph
from .standard import Standard

__all__ = ["Graph", "Standard", "graph", "standard"]
