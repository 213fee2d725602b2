import gzip
import lzma

import numpy as np
import pytest

from moe.analysis.baselines import bits_per_byte, gzip_bits_per_byte, unigram_bits_per_byte, xz_bits_per_byte

TEXT = b"the quick brown fox jumps over the lazy dog. " * 50


def test_unigram_by_hand() -> None:
    assert unigram_bits_per_byte(b"aaaa") == 0.0
    assert unigram_bits_per_byte(b"abab") == 1.0
    # p = 1/2, 1/4, 1/4: 0.5 * 1 + 2 * 0.25 * 2 = 1.5
    assert unigram_bits_per_byte(b"aabc") == 1.5
    assert unigram_bits_per_byte(bytes(range(256))) == 8.0


def test_unigram_does_not_see_order() -> None:
    shuffled = np.random.default_rng(0).permutation(np.frombuffer(TEXT, np.uint8)).tobytes()
    assert unigram_bits_per_byte(shuffled) == unigram_bits_per_byte(TEXT)
    assert gzip_bits_per_byte(shuffled) > gzip_bits_per_byte(TEXT)


def test_compressors_are_what_a_person_would_unpack() -> None:
    data = bytes(range(256)) * 4
    size = round(gzip_bits_per_byte(data) * len(data) / 8)
    assert size == len(gzip.compress(data, 9)) and gzip.decompress(gzip.compress(data, 9)) == data
    assert xz_bits_per_byte(data) == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / 1024


def test_noise_cannot_be_compressed_and_repeats_can() -> None:
    noise = np.random.default_rng(0).bytes(20_000)
    assert 8.0 < gzip_bits_per_byte(noise) < 8.1
    assert 8.0 < xz_bits_per_byte(noise) < 8.1
    # The same noise twice, too far apart for the 32 KiB of gzip but not for xz.
    far = noise + np.random.default_rng(1).bytes(20_000) + noise
    assert gzip_bits_per_byte(far) > 8.0
    assert xz_bits_per_byte(far) < 8 * 2 / 3 + 0.1


def test_all_three_under_the_names_of_the_evaluation() -> None:
    assert bits_per_byte(TEXT) == {
        "unigram": unigram_bits_per_byte(TEXT),
        "gzip": gzip_bits_per_byte(TEXT),
        "xz": xz_bits_per_byte(TEXT),
    }


@pytest.mark.parametrize("baseline", [unigram_bits_per_byte, gzip_bits_per_byte, xz_bits_per_byte])
def test_no_bytes_is_an_error(baseline) -> None:
    with pytest.raises(ValueError, match="at least 1 byte"):
        baseline(b"")
