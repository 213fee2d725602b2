"""The global batch of the invariance grid: uneven documents and padding, in numpy."""

import numpy as np

SEQUENCES, POSITIONS, VOCAB = 32, 16, 264


def batch(seed: int = 0, sequences: int = SEQUENCES, positions: int = POSITIONS) -> dict[str, np.ndarray]:
    """[G, S+1] tokens in 1 to 4 documents a sequence; unequal padding; sequences of nothing but padding.

    Documents speak different dialects (a narrow band of tokens each), so that the load differs between sequences. The
    last column, which is only ever a target, is padding: so appended padding does not turn a target into an input.
    """
    rng = np.random.default_rng(seed)
    shape = (sequences, positions + 1)
    out = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions", "domains")}
    for g in range(sequences):
        if g % 16 in (5, 6):
            continue  # a whole sequence of padding
        at, end = 0, positions - int(rng.integers(0, positions // 2) if g % 3 else 0)
        document = 0
        while at < end:
            length = min(end - at, int(rng.integers(3, positions)))
            document += 1
            band = int(rng.integers(0, VOCAB - 40))
            out["tokens"][g, at : at + length] = rng.integers(band, band + 40, length)
            out["segment_ids"][g, at : at + length] = document
            out["positions"][g, at : at + length] = np.arange(length)
            at += length
    return out


def pad_tokens(arrays: dict[str, np.ndarray], extra: int) -> dict[str, np.ndarray]:
    """`extra` positions of padding after every sequence, with garbage for tokens."""
    G = arrays["tokens"].shape[0]
    garbage = np.random.default_rng(9).integers(0, VOCAB, (G, extra)).astype(np.int32)
    zeros = np.zeros((G, extra), np.int32)
    added = {"tokens": garbage, "segment_ids": zeros, "positions": zeros, "domains": zeros}
    return {name: np.concatenate([value, added[name]], axis=1) for name, value in arrays.items()}


def pad_sequences(arrays: dict[str, np.ndarray], extra: int) -> dict[str, np.ndarray]:
    """`extra` sequences of padding after the batch, with garbage for tokens."""
    S = arrays["tokens"].shape[1]
    garbage = np.random.default_rng(9).integers(0, VOCAB, (extra, S)).astype(np.int32)
    zeros = np.zeros((extra, S), np.int32)
    added = {"tokens": garbage, "segment_ids": zeros, "positions": zeros, "domains": zeros}
    return {name: np.concatenate([value, added[name]], axis=0) for name, value in arrays.items()}


def padded(arrays: dict[str, np.ndarray], padding: str) -> dict[str, np.ndarray]:
    if padding == "tokens":
        return pad_tokens(arrays, 8)
    return pad_sequences(arrays, arrays["tokens"].shape[0]) if padding == "sequences" else arrays
