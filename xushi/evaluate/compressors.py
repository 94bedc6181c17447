"""Bits per byte of general compressors on the held-out text, to compare a model with.

gzip -9, xz -9 and zstd -19 see the held-out text alone; sizes are those of whole files, headers
included. `xz_primed` is the fair comparison: xz -9 that was given the training text first, as the
model was. Not here: bits per byte of a model (`bits`).
"""

import lzma
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import zstandard

from xushi.base.errors import BadInput

Method = Literal["gzip", "xz", "zstd"]
METHODS: tuple[Method, ...] = get_args(Method)

PRIMED_MEMORY_BYTES = 1 << 30
_GZIP_CONTAINER = 31  # zlib's window bits: 15, plus 16 for gzip's header and trailer
_CHUNK = 1 << 20
_SMALLEST_DICTIONARY = 4096  # the format's own limit, LZMA_DICT_SIZE_MIN


@dataclass(frozen=True)
class Primed:
    """The result of `xz_primed`.

    `bits_per_byte` is per held-out byte. The last `training_bytes_used` of `training_bytes` were
    given first, with a dictionary of `dictionary_bytes`. `encoder_bytes` bounds the memory of all
    encoders together.
    """

    bits_per_byte: float
    training_bytes_used: int
    training_bytes: int
    dictionary_bytes: int
    encoder_bytes: int


def bits_per_byte(data: bytes, method: Method) -> float:
    """Bits of the whole compressed file per byte of `data`, as the command would write it.

    "gzip" is gzip -9 without a file name, "xz" is xz -9 (one stream, CRC64), "zstd" is zstd -19
    with checksum. Versions of the libraries differ by a few bytes. Raises `BadInput` for empty
    data.
    """
    _refuse_empty(data)
    return 8 * _compressed_size(data, method) / len(data)


def by_all_methods(data: bytes) -> dict[Method, float]:
    """`bits_per_byte` by each of the three methods."""
    return {method: bits_per_byte(data, method) for method in METHODS}


def xz_primed(training: bytes, heldout: bytes, memory_bytes: int = PRIMED_MEMORY_BYTES) -> Primed:
    """Bits per held-out byte of xz -9 given the training text first: (size(xz(training + heldout))
    - size(xz(training))) * 8 / len(heldout), with preset 9's filter and a dictionary as large as
    both texts.

    All encoders together use less than `memory_bytes` (measured: 581 MiB for 60 MB of text, 903 MiB
    for 90 MB). If that is too little for both texts, only the last part of `training` that fits is
    used, and the result tells how much. Each of the two sizes takes about a second per MB. They are
    computed in parallel if memory allows; this changes no size. Raises `BadInput` for empty
    held-out text.
    """
    _refuse_empty(heldout)
    largest = _largest_dictionary(memory_bytes)
    used = min(len(training), max(0, largest - len(heldout)))
    training_view = memoryview(training)[len(training) - used :]
    dictionary = max(_SMALLEST_DICTIONARY, min(largest, used + len(heldout)))
    workers = 2 if 2 * _encoder_bytes(dictionary) <= memory_bytes else 1
    with ThreadPoolExecutor(workers) as pool:  # liblzma runs outside the interpreter's lock
        both, alone = pool.map(
            lambda texts: _xz_size(texts, dictionary),
            [(training_view, memoryview(heldout)), (training_view,)],
        )
    return Primed(
        8 * (both - alone) / len(heldout),
        used,
        len(training),
        dictionary,
        workers * _encoder_bytes(dictionary),
    )


def _compressed_size(data: bytes, method: Method) -> int:
    if method == "gzip":
        # gzip's own buffer of symbols is twice zlib's default, which memory level 9 matches.
        encoder = zlib.compressobj(9, zlib.DEFLATED, _GZIP_CONTAINER, 9)
        return len(encoder.compress(data)) + len(encoder.flush())
    if method == "xz":
        return len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9))
    if method == "zstd":
        return len(zstandard.ZstdCompressor(level=19, write_checksum=True).compress(data))
    raise ValueError(f"no compressor called {method!r}")


def _xz_size(texts: tuple[memoryview, ...], dictionary: int) -> int:
    # In chunks, so that neither the joined text nor the compressed one is held in memory.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}]
    encoder = lzma.LZMACompressor(format=lzma.FORMAT_XZ, filters=filters)
    size = 0
    for text in texts:
        for start in range(0, len(text), _CHUNK):
            size += len(encoder.compress(text[start : start + _CHUNK]))
    return size + len(encoder.flush())


def _encoder_bytes(dictionary: int) -> int:
    # liblzma, bt4: 1.5 x for the window, 8 x for the tree, 1 to 4 x for the hash table; 10.2 to
    # 11.5 x was measured.
    return dictionary * 23 // 2 + (32 << 20)


def _largest_dictionary(memory_bytes: int) -> int:
    return max(_SMALLEST_DICTIONARY, (memory_bytes - (32 << 20)) * 2 // 23)


def _refuse_empty(data: bytes) -> None:
    if not data:
        raise BadInput(
            "there is no held-out text to compress: it is 0 bytes long",
            "give more text, or hold out a larger share of it",
        )
