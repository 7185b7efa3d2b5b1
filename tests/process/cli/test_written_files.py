"""What the commands write: overlays, saved answers and JSON."""

from pathlib import Path

import numpy as np
import pytest
import sidelight
from PIL import Image
from sidelight._cli.tables import overlay_names

from support.commands import Run, objects, picture


def test_overlays_are_written_into_a_folder_that_is_made(run: Run, client: sidelight.Client) -> None:
    paths = [picture("a.png"), picture("b.jpg", seed=1), picture("deep/down/c.tif", seed=2)]
    done = run("attribute", *paths, "--out", "made/for it")
    assert done.exit_code == 0, done.output
    assert "3 overlays in made/for it" in done.stdout
    out = Path("made/for it")
    assert sorted(each.name for each in out.iterdir()) == ["a.png", "b.png", "c.png"]
    with Image.open(out / "a.png") as overlay:
        assert overlay.size == (32, 32)
        expected = np.asarray(client.attribute(paths[0]).overlay(0)).astype(int)
        # A map differs in its last bits with neighbors in the chunk: a color may round the other way.
        np.testing.assert_allclose(np.asarray(overlay), expected, atol=1)


def test_overlays_are_on_the_whole_pictures_if_so_asked(run: Run, client: sidelight.Client) -> None:
    paths = [picture("a.png"), picture("b.png", seed=1)]
    done = run("attribute", *paths, "--out", "out", "--save", "saved", "--original")
    assert done.exit_code == 0, done.output
    expected = np.asarray(client.attribute(paths[1]).overlay(0, original=True)).astype(int)
    for written in ("out/b.png", "saved/b/000.png"):
        with Image.open(written) as overlay:
            assert overlay.size == (50, 40)
            np.testing.assert_allclose(np.asarray(overlay), expected, atol=1)


def test_saved_answers_are_replayed(run: Run) -> None:
    paths = [picture("x/a.png"), picture("y/a.jpg", seed=1), picture("b.tif", seed=2)]
    done = run("attribute", *paths, "--save", "runs", "--method", "rise(masks=9)", "--map-dtype", "float16")
    assert done.exit_code == 0, done.output
    assert "3 answers in runs" in done.stdout
    assert sorted(each.name for each in Path("runs").iterdir()) == ["a", "a-2", "b"]
    for folder, path in zip(("a", "a-2", "b"), paths, strict=True):
        again = run("replay", f"runs/{folder}/answer.json", "--image", path)
        assert again.exit_code == 0, again.output
        assert f"{path.name}: " in again.stdout
    other = run("replay", "runs/a/answer.json", "--image", paths[1])
    assert other.exit_code == 1
    assert 'example 0 is not the picture "x/a.png"' in other.stderr


def test_saved_answers_are_overwritten_only_where_that_is_said(run: Run) -> None:
    path = picture("a.png")
    assert run("attribute", path, "--save", "runs").exit_code == 0
    before = Path("runs/a/answer.json").read_bytes()
    again = run("attribute", path, "--save", "runs", "--target", "3")
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr.startswith("sidelight: runs/a: this folder already has an answer")
    assert Path("runs/a/answer.json").read_bytes() == before
    assert run("attribute", path, "--save", "runs", "--target", "3", "--overwrite").exit_code == 0
    assert Path("runs/a/answer.json").read_bytes() != before


def test_answers_are_printed_as_lines_of_json(run: Run, client: sidelight.Client) -> None:
    good, more = picture("good.png"), picture("more.png", seed=1)
    Path("bad.png").write_bytes(b"no picture")
    done = run("attribute", good, "bad.png", "missing.png", more, "--json", "--out", "out", "--score", "logit")
    assert done.exit_code == 1
    records = objects(done)
    assert [each["picture"] for each in records] == ["good.png", "bad.png", "missing.png", "more.png"]
    assert [each["error"] and each["error"]["type"] for each in records] == [None, None, "UnreadableFile", None]
    assert "not a PNG" in records[1]["failures"][0]["message"]
    for each, path in ((records[0], good), (records[3], more)):
        expected = client.attribute(path, score="logit").provenance
        assert each["provenance"]["score"] == "logit"
        assert each["provenance"]["example_digests"] == list(expected.example_digests)
    assert sorted(each.name for each in Path("out").iterdir()) == ["good.png", "more.png"]


def test_pictures_of_one_name_get_overlays_of_different_names(run: Run) -> None:
    paths = [picture(name, seed=i) for i, name in enumerate(("x/a.png", "y/a.jpg", "z/a-2.png", "a.png"))]
    done = run("attribute", *paths, "--out", "out")
    assert done.exit_code == 0, done.output
    assert len(list(Path("out").iterdir())) == 4
    contents = {each.read_bytes() for each in Path("out").iterdir()}
    assert len(contents) == 4


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.png"],
        ["x/a.png", "y/a.png"],
        ["x/a.png", "y/a.png", "z/a-2.png"],
        ["z/a-2.png", "x/a.png", "y/a.png"],
        ["a.png", "a.png", "a.png"],
        ["x/a-2.png", "a-2-2.png", "a-2.jpg", "a.png", "y/a.png"],
        ["a.tar.gz", "a.tar.xz"],
        [".png", "out/a.png", "a.png"],
    ],
    ids=" ".join,
)
def test_names_of_overlays_differ_from_each_other_and_from_every_picture(names: list[str]) -> None:
    paths = [Path(name) for name in names]
    overlays = overlay_names(paths, Path("out"))
    assert len(set(overlays)) == len(names)
    assert not {Path("out", each).resolve() for each in overlays} & {path.resolve() for path in paths}


def test_no_picture_is_overwritten_by_its_overlay(run: Run) -> None:
    paths = [picture("a.png"), picture("a-2.png", seed=1), picture("sub/b.png", seed=2)]
    before = [path.read_bytes() for path in paths]
    for out in (".", "sub", Path().absolute(), "sub/.."):
        done = run("attribute", *paths, "--out", out)
        assert done.exit_code == 0, done.output
    assert [path.read_bytes() for path in paths] == before


def test_an_overlay_folder_that_is_a_file_is_named(run: Run) -> None:
    path = picture("a.png")
    done = run("attribute", path, "--out", path)
    assert done.exit_code == 1
    assert done.stderr.startswith("sidelight: --out: a.png cannot be a folder for overlays: File exists")
    done = run("attribute", path, "--save", path)
    assert done.exit_code == 1
    assert done.stderr.startswith("sidelight: --save: a.png cannot be a folder for answers: File exists")
