#!/usr/bin/env python3
"""Writes tests/data/torch.safetensors: samples of PyTorch's own tests, with PyTorch's results.

A sample is an operation, its inputs in f32, and what PyTorch computes from them in f64: the results and, for a random dy, the gradients of
sum(dy * y). Inputs come from torch.testing._internal (OpInfo), whose reference inputs hold small, large and extreme values, and, for
layers and optimizers, from a seed. Samples that the crate has no operation for are counted with the reason.

    python3 scripts/torch_samples.py            # needs PyTorch 2, NumPy, safetensors and expecttest
"""

import json
import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from torch.testing._internal.common_methods_invocations import op_db

OUT = Path(__file__).resolve().parent.parent / "tests/data/torch.safetensors"
MOST_ELEMENTS = 3000  # of a tensor
MOST_SAMPLES = 24  # per operation, those of few elements first

tensors = {}
samples = []
left_out = defaultdict(Counter)


class Skip(Exception):
    """Why a sample is left out."""


def need(condition, reason):
    if not condition:
        raise Skip(reason)


def store(tensor):
    """Keeps a tensor under a number."""
    name = str(len(tensors))
    array = tensor.detach().numpy()
    if array.dtype == np.int64:
        array = array.astype(np.uint32)
    tensors[name] = np.ascontiguousarray(array)
    return name


def add(op, options, inputs, function, differentiable):
    """Computes a sample in f64. `inputs` are leaves; `differentiable` numbers those with a gradient."""
    need(all(t.numel() > 0 for t in inputs), "an empty tensor")
    need(all(t.numel() <= MOST_ELEMENTS for t in inputs), f"more than {MOST_ELEMENTS} elements")
    leaves = []
    for i, t in enumerate(inputs):
        t = t.detach().contiguous()
        leaves.append(t.double().requires_grad_(i in differentiable) if t.is_floating_point() else t)
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    results = tuple(r.double() for r in results)
    need(all(0 < r.numel() <= MOST_ELEMENTS for r in results), f"more than {MOST_ELEMENTS} elements")
    sample = {"op": op, "options": options, "inputs": [], "results": [store(r) for r in results]}
    for t in inputs:
        t = t.detach().contiguous()
        sample["inputs"].append({"data": store(t if not t.is_floating_point() else t.float()), "shape": list(t.shape)})
    sample["shape"] = list(results[0].shape)
    if differentiable and results[0].requires_grad:
        dy = torch.empty(results[0].shape, dtype=torch.float32).uniform_(-1, 1)
        wrt = [leaves[i] for i in differentiable]
        gradients = torch.autograd.grad(results[0], wrt, dy.double(), allow_unused=True)
        need(all(g is not None for g in gradients), "an input without a gradient")
        sample["dy"] = store(dy)
        sample["gradients"] = {str(i): store(g) for i, g in zip(differentiable, gradients)}
    samples.append(sample)


# One function per operation: an OpInfo sample becomes (options, inputs, function, differentiable), or is skipped.


def unary(function, options=None):
    def convert(s):
        need(not s.args and not s.kwargs, "arguments beside x")
        return options or {}, [s.input.reshape(-1)], function, [0]

    return convert


def gelu(s):
    form = s.kwargs.get("approximate", "none")
    return {"form": form}, [s.input.reshape(-1)], lambda x: F.gelu(x, approximate=form), [0]


def clamp(s):
    low, high = s.kwargs.get("min_val", -1.0), s.kwargs.get("max_val", 1.0)
    need(low <= high, "a lower bound above the upper one")
    low, high = float(np.float32(low)), float(np.float32(high))
    return {"min": str(low), "max": str(high)}, [s.input.reshape(-1)], lambda x: x.clamp(low, high), [0]


def binary(function):
    def convert(s):
        need(len(s.args) == 1 and isinstance(s.args[0], torch.Tensor), "a number in place of a tensor")
        need(all(k == "alpha" and v == 1 or k == "rounding_mode" and v is None for k, v in s.kwargs.items()), "alpha or a rounding mode")
        a, b = s.input, s.args[0]
        need(a.dtype == b.dtype == torch.float32, "mixed types")
        shape = torch.broadcast_shapes(a.shape, b.shape)
        need(a.shape == shape, "the first operand is broadcast")
        cols = a.shape[-1] if a.dim() else 1
        a = a.reshape(-1, cols)
        if b.shape == shape:
            kind, b = "same", b.reshape(-1, cols)
        elif b.numel() == 1:
            kind, b = "scalar", b.reshape(1)
        elif b.numel() == cols and b.shape[-1] == cols:
            kind, b = "cols", b.reshape(cols)
        elif b.numel() == a.shape[0] and b.shape[-1] == 1 and b.dim() == len(shape):
            kind, b = "rows", b.reshape(-1)
        else:
            raise Skip("another kind of broadcast")
        wide = (lambda b: b[:, None]) if kind == "rows" else (lambda b: b)
        return {"broadcast": kind}, [a, b], lambda a, b: function(a, wide(b)), [0, 1]

    return convert


