"""Report that memory is short in one line: what was being made, how much was missing, and what helps."""

import contextlib
import re
from collections.abc import Iterator

import torch

from runs import Stopped

# Words of NumPy, Python and torch's CPU allocator, which raise plain exceptions; CUDA's allocator has its own class.
SAID = ("not enough memory", "can't allocate memory", "cannot allocate memory", "unable to allocate", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, on the CPU or a GPU, says that memory is short."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in SAID)


def _amount(error: BaseException) -> str:
    """Return the amount that was asked for, in the error's units or GiB; "" if the error does not say."""
    found = re.search(r"(?:allocate|allocated)\s([\d.,]+)\s?([KMGT]?i?B|bytes)", str(error))
    if not found:
        return ""
    if found[2] != "bytes":
        return f"{found[1]} {found[2]}"
    return f"{int(found[1].replace(',', '').rstrip('.')) / 2**30:,.2f} GiB"


@contextlib.contextmanager
def stop_if_out_of_memory(what: str, advice: str = "") -> Iterator[None]:
    """Turn out-of-memory errors into Stopped. what: the thing being made in this context; advice: on using less memory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        amount = _amount(error)
        where = "of the GPU " * isinstance(error, torch.OutOfMemoryError)
        raise Stopped(
            f"out of memory {where}while making {what}"
            + f": {amount} more could not be had" * bool(amount)
            + f"; {advice}" * bool(advice),
            resumable=True,
        ) from None
