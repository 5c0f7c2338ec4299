"""When a batch of the local server's is run: the Batcher alone, on an event loop whose clock is the test's own."""

import asyncio
import selectors
import threading
from collections.abc import Coroutine

import numpy as np
import pytest

from endpoints.base import REPOSITORY_DIR
from helpers import DEADLINE_S, load_script

TIMEOUT_S = 0.25  # of a batch; a power of two, so that sums of it are exact


class JumpingSelector(selectors.DefaultSelector):
    """Does not sleep until the next timer is due, but moves the clock there."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list:
        ready = super().select(0 if timeout is not None else None)
        if not ready and timeout:
            self.now_s += timeout
        return ready


class OwnClockLoop(asyncio.SelectorEventLoop):
    """An event loop on which only waiting takes time, and computing none: times are exact, however busy the machine."""

    def __init__(self):
        self.clock = JumpingSelector()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now_s


def run_on_own_clock(coroutine: Coroutine):
    with asyncio.Runner(loop_factory=OwnClockLoop) as runner:
        return runner.run(coroutine)


@pytest.fixture(scope="module")
def batching():
    return load_script(REPOSITORY_DIR / "tfserving" / "local" / "batching.py")


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


def test_a_client_that_is_alone_waits_once_and_not_again(batcher):
    # The first batch waits the whole time, because it is not known yet who else is there.
    assert run_on_own_clock(one_after_another(batcher, 20)) == [TIMEOUT_S] + [0] * 19
    assert batcher.sizes == [1] * 20


def test_every_so_many_batches_one_waits_the_whole_time(batcher, batching):
    times_s = run_on_own_clock(one_after_another(batcher, batching.WHOLE_WAIT_EVERY + 2))
    assert {i: time_s for i, time_s in enumerate(times_s) if time_s} == {
        0: TIMEOUT_S,
        batching.WHOLE_WAIT_EVERY: TIMEOUT_S,
    }


def test_clients_that_come_one_by_one_share_runs_and_a_batch_waits_for_as_many_as_before(batcher):
    step_s = TIMEOUT_S / 64

    async def client(number: int) -> list[float]:
        times_s = []
        for _ in range(5):
            await asyncio.sleep(number * step_s)
            times_s.append(await ask(batcher, number))
        return times_s

    async def main() -> list[list[float]]:
        return await asyncio.gather(*map(client, range(4)))

    times_s = run_on_own_clock(main())
    assert batcher.sizes == [4] * 5
    for number, [_, *later_s] in enumerate(times_s):
        assert later_s == [(3 - number) * step_s] * 4, "a batch that is complete does not wait"


def test_a_batch_waits_no_longer_than_the_timeout_for_those_who_left(batcher):
    async def main() -> list[float]:
        await asyncio.gather(*(ask(batcher, value) for value in range(4)))
        return await one_after_another(batcher, 2)

    assert run_on_own_clock(main()) == [TIMEOUT_S, 0], "the second time it knows"
    assert batcher.sizes == [4, 1, 1]


def test_a_full_batch_does_not_wait(batcher):
    assert run_on_own_clock(ask(batcher, 1.0, rows=8)) == 0


def test_without_a_timeout_nothing_waits(batching):
    sizes = []
    batcher = batching.Batcher(lambda array: [sizes.append(len(array)) or array * 2], batching.BatchingParameters())

    async def main() -> None:
        await asyncio.gather(*(ask(batcher, value) for value in range(3)))
        await ask(batcher, 5)

    run_on_own_clock(main())
    assert sizes == [3, 1]


def test_batches_of_a_slow_graph_run_on_so_many_threads_and_what_comes_meanwhile_shares_the_next(batching):
    sizes, running, most = [], set(), 0
    begun, may_end = threading.Semaphore(0), threading.Event()

    def run(array: np.ndarray) -> list[np.ndarray]:
        nonlocal most
        sizes.append(len(array))
        running.add(id(array))
        most = max(most, len(running))
        begun.release()
        assert may_end.wait(DEADLINE_S)
        running.remove(id(array))
        return [array * 2]

    batcher = batching.Batcher(run, batching.BatchingParameters(max_batch_size=4, num_batch_threads=2), lambda: True)

    async def main() -> None:
        asked = []
        for value in range(12):
            asked.append(asyncio.create_task(ask(batcher, value)))
            for _ in range(5):  # turns of the loop: a batch of one is on its thread by then
                await asyncio.sleep(0)
        asked[5].cancel()
        for _ in range(2):
            assert await asyncio.to_thread(begun.acquire, timeout=DEADLINE_S)
        may_end.set()
        await asyncio.gather(*asked[:5], *asked[6:])

    asyncio.run(main())
    assert most == 2
    # Two alone, then what had collected: nine of ten, for one was cancelled. Threads begin in any order.
    assert (sizes[:2], sorted(sizes[2:])) == ([1, 1], [1, 4, 4])


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

    run_on_own_clock(main())


def test_what_fails_for_want_of_memory_is_told_to_all_of_the_batch(batching):
    def run(array: np.ndarray) -> list[np.ndarray]:
        raise MemoryError

    batcher = batching.Batcher(run, batching.BatchingParameters())

    async def main() -> list:
        return await asyncio.gather(*(ask(batcher, value) for value in range(3)), return_exceptions=True)

    assert [type(error) for error in run_on_own_clock(main())] == [MemoryError] * 3