def matrices(a, b):
    need(a.dim() in (2, 3) and a.dim() == b.dim(), "other ranks")
    return a, b


def mm(s):
    a, b = matrices(s.input, s.args[0])
    return {}, [a, b], torch.matmul, [0, 1]


def linear(s):
    x, weight = s.input, s.args[0]
    bias = s.args[1] if len(s.args) > 1 else None
    need(weight.dim() == 2, "a weight that is a vector")
    x = x.reshape(-1, x.shape[-1])
    inputs = [x, weight] + ([bias] if bias is not None else [])
    return {}, inputs, F.linear, list(range(len(inputs)))


def layer_norm(s):
    shape, *rest = s.args
    weight, bias, eps = (list(rest) + [None, None, None])[:3]
    weight = s.kwargs.get("weight", weight)
    bias = s.kwargs.get("bias", bias)
    eps = s.kwargs.get("eps", eps)
    eps = 1e-5 if eps is None else eps
    need(len(shape) == 1, "normalisation over several axes")
    need(eps > 0, "an eps that is not positive")
    cols = shape[0]
    weight = torch.ones(cols) if weight is None else weight
    bias = torch.zeros(cols) if bias is None else bias
    x = s.input.reshape(-1, cols)
    eps = float(np.float32(eps))
    return {"eps": eps}, [x, weight, bias], lambda x, w, b: F.layer_norm(x, (cols,), w, b, eps), [0, 1, 2]


