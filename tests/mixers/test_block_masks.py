"""block_masks.py: blocks are those that PyTorch finds in the whole mask; attention over them is attention under the mask."""

import copy
import warnings

import pytest
import torch
import torch._dynamo.testing
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels import backend
from mixers import block_masks
from mixers.base import TokenLayout, attend
from mixers.local import SparsityPattern
from mixers.tilings import mask_tilings, neighborhood_tiling, strided_tiling, window_tiling

CPU = torch.device("cpu")
GRID = TokenLayout(17, 19, 1)  # 324 tokens: two blocks and a part of one
PATTERNS = {
    "local": lambda: SparsityPattern([window_tiling(GRID.num_patches, 20)], GRID),
    "nearly all": lambda: SparsityPattern([window_tiling(GRID.num_patches, 300)], GRID),  # blocks with all of their pairs
    "strided": lambda: SparsityPattern([window_tiling(GRID.num_patches, 7), strided_tiling(GRID.num_patches, 14)], GRID),
    "cross": lambda: SparsityPattern(mask_tilings("2d_cardinal", 3, 17, 19), GRID),
    "neighborhood": lambda: SparsityPattern([neighborhood_tiling(17, 19, 5, 2)], GRID),
    "two whole blocks": lambda: SparsityPattern([window_tiling(256, 9)], TokenLayout(16, 16)),
}


@pytest.fixture(params=PATTERNS)
def pattern(request):
    """A pattern whose blocks are listed, as on CUDA."""
    pattern = PATTERNS[request.param]()
    for name, table in block_masks.list_blocks(pattern.allows, pattern.layout.num_tokens, CPU).items():
        pattern.blocks.register_buffer(name, table)
    return pattern


def listed(counts, indices):
    """Blocks of every row, as sets."""
    return [set(row[:count].tolist()) for count, row in zip(counts[0, 0], indices[0, 0], strict=True)]


def test_blocks_are_those_of_the_whole_mask(pattern):
    N = pattern.layout.num_tokens
    ours = pattern.blocks.block_mask()
    theirs = create_block_mask(lambda b, h, i, j: pattern.allows(i, j), None, None, N, N, device="cpu")
    assert ours.shape == theirs.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        found, expected = (
            listed(getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")) for mask in (ours, theirs)
        )
        assert found == expected


def test_attention_by_blocks_is_attention_under_the_mask(pattern, monkeypatch):
    """On the CPU flex_attention has no backward pass; its compiler is left out."""
    monkeypatch.setattr(block_masks, "compiled_attention", lambda: flex_attention)
    query, key, value = torch.randn(3, 2, 2, pattern.layout.num_tokens, 16)
    with warnings.catch_warnings(action="ignore"):  # that it is not compiled
        found = pattern.blocks(query, key, value)
    expected, _ = attend(query, key, value, mask=pattern.make_mask(CPU))
    torch.testing.assert_close(found, expected)


def test_layers_with_one_pattern_are_compiled_once(monkeypatch):
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(flex_attention, backend=counter, dynamic=False, fullgraph=True)
    monkeypatch.setattr(block_masks, "compiled_attention", lambda: compiled)
    with torch.no_grad():
        for reach in (20, 20, 20, 5):
            layer = SparsityPattern([window_tiling(GRID.num_patches, reach)], GRID)
            for name, table in block_masks.list_blocks(layer.allows, GRID.num_tokens, CPU).items():
                layer.blocks.register_buffer(name, table)
            for _ in range(2):
                layer.blocks(*torch.randn(3, 2, 2, GRID.num_tokens, 16))
    assert counter.frame_count == 2


def test_a_compiler_that_fails_is_one_warning_and_tiles(monkeypatch):
    """Also in a copy of the layer, whose blocks must ask the copy."""
    pattern = copy.deepcopy(PATTERNS["local"]())
    assert pattern.blocks.allows.__self__ is pattern
    x = torch.randn(3, 2, 2, GRID.num_tokens, 16)
    expected, _ = pattern(*x)

    def fail():
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(block_masks, "compiled_attention", fail)
    monkeypatch.setattr(backend, "running_on", lambda device: "triton" if backend.may_use_triton() else "chunked")
    monkeypatch.setattr(backend, "triton_kernels", lambda: True)
    monkeypatch.setattr(backend, "_failed", set())
    for name, table in block_masks.list_blocks(pattern.allows, GRID.num_tokens, CPU).items():
        pattern.blocks.register_buffer(name, table)
    with pytest.warns(UserWarning, match="no ptxas") as caught:
        torch.testing.assert_close(pattern(*x)[0], expected)
        torch.testing.assert_close(pattern(*x)[0], expected)
    assert len(caught) == 1


def test_what_flex_attention_does_not_take_goes_another_way(monkeypatch):
    blocks = PATTERNS["local"]().blocks
    monkeypatch.setattr(backend, "running_on", lambda device: "triton")
    x = torch.randn(1, 1, GRID.num_tokens, 16)
    assert blocks.covers(x) and blocks.covers(x.bfloat16())
    assert not blocks.covers(x.double()) and not blocks.covers(x[..., :15])
    with backend.use("reference"):
        assert not blocks.covers(x)


def test_short_sequences_and_whole_attention_have_no_blocks():
    assert SparsityPattern([window_tiling(100, 5)], TokenLayout(10, 10)).blocks is None
    assert SparsityPattern([window_tiling(400, 400)], TokenLayout(20, 20)).blocks is None


def test_what_may_run_is_a_constant_to_the_compiler():
    """It asks for a module, which the compiler cannot trace."""
    compiled = torch.compile(lambda x: x + backend.may_use_triton(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == backend.may_use_triton()
