"""Progress of streams: the counts equal the answers, on a terminal, in a notebook, and without a display."""

import asyncio
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
import sidelight
import sidelight.testing
from nbclient import NotebookClient
from PIL import Image

BATCHES = [np.zeros((3, 8, 8, 3), np.uint8)] * 4
SHOWN = re.compile(r"4/4 batches, [\d.e+]+ examples/s, 12 rows, 2 retries")


@pytest.fixture
def client() -> Iterator[sidelight.Client]:
    """Return a client of a server that is full twice."""
    with sidelight.testing.serve(labels=["cat", "dog"]) as server, sidelight.connect(server.address) as client:
        client.info()
        server.fail_next(sidelight.ResourceExhausted("full", retry_delay_s=0.01), times=2)
        yield client


def shown(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text).split())


def test_a_bar_counts_examples_rows_and_retries(client: sidelight.Client, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(list(client.stream(BATCHES, progress=True))) == 4
    out, err = capfd.readouterr()
    assert not out
    assert SHOWN.search(shown(err)), err


def test_without_rich_the_bar_is_tqdms(
    client: sidelight.Client, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    list(client.stream(BATCHES, progress=True))
    err = shown(capfd.readouterr().err)
    assert "4/4" in err
    assert re.search(r"examples/s, 12 rows, 2 retries", err), err


def test_without_both_it_says_what_to_install(client: sidelight.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(sidelight.InvalidArgument, match=r"pip install 'sidelight\[cli\]'"):
        client.stream(BATCHES, progress=True)


def test_progress_is_shown_only_on_request(client: sidelight.Client, capfd: pytest.CaptureFixture[str]) -> None:
    list(client.stream(BATCHES))
    assert capfd.readouterr() == ("", "")


def test_the_asynchronous_client_shows_the_same(client: sidelight.Client, capfd: pytest.CaptureFixture[str]) -> None:
    async def answers() -> list[sidelight.Attribution]:
        async with sidelight.aio.connect(client.address) as other:
            return [answer async for answer in other.stream(BATCHES, progress=True)]

    assert len(asyncio.run(answers())) == 4
    assert SHOWN.search(shown(capfd.readouterr().err))


def test_rows_and_failures_are_those_of_the_answers(
    client: sidelight.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    def batches() -> Iterator[object]:
        yield [b"no picture", BATCHES[0][0]]
        yield BATCHES[0]

    answers = list(client.stream(batches(), target=sidelight.TopK(2), on_error="return", progress=True))
    assert sum(len(answer.failures) for answer in answers) == 1
    assert "8 rows, 2 retries, 1 failed" in shown(capfd.readouterr().err)  # four examples, two classes each


def test_a_notebook_shows_a_bar_and_the_newest_maps() -> None:
    code = """
import numpy, sidelight, sidelight.testing
with sidelight.testing.serve(labels=["cat", "dog"]) as server, sidelight.connect(server.address) as client:
    for _ in client.stream([numpy.zeros((3, 8, 8, 3), numpy.uint8)] * 4, progress=True):
        pass
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    html = output["data"]["text/html"]
    assert re.search(r"4/4 batches, [\d.e+]+ examples/s, 12 rows, 0 retries", html)
    assert '<progress max="4" value="4"' in html
    assert html.count("<figure") == 6  # the newest
    assert html.count('alt="overlay"') == 6


COMMAND = [sys.executable, "-m", "sidelight", "attribute", "one.png", "two.png"]


@pytest.fixture
def folder(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("one", "two"):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
    monkeypatch.setenv("SIDELIGHT_ADDRESS", address)
    monkeypatch.setenv("TERM", "xterm")
    return tmp_path


def test_the_command_is_quiet_in_a_pipe(folder: Path) -> None:
    done = subprocess.run(COMMAND, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    assert not done.stderr
    assert "explaining" not in done.stdout


def test_the_command_shows_its_progress_on_a_terminal(folder: Path) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(COMMAND, cwd=folder, stdout=subprocess.PIPE, stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    text = shown(os.read(ours, 100_000).decode())
    os.close(ours)
    assert "2/2 batches" in text
    assert b"one.png" in done.stdout
