"""Attention under a sparsity pattern by PyTorch's `flex_attention`, which skips empty blocks of pairs.

Compiled, it is one fused Triton kernel forward and two backward, so it is for CUDA; elsewhere it computes all scores.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kernels import backend

BLOCK = 128  # tokens along the side of a block, as the kernels of flex_attention require
LEAST_FEATURES = 16  # of a head, for their products


@functools.cache
def compiled_attention() -> Callable:
    torch._dynamo.config.recompile_limit = 64  # one compilation for every pattern and shape
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


class BlockSparsePattern(nn.Module):
    """Pairs of N tokens that attend to each other, as a list of blocks, made when the module moves to CUDA.

    Args:
        allows: rule on numbers i and j, tensors that broadcast: True where token i attends to token j.
        num_tokens: N.
    """

    def __init__(self, allows: Callable[[Tensor, Tensor], Tensor], num_tokens: int):
        super().__init__()
        self.allows, self.num_tokens = allows, num_tokens

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device="cpu")).device
        if device.type == "cuda":
            for name, table in list_blocks(self.allows, self.num_tokens, device).items():
                self.register_buffer(name, table, persistent=False)
        return self

    def covers(self, query: Tensor) -> bool:
        """Return True where Triton computes, on dtypes and heads that flex_attention supports."""
        return (
            backend.running_on(query.device) == "triton"
            and not backend.is_plain()
            and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and query.shape[-1] >= LEAST_FEATURES
        )

    def block_mask(self) -> BlockMask:
        N, tables = self.num_tokens, dict(self.named_buffers())
        return BlockMask((N, N), **tables, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=lambda b, h, i, j: self.allows(i, j))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, H, N, d) each -> (B, H, N, d)."""
        # Inside a compiled model it is compiled with the model.
        attention = flex_attention if torch.compiler.is_compiling() else compiled_attention()
        return attention(query, key, value, block_mask=self.block_mask())


def list_blocks(allows: Callable[[Tensor, Tensor], Tensor], num_tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Make the tables of a `BlockMask` by the names of its arguments: blocks with some and (`full`) with all of their pairs.

    One row of blocks at a time, so that no mask of all pairs is materialized.
    """
    some, every = [], []
    tokens = torch.arange(num_tokens, device=device)
    for i in tokens[:, None].split(BLOCK):
        allowed = F.pad(allows(i, tokens), (0, -num_tokens % BLOCK)).unflatten(1, (-1, BLOCK))
        some.append(allowed.any(2).any(0))
        every.append(allowed.all(2).all(0) & (len(i) == BLOCK))  # a partial block is masked
    some, every = torch.stack(some), torch.stack(every)
    tables = {}
    for prefix, blocks in (("", some & ~every), ("full_", every)):
        for side, listed in (("kv", blocks), ("q", blocks.T)):
            first = listed.int().argsort(dim=1, descending=True, stable=True)
            tables[f"{prefix}{side}_num_blocks"] = listed.sum(1, dtype=torch.int32)[None, None]
            tables[f"{prefix}{side}_indices"] = first.int()[None, None].contiguous()
    return tables
