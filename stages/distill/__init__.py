"""Distill: train a model, to answer as a teacher does or as the labels say. One file per method."""

from .features import Features
from .finetune import Finetune
from .logits import Logits

__all__ = ["Features", "Finetune", "Logits"]
