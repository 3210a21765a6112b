"""Constant tensors of layers, such as index tables and masks: of one grid of tokens, or of every grid that a layer meets."""

import operator
from collections.abc import Callable
from threading import Lock, Thread

import torch
from torch import Tensor, nn

KEPT = 4  # grids with tables in a `PerGrid`, besides the first
_changing = Lock()  # of `PerGrid.recent`


class ConstantTables(nn.Module):
    """Base of modules with constant tensors: buffers that follow the module to its device and are in no checkpoint.

    They are made on the CPU whatever the default device, and set again by every `_apply`: so they survive `to_empty` and a
    model built on the meta device (as for FSDP), which leave other buffers without values.
    """

    def __init__(self):
        super().__init__()
        self._constants: dict[str, Tensor] = {}

    def set_tables(self, make: Callable[[], dict[str, Tensor | None]]) -> None:
        """Make tables and register them by their names; None stands for a table that this module does not need."""
        # Made in a pass under inference_mode, they must still serve a backward pass.
        with torch.device("cpu"), torch.inference_mode(False):
            for name, table in make().items():
                if table is not None:
                    self._constants[name] = table
                self.register_buffer(name, table, persistent=False)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for name, table in self._constants.items():
            now = self._buffers[name]
            self._buffers[name] = table.to(now.device, now.dtype)
        return self


class GridTables(ConstantTables):
    """Tables of one grid: `make(*sides)` by their names."""

    def __init__(self, make: Callable[..., dict[str, Tensor | None]], *sides: int):
        super().__init__()
        self.set_tables(lambda: make(*sides))


class PerGrid(nn.Module):
    """A module of constant tables for every grid that a layer meets: `first`, a submodule, and the last `KEPT` others.

    The others are no submodules. They are dropped when the module moves, and made again when they are asked for. A compiled
    graph keeps those of its grid.

    Args:
        make: makes the module of the grid with these sides. It must be picklable.
        sides: numbers that describe the first grid; None: no grid is known yet.
    """

    def __init__(self, make: Callable[..., nn.Module], sides: tuple[int, ...] | None):
        super().__init__()
        self.make, self.sides = make, sides
        self.first = None if sides is None else make(*sides)
        self.recent: dict[tuple, nn.Module] = {}  # the last used is the last
        self.compiled: list[str] = []  # attributes
        self.dtype = torch.float32  # of tables of floating-point numbers

    def at(self, sides: tuple[int, ...], device: torch.device) -> nn.Module:
        """Return the tables of a grid; those of another than the first are on this device."""
        if sides == self.sides:
            return self.first
        sides = tuple(operator.index(side) for side in sides)  # a compiler may hold symbols
        if torch.compiler.is_compiling():
            return getattr(self, keep_for_graph(self, sides, device))
        with _changing:
            tables = self.recent.pop((*sides, device), None)
        if tables is None:
            tables = self.make_apart(sides, device)
        with _changing:
            self.recent[(*sides, device)] = tables
            while len(self.recent) > KEPT:
                del self.recent[next(iter(self.recent))]
        return tables

    def make_apart(self, sides: tuple[int, ...], device: torch.device) -> nn.Module:
        """Make the tables of a grid in a thread, which no mode or transform of the caller reaches.

        Under `torch.func`, `torch.export` or a default device they would be tensors of that call only.
        """
        made = []

        def run() -> None:
            try:
                made.append(self.make(*sides).to(device, self.dtype))
            except Exception as error:  # a grid that does not fit
                made.append(error)

        thread = Thread(target=run)
        thread.start()
        thread.join()
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    def _apply(self, fn, recurse: bool = True):
        self.recent.clear()
        while self.compiled:
            del self.__dict__[self.compiled.pop()]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)


@torch.compiler.assume_constant_result
def keep_for_graph(tables: PerGrid, sides: tuple[int, ...], device: torch.device) -> str:
    """Keep the tables of a grid as an attribute, and return its name: a graph finds them as it finds parameters.

    It runs while a graph is traced, and is no part of it.
    """
    name = f"grid_{'_'.join(map(str, sides))}_{device.type}_{device.index}"
    if name not in tables.__dict__:
        tables.__dict__[name] = tables.make_apart(sides, device)
        tables.compiled.append(name)
    return name