def conv1d(s):
    names = ["bias", "stride", "padding", "dilation", "groups"]
    values = dict(zip(["weight"] + names, s.args)) | s.kwargs
    weight, bias = values["weight"], values.get("bias")
    one = lambda v, d: d if v is None else (v[0] if isinstance(v, (tuple, list)) else v)
    stride, dilation = one(values.get("stride"), 1), one(values.get("dilation"), 1)
    padding = values.get("padding")
    need(one(values.get("groups"), 1) == 1, "groups")
    x = s.input if s.input.dim() == 3 else s.input[None]
    taps = weight.shape[-1]
    reach = (taps - 1) * dilation
    # Ours is [B, L, C] with weights [H, k * C]. Padding of another size than 'same' is part of the input.
    x = x.transpose(1, 2)
    pads = (0, 0)
    if padding == "same":
        need(stride == 1, "padding 'same' with a stride")
        pads = (reach // 2, reach - reach // 2)
    elif padding not in ("valid", None):
        x = F.pad(x.transpose(1, 2), [one(padding, 0)] * 2).transpose(1, 2)
    options = {"stride": stride, "dilation": dilation, "taps": taps, "padding": "same" if padding == "same" else "valid"}
    w = weight.permute(0, 2, 1).reshape(weight.shape[0], -1)

    def function(x, w, *bias):
        w = w.reshape(w.shape[0], taps, -1).permute(0, 2, 1)
        return F.conv1d(F.pad(x.transpose(1, 2), pads), w, *bias, stride=stride, dilation=dilation).transpose(1, 2)

    inputs = [x, w] + ([bias] if bias is not None else [])
    return options, inputs, function, list(range(len(inputs)))


def embedding(s):
    table, ids = s.input, s.args[0]
    need(ids.numel() > 0, "an empty tensor")
    need(s.kwargs.get("max_norm") is None, "max_norm")
    need(not s.kwargs.get("scale_grad_by_freq") and not s.kwargs.get("sparse"), "scale_grad_by_freq or sparse")
    padding = s.kwargs.get("padding_idx")
    padding = padding if padding is None or padding >= 0 else padding + table.shape[0]
    options = {} if padding is None else {"padding": padding}
    return options, [ids.reshape(-1), table], lambda i, t: F.embedding(i, t, padding_idx=padding), [1]


def along_last(function):
    def convert(s):
        dim = s.args[0] if s.args else s.kwargs.get("dim")
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        need(s.input.dim() >= 1, "no axis")
        need(isinstance(dim, int), "several axes")
        need(not s.kwargs.get("dtype") and not any(isinstance(a, torch.dtype) for a in s.args), "a result of another type")
        x = s.input.movedim(dim, -1)
        return {}, [x.reshape(-1, x.shape[-1])], lambda x: function(x, -1), [0]

    return convert


def reduction(function):
    def convert(s):
        dim = s.args[0] if s.args else s.kwargs.get("dim")
        need(s.input.dim() >= 1, "no axis")
        need(dim is None or isinstance(dim, int), "several axes")
        need(not s.kwargs.get("dtype") and s.kwargs.get("correction") is None, "a result of another type")
        if dim is None:
            return {"over": "all"}, [s.input.reshape(1, -1)], lambda x: function(x).reshape(1), [0]
        x = s.input.movedim(dim, -1)
        x = x.reshape(-1, x.shape[-1])
        return {"over": "cols"}, [x], lambda x: function(x, -1), [0]

    return convert


def row_max(s):
    dim = s.args[0] if s.args else s.kwargs.get("dim")
    need(isinstance(dim, int) and s.input.dim() >= 1, "no single axis")
    x = s.input.movedim(dim, -1)
    # The column of the first of equal elements, as the crate defines it.
    def function(x):
        values = x.amax(-1)
        first = ((x == values[:, None]) | (x.isnan() & values.isnan()[:, None])).double().argmax(-1)
        return values, first.double()

    return {}, [x.reshape(-1, x.shape[-1])], function, []


def cross_entropy(s):
    target = s.args[0]
    need(not target.is_floating_point(), "targets that are probabilities")
    need(s.kwargs.get("weight") is None, "weights of classes")
    need(s.kwargs.get("reduction", "mean") == "mean", "another reduction than the mean")
    x = s.input
    if x.dim() == 1:
        x, target = x[None], target.reshape(1)
    x = x.movedim(1, -1).reshape(-1, x.shape[1])
    target = target.reshape(-1)
    ignore = s.kwargs.get("ignore_index", -100)
    smoothing = float(np.float32(s.kwargs.get("label_smoothing", 0.0)))
    need(bool((target != ignore).any()), "every target ignored, a mean over nothing")
    options = {"smoothing": smoothing}
    classes = x.shape[1]
    if ignore >= 0:
        options["ignore"] = ignore
    elif bool((target == ignore).any()):
        # Ours are unsigned: any class outside stands for those.
        options["ignore"] = classes
    ours = torch.where(target == ignore, torch.tensor(options.get("ignore", classes)), target)

    def function(x, t):
        t = torch.where(t == options.get("ignore", -1), torch.tensor(-100), t)
        return F.cross_entropy(x, t, label_smoothing=smoothing).reshape(1)

    return options, [x, ours], function, [0]


def attention(s):
    q, (k, v) = s.input, s.args[:2]
    if q.dim() == 3:
        q, k, v = q[:, None], k[:, None], v[:, None]
    need(q.dim() == 4, "other ranks")
    need(s.kwargs.get("attn_mask") is None, "a mask of scores")
    need(not s.kwargs.get("dropout_p"), "dropout")
    need(not s.kwargs.get("enable_gqa"), "grouped queries")
    need(q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] == v.shape[3] == k.shape[3], "heads of several widths")
    causal = bool(s.kwargs.get("is_causal"))
    need(not causal or q.shape[2] == k.shape[2], "causal over sequences of different lengths")
    batch, heads, length, width = q.shape
    need(width % 4 == 0, "heads whose width is no multiple of 4")
    flat = lambda t: t.transpose(1, 2).reshape(t.shape[0], t.shape[2], -1)
    split = lambda t: t.reshape(t.shape[0], t.shape[1], heads, -1).transpose(1, 2)

    def function(q, kv):
        k, v = kv.chunk(2, -1)
        return flat(F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=causal))

    kv = torch.cat([flat(k), flat(v)], -1)
    return {"heads": heads, "causal": causal}, [flat(q), kv], function, [0, 1]


