"""Files are decoded in processes that end with their call: results, errors, time limits and turns."""

import asyncio
import gc
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from sidelight_server.engine.preparation.decoder_process import Fitted
from sidelight_server.errors import InvalidArgument, ResourceExhausted, SidelightError, Unavailable
from sidelight_server.inputs.decode_worker import Order
from sidelight_server.inputs.decoding import decode
from sidelight_server.inputs.preprocessing import Preprocessing

from support.servers.decoders import (
    FORMATS,
    GOOD,
    ONES,
    ORDER,
    PREPROCESSING,
    SLOW,
    ZEROS,
    assert_fitted,
    children,
    decoders,
    file_of,
    fit,
    noise,
    until,
    until_decoding,
)

SOON = Order(PREPROCESSING, max_pixels=50_000_000, max_s=0.5)


@pytest.mark.parametrize(
    "preprocessing",
    [
        PREPROCESSING,
        Preprocessing(1, 24, 40, (0.0,), (1.0,), "exact", "bicubic", window=(100.0, 3000.0)),
        Preprocessing(4, 48, 64, (*ZEROS, 0.0), (*ONES, 1.0), "none", "nearest"),
    ],
    ids=["color", "gray", "alpha"],
)
def test_a_worker_gives_the_pixels_that_decoding_here_gives(preprocessing: Preprocessing) -> None:
    with decoders(2) as pool:
        fitted = fit(pool, *FORMATS.values(), order=Order(preprocessing, 50_000_000, 60))
        for each, file in zip(fitted, FORMATS.values(), strict=True):
            assert_fitted(each, file, preprocessing)
        assert len(children()) <= 2


def test_a_decoder_process_reports_the_same_errors_as_decoding_in_this_process() -> None:
    files = [b"no picture", GOOD[:90], file_of(noise(300, 200, 3), "PNG")]
    order = Order(PREPROCESSING, max_pixels=50_000, max_s=60)
    with decoders() as pool:
        for failure, file in zip(fit(pool, *files, order=order), files, strict=True):
            with pytest.raises(InvalidArgument) as here:
                decode(file, channels=3, max_pixels=50_000)
            assert type(failure) is InvalidArgument
            assert failure.message == here.value.message


def damaged() -> Iterator[bytes]:
    """Files of every format, truncated and with flipped bits."""
    random = np.random.default_rng(1)
    for file in FORMATS.values():
        for _ in range(12):
            yield file[: random.integers(1, len(file))]
            turned = bytearray(file)
            for place in random.integers(0, min(len(file), 400), random.integers(1, 6)):
                turned[place] ^= 1 << random.integers(8)
            yield bytes(turned)


def test_damaged_files_give_pixels_or_a_documented_error_and_write_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with decoders(2) as pool:
        for fitted in fit(pool, *damaged()):
            assert not isinstance(fitted, SidelightError) or type(fitted) in (InvalidArgument, ResourceExhausted)
        assert_fitted(fit(pool, GOOD)[0], GOOD)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_takes_long_fails_alone() -> None:
    with decoders() as pool:
        first, slow, last = fit(pool, GOOD, SLOW, GOOD, order=SOON)
        assert_fitted(first, GOOD)
        assert_fitted(last, GOOD)
    assert isinstance(slow, InvalidArgument)
    assert slow.message == "image file: decoding took more than 0.5 s of CPU time (max_decode_s)"


def test_requests_of_slow_files_take_turns_with_others() -> None:
    async def ask() -> None:
        hostile = [asyncio.create_task(pool.fit([SLOW] * 50, SOON)) for _ in range(2)]
        await until_decoding()
        for _ in range(2):
            assert_fitted((await pool.fit([GOOD], ORDER))[0], GOOD)
        assert not any(each.done() for each in hostile)
        for each in hostile:
            each.cancel()
        await asyncio.wait(hostile)

    with decoders() as pool:
        asyncio.run(ask())


