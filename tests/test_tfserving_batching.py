"""When a batch of the local server's is run: the Batcher alone, on an event loop, with runs that only count."""

import asyncio
import importlib.util
import time

import numpy as np
import pytest
from endpoint import REPOSITORY_DIR

TIMEOUT_S = 0.2  # far more than what the loop needs for anything else here


@pytest.fixture(scope="module")
def batching():
    spec = importlib.util.spec_from_file_location("tfserving_batching", REPOSITORY_DIR / "tfserving" / "batching.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def batcher(batching):
    """A Batcher that doubles what it gets, with `sizes`, the rows of each run."""

    def run(array: np.ndarray) -> list[np.ndarray]:
        batcher.sizes.append(len(array))
        return [array * 2]

    parameters = batching.BatchingParameters(max_batch_size=8, batch_timeout_micros=round(TIMEOUT_S * 1e6))
    batcher = batching.Batcher(run, parameters)
    batcher.sizes = []
    return batcher


async def ask(batcher, value: float, rows: int = 1) -> float:
    """Send one request; return how long its right answer took, in seconds."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    [answer] = await batcher.add([np.full((rows, 1), value)], rows)
    assert answer.tolist() == [[2 * value]] * rows
    return loop.time() - started_s


async def one_after_another(batcher, count: int) -> list[float]:
    return [await ask(batcher, value) for value in range(count)]


def test_a_client_that_is_alone_waits_once_and_not_again(batcher, batching):
    times_s = asyncio.run(one_after_another(batcher, 20))
    assert times_s[0] >= TIMEOUT_S * 0.9, "the first batch waits the whole time: nobody knows who else is there"
    assert max(times_s[1:]) < TIMEOUT_S / 2
    assert batcher.sizes == [1] * 20


def test_every_so_many_batches_one_waits_the_whole_time(batcher, batching):
    times_s = asyncio.run(one_after_another(batcher, batching.WHOLE_WAIT_EVERY + 2))
    assert [i for i, time_s in enumerate(times_s) if time_s > TIMEOUT_S / 2] == [0, batching.WHOLE_WAIT_EVERY]


def test_clients_that_come_one_by_one_share_runs_and_a_batch_waits_for_as_many_as_before(batcher):
    async def client(number: int) -> list[float]:
        times_s = []
        for _ in range(5):
            await asyncio.sleep(number * TIMEOUT_S / 100)  # each in a turn of the loop of its own
            times_s.append(await ask(batcher, number))
        return times_s

    async def main() -> list[list[float]]:
        return await asyncio.gather(*map(client, range(4)))

    times_s = asyncio.run(main())
    assert batcher.sizes == [4] * 5
    assert max(max(client[1:]) for client in times_s) < TIMEOUT_S / 2, "a batch that is complete does not wait"


def test_a_batch_waits_no_longer_than_the_timeout_for_those_who_left(batcher):
    async def main() -> float:
        await asyncio.gather(*(ask(batcher, value) for value in range(4)))
        left_s = await ask(batcher, 7)
        assert await ask(batcher, 8) < TIMEOUT_S / 2, "now it knows"
        return left_s

    assert TIMEOUT_S * 0.9 <= asyncio.run(main()) < TIMEOUT_S * 3
    assert batcher.sizes == [4, 1, 1]


def test_a_full_batch_does_not_wait(batcher):
    assert asyncio.run(ask(batcher, 1.0, rows=8)) < TIMEOUT_S / 2


def test_without_a_timeout_nothing_waits(batching):
    sizes = []
    batcher = batching.Batcher(lambda array: [sizes.append(len(array)) or array * 2], batching.BatchingParameters())

    async def main() -> None:
        await asyncio.gather(*(ask(batcher, value) for value in range(3)))
        await ask(batcher, 5)

    asyncio.run(main())
    assert sizes == [3, 1]


def test_batches_of_a_slow_graph_run_on_so_many_threads_and_what_comes_meanwhile_shares_the_next(batching):
    sizes, under_way, most = [], set(), 0

    def run(array: np.ndarray) -> list[np.ndarray]:
        nonlocal most
        sizes.append(len(array))
        under_way.add(id(array))
        most = max(most, len(under_way))
        time.sleep(TIMEOUT_S)
        under_way.remove(id(array))
        return [array * 2]

    batcher = batching.Batcher(run, batching.BatchingParameters(max_batch_size=4, num_batch_threads=2), lambda: True)

    async def main() -> None:
        asked = []
        for value in range(12):
            asked.append(asyncio.create_task(ask(batcher, value)))
            await asyncio.sleep(TIMEOUT_S / 50)
        asked[5].cancel()
        await asyncio.gather(*asked[:5], *asked[6:])

    asyncio.run(main())
    assert most == 2
    assert sizes == [1, 1, 4, 4, 1], "two alone, then what had collected: nine of ten, for one was cancelled"


def test_a_signature_that_turns_out_to_be_quick_or_slow_loses_no_request(batching):
    slow = False
    batcher = batching.Batcher(lambda array: [array * 2], batching.BatchingParameters(max_batch_size=4), lambda: slow)

    async def main() -> None:
        nonlocal slow
        asked = []
        for value in range(40):
            asked.append(asyncio.create_task(ask(batcher, value)))
            slow = value % 5 < 2
            await asyncio.sleep(0)
        await asyncio.gather(*asked)

    asyncio.run(main())


def test_what_fails_for_want_of_memory_is_told_to_all_of_the_batch(batching):
    def run(array: np.ndarray) -> list[np.ndarray]:
        raise MemoryError

    batcher = batching.Batcher(run, batching.BatchingParameters())

    async def main() -> list:
        return await asyncio.gather(*(ask(batcher, value) for value in range(3)), return_exceptions=True)

    assert [type(error) for error in asyncio.run(main())] == [MemoryError] * 3
