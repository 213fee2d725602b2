import numpy as np

from moe.data import ByteConfig
from moe.data.packing import Windows, pack


def test_windows_by_hand():
    # bos a b c eos | bos d eos: 8 tokens, and with S = 3 windows begin at tokens 0, 3 and 6.
    windows = Windows(pack(["abc", "d"], ByteConfig().build(), "x"), 3)
    assert len(windows) == 3
    expected = [
        ([256, 97, 98, 99], [1, 1, 1, 1], [0, 1, 2, 3]),
        ([99, 257, 256, 100], [1, 1, 2, 2], [0, 1, 0, 1]),
        ([100, 257, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]),
    ]
    for window, (tokens, segment_ids, positions) in zip(windows, expected, strict=True):
        assert window["tokens"].tolist() == tokens
        assert window["segment_ids"].tolist() == segment_ids
        assert window["positions"].tolist() == positions
        assert {value.dtype for value in window.values()} == {np.dtype(np.int32)}


def test_a_document_that_starts_with_the_window_is_segment_one():
    # bos a eos bos b eos: with S = 3 window 1 begins at the second bos.
    windows = Windows(pack(["a", "b"], ByteConfig().build(), "x"), 3)
    assert windows[0]["segment_ids"].tolist() == [1, 1, 1, 2]
    assert windows[1]["tokens"].tolist() == [256, 98, 257, 0]
    assert windows[1]["segment_ids"].tolist() == [1, 1, 1, 0]
    assert windows[1]["positions"].tolist() == [0, 1, 2, 0]


def test_every_token_is_predicted_exactly_once():
    tokenizer = ByteConfig().build()
    for seq_len in (3, 7, 8, 50):
        for count in range(1, 9):
            stream = pack([chr(97 + i) * (3 * i + 1) for i in range(count)], tokenizer, "x")
            targets = [w["tokens"][1:][w["segment_ids"][1:] > 0] for w in Windows(stream, seq_len)]
            assert all(len(target) for target in targets), "no window is padding only"
            assert np.concatenate(targets).tolist() == stream.tokens[1:].tolist()


def test_segments_and_positions_agree_with_a_walk_over_the_stream():
    tokenizer = ByteConfig().build()
    rng = np.random.default_rng(0)
    stream = pack(["z" * n for n in rng.integers(1, 12, 60)], tokenizer, "x")
    for window in Windows(stream, 10):
        segment, position = 1, 0
        for index, token in enumerate(window["tokens"]):
            if window["segment_ids"][index] == 0:
                break
            if token == tokenizer.bos and index:
                segment, position = segment + 1, 0
            assert (window["segment_ids"][index], window["positions"][index]) == (segment, position)
            position += 1


def test_windows_refuse_indices_outside():
    windows = Windows(pack(["abc"], ByteConfig().build(), "x"), 2)
    assert len(list(windows)) == len(windows) == 2
