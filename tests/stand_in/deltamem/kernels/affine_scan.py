"""The scan: here a plain loop that every device refuses, as the authors' kernel does a CPU."""

from types import SimpleNamespace

import torch


def triton_scan_support(state, q, k, v, keep, erase, write):
    return SimpleNamespace(supported=False, reason="a stand-in")


def triton_affine_scan(state, q, k, v, keep, erase, write, token_mask=None):
    raise RuntimeError("a stand-in")


def loop(state, q, k, v, keep, erase, write, token_mask=None):
    reads = []
    for t in range(q.shape[1]):
        counts = torch.ones_like(q[:, t, :1]) if token_mask is None else token_mask[:, t, None].to(q.dtype)
        reads.append((state @ q[:, t, :, None]).squeeze(-1) * counts)
        row = write[:, t] * v[:, t] - erase[:, t] * (state @ k[:, t, :, None]).squeeze(-1)
        written = keep[:, t, :, None] * state + row[:, :, None] * k[:, t, None, :]
        state = torch.where(counts[:, :, None] > 0, written, state)
    return state, torch.stack(reads, 1)
