#!/usr/bin/env python3
"""Trains the decoder of examples/train_decoder.rs in PyTorch, alike, for comparison.

Same data, sizes, initial distributions, loss, AdamW, schedule, clipping and batch size; the random numbers differ. Needs PyTorch 2 and
NumPy. Safetensors files are read here, so that no further package is needed.

The last line is in the form of the example: `validation: cross_entropy ..., perplexity ..., accuracy ...`.
"""

import argparse
import json
import math
import struct
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"F16": np.float16, "F32": np.float32, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32}


def read_safetensors(path):
    """Tensors by name: a u64 length, a JSON header, then the bytes."""
    data = Path(path).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        values = np.frombuffer(data[8 + size + begin : 8 + size + end], DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


class Data:
    """Texts cut or filled up to `length` tokens, next tokens as targets, and embeddings."""

    def __init__(self, path, length, device, samples=None):
        tensors = read_safetensors(path)
        lengths = tensors["lengths"].astype(np.int64)
        if samples is not None:
            lengths = lengths[:samples]
        starts = np.concatenate([[0], np.cumsum(tensors["lengths"].astype(np.int64))])
        ids = np.zeros((len(lengths), length), np.int64)
        mask = np.zeros((len(lengths), length), np.float32)
        for i, n in enumerate(np.minimum(lengths, length)):
            ids[i, :n] = tensors["ids"][starts[i] : starts[i] + n]
            mask[i, :n] = 1
        targets = np.full_like(ids, -100)
        both = (mask[:, :-1] > 0) & (mask[:, 1:] > 0)
        targets[:, :-1][both] = ids[:, 1:][both]
        z = tensors["embeddings"][: len(lengths)].astype(np.float32)
        self.ids, self.mask, self.targets, self.z = (
            torch.from_numpy(array).to(device) for array in (ids, mask, targets, z)
        )

    def __len__(self):
        return len(self.ids)

    def batch(self, rows):
        return self.ids[rows], self.mask[rows], self.targets[rows], self.z[rows]


class Block(nn.Module):
    """mask * (x + conv2(gelu(conv1(norm(x))))), conv1 causal and dilated."""

    def __init__(self, width, hidden, kernel, dilation, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.conv1 = nn.Conv1d(width, hidden, kernel, dilation=dilation)
        self.conv2 = nn.Conv1d(hidden, width, 1)
        self.before = (kernel - 1) * dilation
        self.dropout = nn.Dropout(dropout)
        for conv in (self.conv1, self.conv2):
            bound = 1 / math.sqrt(conv.in_channels * conv.kernel_size[0])
            nn.init.uniform_(conv.weight, -bound, bound)
            nn.init.uniform_(conv.bias, -bound, bound)

    def forward(self, x, mask):
        h = self.norm(x).transpose(1, 2)
        h = self.conv1(F.pad(h, (self.before, 0)))
        h = self.dropout(F.gelu(h, approximate="tanh"))
        h = self.dropout(self.conv2(h).transpose(1, 2))
        return mask * (x + h)


class Decoder(nn.Module):
    def __init__(self, options, vocabulary, embedding):
        super().__init__()
        width = options.width
        # The row of [PAD], 0, is not trained.
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        nn.init.uniform_(self.embedding.weight, -options.table_bound, options.table_bound)
        self.condition = nn.Linear(embedding, width)
        sizes = (width, options.hidden, options.kernel)
        self.blocks = nn.ModuleList(Block(*sizes, d, options.dropout) for d in options.dilations)
        self.head = nn.Linear(width, vocabulary)
        for linear in (self.condition, self.head):
            bound = 1 / math.sqrt(linear.in_features)
            nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.uniform_(linear.bias, -bound, bound)
        if options.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, mask, z):
        mask = mask.unsqueeze(-1)
        x = mask * (self.embedding(ids) + self.condition(z).unsqueeze(1))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def learning_rate(options, step, total):
    """As Schedule::WarmupCosine; the first step is 1."""
    warmup = min(options.warmup, total // 2)
    end = min(1e-5, options.learning_rate)
    up = min(step / max(warmup, 1), 1)
    down = min(max((step - warmup) / max(total - warmup, 1), 0), 1)
    return up * (end + (options.learning_rate - end) * (0.5 + 0.5 * math.cos(math.pi * down)))


@torch.no_grad()
def evaluate(model, data, size):
    model.eval()
    loss, right, count = 0.0, 0, 0
    for first in range(0, len(data), size):
        rows = torch.arange(first, min(first + size, len(data)), device=data.ids.device)
        ids, mask, targets, z = data.batch(rows)
        logits, targets = model(ids, mask, z).float().flatten(0, 1), targets.flatten()
        loss += F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").double().item()
        counted = targets >= 0
        right += (logits.argmax(-1)[counted] == targets[counted]).sum().item()
        count += counted.sum().item()
    model.train()
    return loss / count, right / count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", default=ROOT / "data/wordnet_train.safetensors")
    parser.add_argument("--validation", default=ROOT / "data/wordnet_val.safetensors")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--kernel", type=int, default=5)
    parser.add_argument("--dilations", type=lambda s: [int(d) for d in s.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--table-bound", type=float, default=0.05)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--smoothing", type=float, default=0.0)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["f32", "f16"], default="f32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    # f32 means f32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    train = Data(options.train, options.length, device, options.samples)
    validation = Data(options.validation, options.length, device)
    model = Decoder(options, options.vocabulary, train.z.shape[1]).to(device)
    count = sum(p.numel() for p in model.parameters())
    print(f"device  {options.device}, torch {torch.__version__}")
    print(f"network {count / 1e6:.2f} million parameters")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=options.weight_decay
    )
    mixed = options.precision == "f16"
    scaler = torch.amp.GradScaler(options.device, init_scale=1024.0, growth_interval=2000, enabled=mixed)
    per_epoch = len(train) // options.batch
    total, step, start = options.epochs * per_epoch, 0, time.time()
    for epoch in range(options.epochs):
        order = torch.randperm(len(train), device=device)
        losses = []
        for number in range(per_epoch):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step, total)
            ids, mask, targets, z = train.batch(order[number * options.batch : (number + 1) * options.batch])
            with torch.autocast(device.type, torch.float16, enabled=mixed):
                logits = model(ids, mask, z)
            loss = F.cross_entropy(
                logits.float().flatten(0, 1),
                targets.flatten(),
                ignore_index=-100,
                label_smoothing=options.smoothing,
            )
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        cross_entropy, accuracy = evaluate(model, validation, options.batch)
        mean = torch.stack(losses).mean().item()
        print(
            f"epoch {epoch + 1}: cross entropy {mean:.4f}; validation perplexity {math.exp(cross_entropy):.2f}, "
            f"accuracy {accuracy:.4f}; {time.time() - start:.1f} s"
        )
    print(f"validation: cross_entropy {cross_entropy:.4f}, perplexity {math.exp(cross_entropy):.2f}, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
