"""Arguments of `torch.compile` for the settings of this program, and the errors of its compilers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from volumen.utils.errors import VolumenError

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


@contextmanager
def compiling(setting: str, device: torch.device, remedy: str = "or set it to false") -> Iterator[None]:
    """Turn a missing or failing compiler inside the block into an error of one line.

    For a CPU, PyTorch writes C++ code and compiles it; for a GPU, it needs Triton.

    Args:
        setting: the setting or flag that needs the compiler.
        device: where the compiled network runs.
        remedy: the alternative to installing a compiler.

    Raises:
        VolumenError: the compiler is missing or failed.
    """
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    if device.type == "cpu":
        _require_cxx(setting, remedy)
    try:
        yield
    except (InvalidCxxCompiler, CppCompileError, BackendCompilerFailed) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # g++ states the cause in the first line with this word; the other lines are the command and its output.
        cause = next(
            (line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__
        )
        raise VolumenError(setting, f"the network cannot be compiled: {cause}", remedy=remedy) from error


def _require_cxx(setting: str, remedy: str) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise VolumenError(
            setting,
            expected="a C++ compiler, which compiles the network",
            found="none",
            remedy=f"install one, such as g++, {remedy}",
        ) from error
