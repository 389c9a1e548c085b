"""A compile asks how a convolution lays out what it gives, which no count of images decides.

Which kernel a convolution runs is chosen at each of its calls, in a library as well; on a CPU also by whether there are
16 images. Torch, which wants to know the layout alone, asks for the kernel, and a compile would note how many images
its example had. A library would then be compiled once more for code that is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def of_any_number() -> Iterator[None]:
    """Compiles inside the block ask about a kernel that takes any number of images.

    It lays out as the others do: channels last where the input or the weight is so. `torch.export` switches the others
    off for a whole trace; here they are off for that question alone, since Inductor's plans depend on them as well.
    """
    select = torch._C._select_conv_backend

    def among_general(*args: Any, **kwargs: Any) -> Any:
        with _no_others():
            return select(*args, **kwargs)

    with mock.patch.object(torch._C, "_select_conv_backend", among_general):
        yield


@contextmanager
def _no_others() -> Iterator[None]:
    onednn, *_ = torch.backends.mkldnn.set_flags(False, _fp32_precision=None)
    nnpack = torch.backends.nnpack.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(onednn, _fp32_precision=None)
        torch.backends.nnpack.set_flags(*nnpack)
