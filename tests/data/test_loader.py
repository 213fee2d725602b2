import json

import numpy as np
import pytest

from moe.config import ConfigError
from moe.data import TrainLoader, prepare


@pytest.fixture
def corpus(config):
    return prepare(config)


def load(corpus, rows=range(4), accumulation=2, batch_size=4, seed=0, **options):
    return TrainLoader(corpus, accumulation=accumulation, batch_size=batch_size, rows=rows, seed=seed, **options)


def take(loader, count):
    return [next(loader) for _ in range(count)]


def same(first, second):
    return all((a[name] == b[name]).all() for a, b in zip(first, second, strict=True) for name in a)


def test_order_is_the_one_of_the_dataset(corpus):
    loader, dataset = load(corpus), corpus.train_dataset(0)
    for step, batch in enumerate(take(loader, 5)):
        for name, value in batch.items():
            assert value.shape == (2, 4, 17) and value.dtype == np.int32
            for a in range(2):
                for b in range(4):
                    assert (value[a, b] == dataset[(step * 2 + a) * 4 + b][name]).all()
    loader.close()


def test_order_does_not_depend_on_the_split_over_processes(corpus):
    whole = take(load(corpus), 40)
    for split in ([range(0, 2), range(2, 4)], [[0, 2], [1, 3]], [[3], [0], [2, 1]]):
        parts = [(rows, take(load(corpus, rows), 40)) for rows in split]
        for rows, part in parts:
            assert same(part, [{name: value[:, list(rows)] for name, value in batch.items()} for batch in whole])


def test_order_does_not_depend_on_threads_or_accumulation(corpus):
    whole = take(load(corpus), 20)
    assert same(whole, take(load(corpus, num_threads=0, prefetch=0), 20))
    assert same(whole, take(load(corpus, num_threads=4, prefetch=64), 20))
    joined = take(load(corpus, rows=range(8), accumulation=1, batch_size=8), 20)
    assert all((a["tokens"].reshape(8, -1) == b["tokens"][0]).all() for a, b in zip(whole, joined, strict=True))
    assert not same(whole, take(load(corpus, seed=1), 20))


@pytest.mark.parametrize("step", [0, 1, 7, 60])
def test_resume_is_exact(corpus, step):
    # 8 sequences a step and about 160 windows: step 60 lies in the third epoch.
    assert sum(map(corpus.num_train_tokens, corpus.domains)) / 16 < 8 * 60 / 2
    loader = load(corpus)
    take(loader, step)
    state = json.loads(json.dumps(loader.get_state()))
    assert state["next_step"] == step and state["fingerprint"] == corpus.fingerprint
    expected = take(loader, 10)
    fresh = load(corpus, rows=[2, 3])
    take(fresh, 3)
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert same(take(fresh, 10), [{name: value[:, 2:] for name, value in batch.items()} for batch in expected])


@pytest.mark.parametrize(("name", "value"), [("fingerprint", "0" * 16), ("seed", 0), ("sequences_per_step", 16)])
def test_a_position_in_other_data_is_refused(corpus, name, value):
    loader = load(corpus, seed=5)
    with pytest.raises(ConfigError, match=f"data: {name} = .*: the saved position has {value!r}; go on with"):
        loader.set_state(loader.get_state() | {name: value})
    assert loader.get_state()["next_step"] == 0


def test_no_rows_are_refused(corpus):
    with pytest.raises(ValueError, match="rows is empty"):
        load(corpus, rows=[])


def test_rows_outside_the_batch_are_refused(corpus):
    with pytest.raises(ValueError, match=r"rows has 4, which is not in range\(batch_size = 4\)"):
        load(corpus, rows=[0, 4])