def normalize(s):
    p, dim = s.kwargs.get("p", 2), s.kwargs.get("dim", 1)
    need(p == 2, "another norm")
    eps = s.kwargs.get("eps", 1e-12)
    need(eps == 1e-12, "another eps")
    need(s.input.dim() >= 1 and s.kwargs.get("out") is None, "no axis")
    x = s.input.movedim(dim, -1)
    return {"eps": eps}, [x.reshape(-1, x.shape[-1])], lambda x: F.normalize(x, dim=-1, eps=eps), [0]


OPS = {
    "abs": ("abs", unary(torch.abs)),
    "square": ("square", unary(torch.square)),
    "sqrt": ("sqrt", unary(torch.sqrt)),
    "rsqrt": ("rsqrt", unary(torch.rsqrt)),
    "reciprocal": ("recip", unary(torch.reciprocal)),
    "exp": ("exp", unary(torch.exp)),
    "log": ("log", unary(torch.log)),
    "cos": ("cos", unary(torch.cos)),
    "tanh": ("tanh", unary(torch.tanh)),
    "sigmoid": ("sigmoid", unary(torch.sigmoid)),
    "nn.functional.relu": ("relu", unary(F.relu)),
    "nn.functional.gelu": ("gelu", gelu),
    "neg": ("neg", unary(torch.neg)),
    "isfinite": ("is_finite", unary(lambda x: torch.isfinite(x).double())),
    "nn.functional.hardtanh": ("clamp", clamp),
    "add": ("add", binary(torch.add)),
    "sub": ("sub", binary(torch.sub)),
    "mul": ("mul", binary(torch.mul)),
    "div.no_rounding_mode": ("div", binary(torch.div)),
    "maximum": ("max", binary(torch.maximum)),
    "minimum": ("min", binary(torch.minimum)),
    "gt": ("greater", binary(lambda a, b: torch.gt(a, b).double())),
    "mm": ("matmul", mm),
    "bmm": ("matmul", mm),
    "nn.functional.linear": ("linear", linear),
    "nn.functional.layer_norm": ("layer_norm", layer_norm),
    "nn.functional.conv1d": ("conv1d", conv1d),
    "nn.functional.embedding": ("embedding", embedding),
    "softmax": ("softmax", along_last(torch.softmax)),
    "log_softmax": ("log_softmax", along_last(torch.log_softmax)),
    "logsumexp": ("log_sum_exp", along_last(torch.logsumexp)),
    "sum": ("sum", reduction(torch.sum)),
    "amax": ("row_max", row_max),
    "nn.functional.cross_entropy": ("cross_entropy", cross_entropy),
    "nn.functional.scaled_dot_product_attention": ("attention", attention),
    "nn.functional.normalize": ("normalize", normalize),
}
NO_SAMPLES = {"nn.functional.dropout": "draws other random numbers; the crate's are pinned by tests of their own"}


def of_op_db():
    found = {info.name + ("" if not info.variant_test_name else "." + info.variant_test_name): info for info in op_db}
    for name, (ours, convert) in OPS.items():
        info = found[name]
        kept = []
        for kind in (info.sample_inputs, info.reference_inputs):
            try:
                kept += list(kind("cpu", torch.float32, requires_grad=False))
            except (NotImplementedError, RuntimeError) as error:
                left_out[name][f"{kind.__name__}: {error}"] += 1
        kept.sort(key=lambda s: s.input.numel() if isinstance(s.input, torch.Tensor) else 0)
        count = 0
        for s in kept:
            if count == MOST_SAMPLES:
                left_out[name][f"more than {MOST_SAMPLES} samples"] += 1
                continue
            try:
                need(isinstance(s.input, torch.Tensor), "an input that is a list")
                need(s.input.numel() > 0, "an empty tensor")
                options, inputs, function, differentiable = convert(s)
                options["torch"] = name
                add(ours, options, inputs, function, differentiable)
                count += 1
            except Skip as skip:
                left_out[name][str(skip)] += 1
        print(f"{name:50} {count:3} of {len(kept):3} samples; left out: {dict(left_out[name])}")


