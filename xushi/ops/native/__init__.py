"""The C++ forms of ops: float32 and bfloat16 on a CPU, compiled once per machine with any C++17
compiler it has.

Without a compiler, or on a processor without AVX2 or NEON, there are none and the PyTorch forms
run.
"""

from xushi.ops.native.build import form, load, status
from xushi.ops.native.functions import (
    NativeAttention,
    NativeCrossEntropy,
    NativeExperts,
    NativeLatentAttention,
    NativeLinear,
    NativeLogProbabilities,
    NativeNorm,
    NativeSwiglu,
    adamw,
    newton_schulz,
    serves,
)

__all__ = [
    "NativeAttention",
    "NativeCrossEntropy",
    "NativeExperts",
    "NativeLatentAttention",
    "NativeLinear",
    "NativeLogProbabilities",
    "NativeNorm",
    "NativeSwiglu",
    "adamw",
    "form",
    "load",
    "newton_schulz",
    "serves",
    "status",
]
