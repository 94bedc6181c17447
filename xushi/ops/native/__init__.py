"""The ops' C++ kernels for float32 and bfloat16 tensors on a CPU.

They are compiled once per machine with its C++17 compiler. Without a compiler, or on a processor
without AVX2 or NEON, the PyTorch forms run instead.
"""

from xushi.ops.native.attention import NativeAttention, NativeLatentAttention
from xushi.ops.native.build import form, load, status
from xushi.ops.native.calls import serves
from xushi.ops.native.experts import NativeExperts
from xushi.ops.native.functions import (
    NativeCrossEntropy,
    NativeLinear,
    NativeLogProbabilities,
    NativeNorm,
    NativeSwiglu,
    adamw,
    newton_schulz,
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
