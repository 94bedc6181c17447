"""The yardsticks against the command-line tools, and the primed one against its definition."""

import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from xushi.base.errors import XushiError
from xushi.evaluate import compressors
from xushi.evaluate.compressors import Method, bits_per_byte, by_all_methods, xz_primed


def _source(start: int, size: int) -> bytes:
    return _ALL[start : start + size]


_LIBRARY = Path(lzma.__file__).parent
_ALL = b"".join(
    (_LIBRARY / f"{name}.py").read_bytes()
    for name in ("argparse", "typing", "inspect", "datetime", "ast")
)
TEXT = _source(0, 250_000)


@pytest.mark.parametrize(
    ("method", "command"),
    [
        ("gzip", ["gzip", "-9nc"]),
        ("xz", ["xz", "-9c"]),
        ("zstd", ["zstd", "-19qc", "--single-thread"]),
    ],
)
def test_sizes_are_the_command_lines(method: Method, command: list[str], tmp_path: Path) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    (tmp_path / "text").write_bytes(TEXT)
    output = subprocess.run(
        [*command, str(tmp_path / "text")], check=True, capture_output=True
    ).stdout
    ours = bits_per_byte(TEXT, method) * len(TEXT) / 8
    # The same format, level and container; libraries of other versions find slightly other matches.
    assert (
        abs(ours - len(output))
        <= {"xz": 32, "gzip": 0.002 * len(output), "zstd": 0.01 * len(output)}[method]
    )


def test_headers_count() -> None:
    assert bits_per_byte(b"a", "gzip") == 8 * 21
    assert by_all_methods(b"a") == {m: bits_per_byte(b"a", m) for m in ("gzip", "xz", "zstd")}
    assert bits_per_byte(b"a", "xz") == 8 * len(lzma.compress(b"a", preset=9))
    assert bits_per_byte(b"a", "zstd") > 8 * 10


def test_empty_text_and_unknown_method_are_refused() -> None:
    for call in (lambda: bits_per_byte(b"", "xz"), lambda: xz_primed(b"abc", b"")):
        with pytest.raises(XushiError, match="no held-out text"):
            call()
    with pytest.raises(ValueError, match="no compressor"):
        bits_per_byte(b"abc", "bzip2")  # type: ignore[arg-type]


def test_primed_is_the_difference_of_two_files() -> None:
    training, heldout = TEXT[:220_000], TEXT[220_000:]
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": len(TEXT)}]
    sizes = [len(lzma.compress(text, filters=filters)) for text in (training + heldout, training)]
    primed = xz_primed(training, heldout)
    assert primed.bits_per_byte == (sizes[0] - sizes[1]) * 8 / len(heldout)
    assert (primed.training_bytes_used, primed.training_bytes) == (220_000, 220_000)
    assert primed.dictionary_bytes == len(TEXT)
    assert primed.bits_per_byte < bits_per_byte(heldout, "xz")


def test_primed_text_that_was_seen_costs_next_to_nothing_however_far_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heldout = _source(260_000, 4_000)
    monkeypatch.setattr(compressors, "_CHUNK", 5_000)  # many pieces, none of them aligned
    primed = xz_primed(heldout + TEXT, heldout)
    assert primed.bits_per_byte < 0.2 < bits_per_byte(heldout, "xz")


def test_primed_says_what_it_had_to_leave_out() -> None:
    training, heldout = TEXT, _source(260_000, 10_000)
    memory = 34 << 20
    primed = xz_primed(training, heldout, memory_bytes=memory)
    assert primed.training_bytes == len(training)
    assert 0 < primed.training_bytes_used < len(training)
    assert primed.encoder_bytes <= memory
    assert (
        primed.bits_per_byte
        == xz_primed(training[-primed.training_bytes_used :], heldout).bits_per_byte
    )
    # Held-out text longer than all that is allowed leaves no room for training text at all.
    assert xz_primed(TEXT[:1000], TEXT, memory_bytes=memory).training_bytes_used == 0


def test_one_or_two_encoders_at_a_time_give_the_same_sizes() -> None:
    training, heldout = TEXT[:200_000], TEXT[200_000:]
    small = compressors._encoder_bytes(len(TEXT)) * 3 // 2
    narrow, wide = xz_primed(training, heldout, memory_bytes=small), xz_primed(training, heldout)
    assert narrow.encoder_bytes * 2 == wide.encoder_bytes
    assert narrow.bits_per_byte == wide.bits_per_byte


def test_sixty_megabytes_fit_one_gibibyte() -> None:
    assert compressors._largest_dictionary(1 << 30) > 60_000_000 * 1.4
    assert compressors._encoder_bytes(compressors._largest_dictionary(1 << 30)) <= 1 << 30
