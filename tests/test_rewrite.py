"""Rewrites of the exported graph: attention as one operator that splits its heads itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import my_network
import onnx
import pytest
import torch
from integers import error
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from optpipe import lower
from optpipe.forms import form

WIDTH, HEADS, LENGTH = 32, 4, 6


class Attention(nn.Module):
    """`kind`: what restricts it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.register_buffer("square", torch.ones(LENGTH, LENGTH).tril().bool())

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        query, key, value = (
            layer(y).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for layer, y in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        mask = {"padding": x[:, None, None, :, 0] > -1, "square": self.square}.get(self.kind)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=self.kind == "causal")
        return mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", ["none", "padding", "square", "causal", "cross"])
def test_attention_is_one_packed_operator(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, LENGTH, WIDTH)
    x[:, 0, 0] = 0.0  # at least one token that is no padding
    inputs = (x, torch.randn(5, 2 * LENGTH, WIDTH)) if kind == "cross" else x
    task = my_network.pixels()
    task.example_inputs, task.validation = inputs, [(inputs, torch.zeros(5))]
    model = Attention(kind).eval()
    exported = lower.to_onnx(lower.trace(model, task), tmp_path / "model.onnx")
    found = Counter(node.op_type for node in onnx.load(exported.path).graph.node)
    assert found["Attention"] == 1 and "Transpose" not in found and "Softmax" not in found
    assert error(form("onnx").as_callable(exported), model, task) < 1e-5


def test_without_rewriting_the_results_are_the_same_in_more_operators(tmp_path: Path) -> None:
    x = torch.randn(5, LENGTH, WIDTH)
    task = my_network.pixels()
    task.example_inputs = x
    model = Attention("none").eval()
    exported = lower.to_onnx(lower.trace(model, task), tmp_path / "model.onnx", rewrite=False)
    found = Counter(node.op_type for node in onnx.load(exported.path).graph.node)
    assert "Attention" not in found and found["Transpose"] >= 4
    assert error(form("onnx").as_callable(exported), model, task) < 1e-5