def extremes():
    """Each of these numbers, and each pair of a few of them, through the functions of one and two elements."""
    numbers = [0.0, -0.0, 1.0, -1.0, 0.5, -3.0, 1e-30, -1e-30, 1e-20, 1e20, -1e20, 88.0, -88.0, 104.0, -104.0, 1e4, -1e4, 3e38, -3e38]
    numbers += [math.inf, -math.inf, math.nan]
    x = torch.tensor(numbers)
    functions = {ours: convert for ours, convert in OPS.values()}

    class Sample:
        def __init__(self, x, *args, **kwargs):
            self.input, self.args, self.kwargs = x, args, kwargs

    for op in ["abs", "square", "sqrt", "rsqrt", "recip", "exp", "log", "tanh", "sigmoid", "relu", "neg", "is_finite"]:
        add(op, {"torch": "extreme values"}, *functions[op](Sample(x))[1:])
    for form in ("none", "tanh"):
        options, *rest = gelu(Sample(x, approximate=form))
        add("gelu", options | {"torch": "extreme values"}, *rest)
    few = torch.tensor([0.0, -0.0, 1.0, -2.0, 1e-20, 1e20, 3e38, math.inf, -math.inf, math.nan])
    a, b = few.repeat_interleave(len(few))[None], few.repeat(len(few))[None]
    for op in ["add", "sub", "mul", "div", "max", "min", "greater"]:
        options, *rest = functions[op](Sample(a, b))
        add(op, options | {"torch": "extreme values"}, *rest)
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[1, 2, 3, 4], [-inf, 1, 2, 3], [inf, 1, 2, 3], [nan, 1, 2, 3], [3e38, 3e38, -3e38, 0], [-inf] * 4, [1e4, -1e4, 1e4, 0], [0] * 4], dtype=torch.float32)
    # ln 2 vanishes beside 3e38, so that PyTorch's gradients of logsumexp add up to 2 in that row.
    sound = torch.cat([rows[:4], rows[5:]])
    for op in ["softmax", "log_softmax", "log_sum_exp"]:
        options, *rest = functions[op](Sample(sound if op == "log_sum_exp" else rows, -1))
        add(op, options | {"torch": "extreme values"}, *rest)
    options, *rest = row_max(Sample(rows, -1))
    add("row_max", options | {"torch": "extreme values"}, *rest)
    # Squares of numbers near the largest f32 overflow in f32, in PyTorch as here.
    rows = torch.cat([rows[:4], rows[6:]])
    rows = torch.cat([rows, rows + 1e6, rows * 1e-20])
    eps = float(np.float32(1e-5))
    inputs = [rows, torch.tensor([1.0, -2, 0.5, 1]), torch.tensor([0.0, 1, 2, 3])]
    add("layer_norm", {"eps": eps, "torch": "extreme values"}, inputs, lambda x, w, b: F.layer_norm(x, (4,), w, b, eps), [0, 1, 2])


def optimizers():
    """50 steps of AdamW on given gradients, with clipping of the global norm, two groups, and a linear warm-up followed by a cosine."""
    for clip in (None, 1.0):
        for decay in (0.0, 0.1):
            a, b = torch.randn(7, 5).double(), torch.randn(13).double()
            start = [a.clone(), b.clone()]
            a.requires_grad_(), b.requires_grad_()
            groups = [{"params": [a], "weight_decay": decay}, {"params": [b], "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
            steps, warmup, end = 50, 10, 1e-3
            up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
            down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=end)
            schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[warmup - 1])
            gradients = [torch.randn(steps, *p.shape) * torch.rand(steps, *[1] * p.dim()) * 3 for p in (a, b)]
            rates = []
            for t in range(steps):
                rates.append(optimizer.param_groups[0]["lr"])
                for p, g in zip((a, b), gradients):
                    p.grad = g[t].double()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_([a, b], clip)
                optimizer.step()
                schedule.step()
            samples.append(
                {
                    "op": "adamw",
                    "options": {"clip": clip, "decay": decay, "steps": steps, "warmup": warmup, "end": end, "torch": "optim.AdamW"},
                    "inputs": [{"data": store(t.float()), "shape": list(t.shape)} for t in start + gradients],
                    "results": [store(t) for t in (a, b)] + [store(torch.tensor(rates).double())],
                    "shape": [],
                }
            )


torch.manual_seed(0)
random.seed(0)
np.random.seed(0)
of_op_db()
extremes()
optimizers()
description = {
    "origin": f"PyTorch {torch.__version__}, torch.testing._internal OpInfo; expected values in f64",
    "samples": samples,
    "left_out": {name: dict(reasons) for name, reasons in left_out.items()} | {name: {why: 1} for name, why in NO_SAMPLES.items()},
}
OUT.parent.mkdir(parents=True, exist_ok=True)
save_file(tensors, str(OUT), metadata={"description": json.dumps(description)})
print(f"{len(samples)} samples, {OUT.stat().st_size / 1e6:.1f} MB")
