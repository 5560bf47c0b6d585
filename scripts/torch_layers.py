#!/usr/bin/env python3
"""Writes tests/data/torch_layers.safetensors: layers of PyTorch, their parameters, inputs, results and gradients, from a seed.

A layer has parameters and inputs in f32. PyTorch computes, in f64, the result y and, for a random dy, the gradients of sum(dy * y) with
respect to x and each parameter. The tests compare the same layers of the crate.

    python3 scripts/torch_layers.py            # needs PyTorch 2, NumPy and safetensors
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

OUT = Path(__file__).resolve().parent.parent / "tests/data/torch_layers.safetensors"

tensors = {}
samples = []


def ours(name):
    """The crate's name of a parameter."""
    return name.replace("in_proj_", "in_proj.")


def add(kind, options, layer, call, batch, time, width, masked, scale):
    number = len(samples)

    def store(name, tensor, dtype):
        tensors[f"{number}/{name}"] = np.ascontiguousarray(tensor.detach().numpy().astype(dtype))

    # Biases begin with zeros, and weights of norms with ones.
    with torch.no_grad():
        for parameter in layer.parameters():
            start = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(start + 0.5 * torch.randn(parameter.shape))
    x = scale * torch.randn(batch, time, width)
    mask = torch.ones(batch, time)
    if masked:
        mask = (torch.rand(batch, time) < 0.6).float()
        # A text without tokens has no attention, and NaN in PyTorch.
        mask[:, 0] = 1
    for name, parameter in layer.named_parameters():
        store(f"parameter/{ours(name)}", parameter, np.float32)
    store("x", x, np.float32)
    store("mask", mask, np.float32)
    layer = layer.double().train()
    x = x.double().requires_grad_()
    causal = torch.triu(torch.ones(time, time, dtype=torch.bool), 1) if options["causal"] else None
    y = call(layer, x, mask == 0 if masked else None, causal)
    dy = torch.empty(y.shape).uniform_(-1, 1)
    store("dy", dy, np.float32)
    store("y", y, np.float64)
    names, parameters = zip(*layer.named_parameters())
    dx, *gradients = torch.autograd.grad(y, [x, *parameters], dy.double())
    store("gradient/x", dx, np.float64)
    for name, gradient in zip(names, gradients):
        store(f"gradient/{ours(name)}", gradient, np.float64)
    samples.append({"kind": kind, "batch": batch, "time": time, "width": width, "masked": masked, **options})


def attend(layer, x, padding, causal):
    return layer(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=False)[0]


def encode(layer, x, padding, causal):
    return layer(x, src_mask=causal, src_key_padding_mask=padding)


def encode_all(layer, x, padding, causal):
    return layer(x, mask=causal, src_key_padding_mask=padding)


def main():
    torch.manual_seed(1)
    for heads, width, time in ((1, 8, 5), (2, 8, 7), (3, 24, 4), (2, 16, 1)):
        for causal in (False, True):
            for masked in (False, True):
                layer = nn.MultiheadAttention(width, heads, batch_first=True)
                add("attention", {"heads": heads, "causal": causal}, layer, attend, 2, time, width, masked, 1.0)
    # Scores of some hundreds: one key takes all.
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    add("attention", {"heads": 2, "causal": False}, layer, attend, 2, 6, 8, False, 10.0)
    for count in (0, 2):
        for norm_first in (False, True):
            for activation in ("relu", "gelu"):
                for masked, causal in ((False, False), (True, False), (True, True)):
                    options = {"heads": 2, "causal": causal, "hidden": 12, "layers": count, "norm_first": norm_first, "activation": activation}
                    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, activation, batch_first=True, norm_first=norm_first)
                    if count == 0:
                        add("layer", options, layer, encode, 2, 5, 8, masked, 1.0)
                        continue
                    norm = nn.LayerNorm(8) if norm_first else None
                    encoder = nn.TransformerEncoder(layer, count, norm, enable_nested_tensor=False)
                    add("encoder", options, encoder, encode_all, 2, 5, 8, masked, 1.0)
    origin = f"PyTorch {torch.__version__.split('+')[0]}, f64, seed 1, by scripts/torch_layers.py"
    save_file(tensors, OUT, metadata={"description": json.dumps({"origin": origin, "samples": samples})})
    print(f"{OUT.name}: {len(samples)} layers, {OUT.stat().st_size} bytes")


main()