def test_callers_take_turns_however_many_requests_one_brings() -> None:
    async def ask() -> None:
        hostile = [asyncio.create_task(pool.fit([SLOW], SOON, "hostile")) for _ in range(8)]
        await until_decoding()
        n_before = sum(each.done() for each in hostile)  # on a busy machine, a few
        assert_fitted((await pool.fit([GOOD], ORDER, "good"))[0], GOOD)
        # The running one, and those that were queued before this one.
        assert sum(each.done() for each in hostile) - n_before <= 3
        for each in hostile:
            each.cancel()
        await asyncio.wait(hostile)

    with decoders() as pool:
        asyncio.run(ask())


def test_a_waiting_file_is_released_when_its_call_is_cancelled() -> None:
    async def ask() -> None:
        hostile = asyncio.create_task(pool.fit([SLOW], ORDER))
        await until_decoding()
        file = GOOD + b"of its own"
        before = sys.getrefcount(file)
        waiting = asyncio.create_task(pool.fit([file], ORDER))
        await asyncio.sleep(0.1)  # it is queued
        assert sys.getrefcount(file) > before
        waiting.cancel()
        await asyncio.wait([waiting])
        del waiting
        gc.collect()
        assert sys.getrefcount(file) == before
        hostile.cancel()
        await asyncio.wait([hostile])

    with decoders() as pool:
        asyncio.run(ask())


def test_cancelling_ends_the_decoder() -> None:
    async def ask() -> None:
        asked = asyncio.create_task(pool.fit([SLOW], ORDER))
        decoder = await until_decoding()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await asyncio.to_thread(until, lambda: not decoder.is_running())
        assert_fitted((await pool.fit([GOOD], ORDER))[0], GOOD)

    with decoders() as pool:
        asyncio.run(ask())


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (signal.SIGSEGV, InvalidArgument, "image file: its decoder crashed on it"),
        (
            signal.SIGKILL,
            ResourceExhausted,
            "image file: the system ended its decoder, as it does if memory is short",
        ),
    ],
)
def test_a_decoder_that_dies_fails_its_file_alone(number: int, kind: type[SidelightError], message: str) -> None:
    async def ask() -> tuple[Fitted, ...]:
        asked = asyncio.create_task(pool.fit([GOOD, SLOW, GOOD], ORDER))
        (await until_decoding()).send_signal(number)
        return tuple(await asked)

    with decoders() as pool:
        first, failure, last = asyncio.run(ask())
    assert_fitted(first, GOOD)
    assert_fitted(last, GOOD)
    assert type(failure) is kind
    assert failure.message == message


def test_a_decoder_is_kept_whatever_it_decoded() -> None:
    with decoders() as pool:
        fit(pool, GOOD)
        kept = children()
        for _ in range(2):
            for file in (*FORMATS.values(), b"no picture", GOOD[:90]):
                fit(pool, file)
                assert children() == kept


def test_a_decoder_that_died_between_two_files_is_replaced() -> None:
    with decoders() as pool:
        fit(pool, GOOD)
        for child in children():
            child.kill()
            until(lambda child=child: child.status() == psutil.STATUS_ZOMBIE)
        assert_fitted(fit(pool, GOOD)[0], GOOD)


def test_closing_ends_what_is_being_decoded() -> None:
    async def ask() -> None:
        asked = asyncio.create_task(pool.fit([SLOW] * 3, ORDER))
        await until_decoding()
        await asyncio.to_thread(pool.close)
        with pytest.raises(Unavailable):
            await asked

    with decoders() as pool:
        asyncio.run(ask())
        with pytest.raises(Unavailable):
            fit(pool, GOOD)


def test_a_decoder_imports_neither_torch_nor_the_callers_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import io, sys
        from pathlib import Path
        print("imported")
        import psutil, sidelight, sidelight_server, torch
        from PIL import Image
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG")
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        with sidelight_server.serve(sidelight_server.ModelSpec(module, input_size=(3, 8, 8)), device="cpu") as address:
            with sidelight.connect(address) as client:
                client.attribute([file.getvalue()])
            [child] = psutil.Process().children()
            assert not any("torch" in each.path for each in child.memory_maps())
        assert not psutil.Process().children()
    """)
    )  # without a guard for __main__
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr
