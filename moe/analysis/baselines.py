"""What a model has to beat: how far simple compressors get on the very bytes it is evaluated on, in bits per byte.

All three numbers flatter the baseline. A language model has never seen the held-out bytes it is scored on; gzip and xz
adapt to those bytes while they compress them, and the unigram table is counted on them and not paid for.
"""

import gzip
import lzma

import numpy as np


def unigram_bits_per_byte(data: bytes) -> float:
    """Empirical order-0 entropy `-sum_b p_b log2 p_b` in bits per byte, with `p_b` the share of byte value b in `data`.

    No code with one fixed codeword a byte value is shorter, since `p` is fitted to `data` itself. Raises ValueError
    for no bytes.
    """
    counts_V = np.bincount(np.frombuffer(_some(data), np.uint8), minlength=256)
    p = counts_V[counts_V > 0] / len(data)
    return float(np.sum(p * -np.log2(p)))


def gzip_bits_per_byte(data: bytes) -> float:
    """`8 len(gzip -9 (data)) / len(data)`, container of 18 bytes included.

    gzip (LZ77 over the last 32 KiB, Huffman codes a block) learns from the held-out bytes it has already compressed.
    Raises ValueError for no bytes.
    """
    return 8 * len(gzip.compress(_some(data), compresslevel=9, mtime=0)) / len(data)


def xz_bits_per_byte(data: bytes) -> float:
    """`8 len(xz -9e (data)) / len(data)`, container (about 60 bytes) included.

    xz (LZ77 over the last 64 MiB, context-modelled range coder) learns from the held-out bytes it has already
    compressed, so it gains on a model as the held-out set grows. Raises ValueError for no bytes.
    """
    return 8 * len(lzma.compress(_some(data), preset=9 | lzma.PRESET_EXTREME)) / len(data)


def bits_per_byte(data: bytes) -> dict[str, float]:
    """The three baselines under the names that `evaluation.json` uses: unigram, gzip, xz."""
    return {
        "unigram": unigram_bits_per_byte(data),
        "gzip": gzip_bits_per_byte(data),
        "xz": xz_bits_per_byte(data),
    }


def _some(data: bytes) -> bytes:
    if not data:
        raise ValueError("data = b'': must hold at least 1 byte")
    return data
