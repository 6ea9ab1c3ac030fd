"""Arguments of `torch.compile` for the settings of this program."""

from __future__ import annotations

from typing import Any

import torch

COMPILE_MODES = ("reduce-overhead", "max-autotune")
"""torch's names: CUDA graphs, which launch all kernels of a pass at once; and a search for the fastest kernels."""
_RECOMPILATIONS = 64
"""Shapes per function: every level of deep supervision, and every loss of one class, compiles a version of its own."""


def compile_arguments(setting: bool | str, **more: Any) -> dict[str, Any]:
    """Return the arguments of `torch.compile` for a setting: true or one of `COMPILE_MODES`.

    Shapes are static, since all patches have one size, and code for a known shape is faster.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILATIONS)
    mode = {} if isinstance(setting, bool) else {"mode": setting}
    return {"dynamic": False, **mode, **more}
