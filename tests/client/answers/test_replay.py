"""Replay: saved answers are recomputed, from files and arrays, and every difference is reported."""

import contextlib
import copy
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from click.testing import Result
from PIL import Image
from sidelight._cli.app import app
from sidelight.results.comparison import TOLERANCE
from torch import nn
from typer.testing import CliRunner

from support.models import LABELS, small_cnn

METHODS: dict[str, sidelight.methods.Method] = {
    "gradient": sidelight.Gradient(signed=True),
    "smoothgrad": sidelight.SmoothGrad(samples=5, seed=11, base=sidelight.IntegratedGradients(steps=3)),
    "integrated-gradients": sidelight.IntegratedGradients(tolerance=0.1, baseline="blurred"),
    "expected-gradients": sidelight.ExpectedGradients(samples=4, seed=-5),
    "grad-cam": sidelight.GradCAM(),
    "layer-gradient-times-activation": sidelight.LayerGradientXActivation("4"),
    "occlusion": sidelight.Occlusion(window=(8, 16), baseline="black"),
    "rise": sidelight.RISE(masks=9, seed=2**40),
    "guided-backpropagation": sidelight.GuidedBackpropagation(),
}
TARGETS = {
    "predicted": None,
    "index": 3,
    "label": "gnu",
    "per-example": ["ant", 4],
    "top-k": sidelight.TopK(2),
    "contrast": sidelight.Contrast("ant", "bee"),
}


@pytest.fixture(scope="module")
def exact(module: nn.Module, device: str) -> Iterator[sidelight.Client]:
    """A client of a reproducible server."""
    spec = sidelight_server.ModelSpec(
        module, input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), class_names=LABELS, name="small"
    )
    with (
        sidelight_server.serve(spec, device=device, reproducible=True) as address,
        sidelight.connect(address, connect_timeout=10) as client,
    ):
        yield client


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two pictures of different sizes."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, path in enumerate(paths):
        pixels = np.random.default_rng(seed).integers(0, 256, (40 + seed, 50, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture
def saved(exact: sidelight.Client, pictures: list[Path], tmp_path: Path) -> Path:
    """The folder of an answer that explains the pictures."""
    exact.attribute(pictures).save(tmp_path / "saved")
    return tmp_path / "saved"


def run(client: sidelight.Client, *arguments: object, columns: int = 200) -> Result:
    variables = {"SIDELIGHT_ADDRESS": client.address, "COLUMNS": str(columns), "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["replay", *map(str, arguments)], env=variables, prog_name="sidelight")


def options(pictures: list[Path]) -> list[object]:
    return [each for path in pictures for each in ("--image", path)]


def _forget_digests(folder: Path) -> None:
    record = json.loads((folder / "answer.json").read_text())
    del record["provenance_message"]["example_digests"]
    (folder / "answer.json").write_text(json.dumps(record))


def test_another_picture_is_reported_by_the_name_on_record_before_anything_is_computed(
    exact: sidelight.Client, pictures: list[Path], saved: Path
) -> None:
    first, second = pictures
    with pytest.raises(sidelight.InvalidArgument) as caught:
        sidelight.replay(exact, saved, [first, first])
    was, is_ = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (second, first))
    assert caught.value.message == (
        f'images: example 1 is not the picture "{second}" that the answer explains: its SHA-256 is {is_}, '
        f"the record has {was}"
    )
    ended = run(exact, saved, *options([second, second]))
    assert ended.exit_code == 1
    assert "example 0 is not the picture" in ended.output
    assert str(first) in ended.output
    with (
        sidelight.connect("unix:/nowhere/absent", connect_timeout=0) as absent,
        pytest.raises(sidelight.InvalidArgument, match="is not the picture"),
    ):
        sidelight.replay(absent, saved, [first, first])


def test_the_record_has_each_example_s_name_and_digest(
    exact: sidelight.Client, pictures: list[Path], saved: Path
) -> None:
    record = json.loads((saved / "answer.json").read_text())
    assert [each["name"] for each in record["examples"]] == list(map(str, pictures))
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures]
    assert record["provenance"]["example_digests"] == expected
    assert record["provenance_message"]["example_digests"] == expected


def digest(map_: np.ndarray) -> str:
    return hashlib.sha256(map_.tobytes()).hexdigest()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_method_comes_out_equal_to_the_last_bit(
    exact: sidelight.Client, pictures: list[Path], tmp_path: Path, method: sidelight.methods.Method
) -> None:
    exact.attribute(pictures, method=method, score="logit", channels="sum").save(tmp_path / "saved")
    replayed = sidelight.replay(exact, tmp_path / "saved", pictures)
    assert replayed.equal
    assert replayed.kept
    assert replayed.reproducible
    assert replayed.differences == ()
    assert [each.difference for each in replayed.examples] == [0.0, 0.0]


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("map_dtype", ["float32", "float16", "uint8"])
def test_every_target_and_map_type_is_replayed(
    exact: sidelight.Client, pictures: list[Path], tmp_path: Path, target: object, map_dtype: str
) -> None:
    answer = exact.attribute(pictures, target=target, score="logit", map_dtype=map_dtype)
    answer.save(tmp_path / "saved")
    replayed = sidelight.replay(exact, tmp_path / "saved" / "answer.json", pictures)
    assert replayed.equal
    assert replayed.answer.targets == answer.targets
    assert replayed.answer.map_dtype == map_dtype


def test_an_answer_about_arrays_is_replayed_from_arrays(
    exact: sidelight.Client, floats: torch.Tensor, tmp_path: Path
) -> None:
    exact.attribute(floats, channels="none").save(tmp_path)
    assert sidelight.replay(exact, str(tmp_path), floats).equal
    assert sidelight.replay(exact, tmp_path, floats.numpy()).equal
    changed = floats.clone()
    changed[3, 0, 0, 0] += 1
    with pytest.raises(sidelight.InvalidArgument, match="images: example 3 is not the picture that"):
        sidelight.replay(exact, tmp_path, changed)
    with pytest.raises(sidelight.InvalidArgument, match="images: example 0 is not the picture"):
        sidelight.replay(exact, tmp_path, floats.double())
    _forget_digests(tmp_path)  # as an older server had it: the maps alone tell
    replayed = sidelight.replay(exact, tmp_path, changed)
    assert [each.equal for each in replayed.examples] == [True, True, True, False, True]
    assert not replayed.kept
    difference = np.abs(replayed.answer.maps[3] - np.load(tmp_path / "maps.npy")[3]).max()
    share = difference / np.abs(np.load(tmp_path / "maps.npy")[3]).max()
    assert replayed.examples[3].difference == pytest.approx(float(share), rel=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        lambda array: sidelight.IntegratedGradients(steps=4, baseline=array),
        lambda array: sidelight.SmoothGrad(samples=2, base=sidelight.IntegratedGradients(steps=2, baseline=array)),
        lambda array: sidelight.Occlusion(window=16, baseline=array),
        lambda array: sidelight.ExpectedGradients(samples=3, baselines=np.stack([array, -array])),
    ],
    ids=["integrated-gradients", "smoothgrad", "occlusion", "expected-gradients"],
)
def test_an_array_that_was_given_is_saved_and_given_again(
    exact: sidelight.Client, floats: torch.Tensor, tmp_path: Path, method: object
) -> None:
    array = np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)
    (answer,) = exact.stream([floats], method=method(array))
    array += 1  # a caller's buffer, used again
    answer.save(tmp_path)
    text = (tmp_path / "answer.json").read_text()
    assert len(answer.provenance.baseline_digest) == 64
    assert answer.provenance.baseline_digest in text
    assert len(text) < 20_000
    assert sidelight.replay(exact, tmp_path, floats).equal
    shutil.move(tmp_path / "baseline.npy", tmp_path / "elsewhere.npy")
    with pytest.raises(FileNotFoundError, match=r"baseline\.npy"):
        sidelight.replay(exact, tmp_path, floats)
    assert sidelight.replay(exact, tmp_path, floats, baseline=tmp_path / "elsewhere.npy").equal
    other = sidelight.replay(exact, tmp_path, floats, baseline=np.load(tmp_path / "elsewhere.npy") + 1)
    assert not other.equal
    assert [each.name for each in other.differences] == ["baseline_digest"]
    done = run(exact, tmp_path, "--image", "a.png", "--baseline", tmp_path / "answer.json")
    assert done.exit_code == 1


def test_an_answer_with_failures_fails_again_and_is_equal(
    exact: sidelight.Client, floats: torch.Tensor, tmp_path: Path
) -> None:
    broken = floats.clone()
    broken[1] = torch.nan
    exact.attribute(broken, on_error="return").save(tmp_path)
    assert sidelight.replay(exact, tmp_path, broken).equal
    _forget_digests(tmp_path)
    replayed = sidelight.replay(exact, tmp_path, floats)
    assert [(each.equal, each.difference) for each in replayed.examples][:2] == [(True, 0.0), (False, None)]


def test_without_its_maps_an_answer_is_compared_by_their_digests(
    exact: sidelight.Client, pictures: list[Path], saved: Path
) -> None:
    (saved / "maps.npy").unlink()
    assert sidelight.replay(exact, saved, pictures).equal
    _forget_digests(saved)
    replayed = sidelight.replay(exact, saved, pictures[::-1])
    assert [(each.equal, each.difference) for each in replayed.examples] == [(False, None)] * 2
    assert not replayed.within_tolerance
    assert not replayed.kept


@pytest.mark.parametrize(("share", "within"), [(TOLERANCE / 4, True), (TOLERANCE * 4, False)], ids=["within", "beyond"])
@pytest.mark.parametrize("promised", [True, False], ids=["reproducible", "not-reproducible"])
def test_a_difference_is_compared_with_the_promised_tolerance(
    exact: sidelight.Client,
    client: sidelight.Client,
    pictures: list[Path],
    tmp_path: Path,
    share: float,
    within: bool,
    promised: bool,
) -> None:
    asked = exact if promised else client
    asked.attribute(pictures).save(tmp_path / "saved")
    maps = np.load(tmp_path / "saved" / "maps.npy")
    rewrite(tmp_path / "saved", maps + np.float32(share) * maps.max(axis=(1, 2), keepdims=True))
    replayed = sidelight.replay(asked, tmp_path / "saved", pictures)
    assert not replayed.equal
    assert replayed.within_tolerance is within
    assert replayed.kept is (within and not promised)
    done = run(asked, tmp_path / "saved", *options(pictures))
    assert done.exit_code == (0 if replayed.kept else 1)
    assert len(re.findall(r"\.png: differs: at most [\d.]+e-0\d of the map's maximum", done.stdout)) == 2
    verdict = {
        (True, True): "not equal, although the saved answer is reproducible",
        (True, False): "not equal, although the saved answer is reproducible",
        (False, True): "equal within 1e-05 of each map's maximum: the answer is not reproducible",
        (False, False): "not equal within 1e-05 of each map's maximum: the answer is not reproducible",
    }[promised, within]
    assert done.stdout.splitlines()[-1] == verdict


def rewrite(folder: Path, maps: np.ndarray) -> None:
    """Put other maps in place of the saved ones, and their digests into the answer."""
    maps = maps.astype(np.float32)
    np.save(folder / "maps.npy", maps)
    facts = json.loads((folder / "answer.json").read_text())
    for each, map_ in zip(facts["examples"], maps, strict=True):
        each["map_sha256"] = digest(map_)
    (folder / "answer.json").write_text(json.dumps(facts))


def test_a_map_of_zeros_must_be_equal(exact: sidelight.Client, pictures: list[Path], saved: Path) -> None:
    rewrite(saved, np.zeros((2, 32, 32)))
    replayed = sidelight.replay(exact, saved, pictures)
    assert [each.difference for each in replayed.examples] == [float("inf")] * 2


def test_the_command_reports_equality_and_exits_with_code_0(
    exact: sidelight.Client, pictures: list[Path], saved: Path
) -> None:
    for given in (saved, saved / "answer.json"):
        done = run(exact, given, *options(pictures))
        assert done.exit_code == 0, done.output
        expected = ["a.png: equal bit for bit", "b.png: equal bit for bit", "equal bit for bit"]
        assert done.stdout.splitlines() == expected


def test_another_model_is_reported_fact_by_fact(
    exact: sidelight.Client, module: nn.Module, device: str, pictures: list[Path], saved: Path
) -> None:
    other = copy.deepcopy(module)
    with torch.no_grad():
        other[0].weight.mul_(1.01)
    spec = sidelight_server.ModelSpec(other, input_size=(3, 32, 32), class_names=LABELS, name="small")
    facts = json.loads((saved / "answer.json").read_text())
    facts["provenance_message"]["software"][0]["version"] = "0.0.9"
    (saved / "answer.json").write_text(json.dumps(facts))
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        replayed = sidelight.replay(client, saved, pictures)
        done = run(client, saved, *options(pictures))
        digest_now = client.model().digest
    differences = {each.name: (each.then, each.now) for each in replayed.differences}
    assert {"model_digest", "chunk_rows", "reproducible", facts["provenance_message"]["software"][0]["name"]} <= set(
        differences
    )
    assert differences["model_digest"] == (exact.model().digest, digest_now)
    assert differences["reproducible"] == ("True", "False")
    assert "method" not in differences
    assert done.exit_code == 1
    table = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    assert table["model_digest"] == [exact.model().digest, digest_now]
    assert "0.0.9" in done.stdout


def corrupt(name: str, data: bytes) -> object:
    return lambda folder: (folder / name).write_bytes(data)


def without(key: str) -> object:
    def drop(folder: Path) -> None:
        facts = json.loads((folder / "answer.json").read_text())
        del facts[key]
        (folder / "answer.json").write_text(json.dumps(facts))

    return drop


SPOILT: dict[str, tuple[object, str]] = {
    "no-json": (corrupt("answer.json", b"{"), "answer.json: not a saved answer: JSONDecodeError"),
    "no-text": (corrupt("answer.json", b"\xff\xfe\xff"), "answer.json: not a saved answer: UnicodeDecodeError"),
    "a-list": (corrupt("answer.json", b"[1, 2]"), "answer.json: not a saved answer: TypeError"),
    "another-json": (corrupt("answer.json", b"{}"), "not a saved answer: KeyError: 'provenance_message'"),
    "no-provenance": (without("provenance_message"), "not a saved answer: KeyError: 'provenance_message'"),
    "no-examples": (without("examples"), "not a saved answer: KeyError: 'examples'"),
    "other-fields": (
        corrupt("answer.json", b'{"provenance_message": {"modell": "x"}}'),
        "not a saved answer: ParseError",
    ),
    "deep": (corrupt("answer.json", b"[" * 100_000), "not a saved answer: RecursionError"),
    "no-array": (corrupt("maps.npy", b"no array"), "maps.npy: not a .npy array"),
    "empty-array": (corrupt("maps.npy", b""), "maps.npy: not a .npy array"),
    "one-map": (
        lambda folder: np.save(folder / "maps.npy", np.zeros((1, 32, 32), "f4")),
        "got float32 of [1, 32, 32], expected 2 float32 maps",
    ),
    "no-dimension": (
        lambda folder: np.save(folder / "maps.npy", np.float32(1)),
        "maps.npy: got float32 of [], expected 2 float32 maps",
    ),
    "other-maps": (
        lambda folder: np.save(folder / "maps.npy", np.load(folder / "maps.npy")[::-1]),
        "maps.npy: the map of example 0 does not match its digest in answer.json",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_a_damaged_answer_is_reported_in_one_line(
    exact: sidelight.Client, pictures: list[Path], saved: Path, spoil: object, message: str
) -> None:
    spoil(saved)
    with pytest.raises(sidelight.InvalidArgument) as caught:
        sidelight.replay(exact, saved, pictures)
    assert message in caught.value.message
    done = run(exact, saved / "answer.json", *options(pictures))
    assert (done.exit_code, done.stdout) == (1, "")
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr


def test_an_answer_that_was_not_final_cannot_be_computed_again(
    exact: sidelight.Client, floats: torch.Tensor, tmp_path: Path
) -> None:
    with contextlib.closing(exact.stream([floats], method=sidelight.SmoothGrad(samples=200), partial=True)) as answers:
        next(answers).save(tmp_path)
    with pytest.raises(sidelight.InvalidArgument, match="saved before it was final"):
        sidelight.replay(exact, tmp_path, floats)


def test_every_digit_of_a_digest_is_printed_on_a_narrow_terminal(
    client: sidelight.Client, pictures: list[Path], saved: Path
) -> None:
    facts = json.loads((saved / "answer.json").read_text())
    facts["provenance_message"]["model_digest"] = "0123456789abcdef" * 4
    (saved / "answer.json").write_text(json.dumps(facts))
    done = run(client, saved, *options(pictures), columns=60)
    assert "…" not in done.stdout
    table = [line for line in done.stdout.splitlines() if re.match(r" (model_digest| {12}) ", line)]
    assert "".join(line[15:].split()[0] for line in table) == "0123456789abcdef" * 4


def test_missing_images_are_reported_in_one_line(
    exact: sidelight.Client, pictures: list[Path], saved: Path, tmp_path: Path
) -> None:
    for arguments, message in {
        (tmp_path / "none.json", *options(pictures)): "No such file or directory",
        (tmp_path, *options(pictures)): "answer.json",
        (saved, *options(pictures[:1])): "images: got 1, expected 2, one for each saved example",
        (saved, *options([*pictures, *pictures])): "images: got 4, expected 2",
        (saved, "--image", pictures[0], "--image", tmp_path / "none.png"): "none.png",
        (saved, *options(pictures), "--baseline", saved / "maps.npy"): "baseline: got an array, but the saved method",
        (saved, *options(pictures), "--timeout", 0): "timeout: got 0.0 s",
    }.items():
        done = run(exact, *arguments)
        assert (done.exit_code, done.stdout) == (1, ""), done.output
        assert len(done.stderr.strip().splitlines()) == 1
        assert message in done.stderr


def test_without_a_picture_the_command_says_what_is_missing(exact: sidelight.Client, saved: Path) -> None:
    done = run(exact, saved)
    assert done.exit_code == 2
    assert "--image" in done.stderr


def test_a_model_that_is_no_longer_served_is_not_found(device: str, pictures: list[Path], saved: Path) -> None:
    spec = sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32), name="smaller")
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        with pytest.raises(sidelight.NotFound, match="smaller"):
            sidelight.replay(client, saved, pictures)
        assert run(client, saved, *options(pictures)).exit_code == 1


def test_the_record_holds_the_request_the_digests_and_readable_text(
    exact: sidelight.Client, pictures: list[Path], tmp_path: Path
) -> None:
    method = sidelight.SmoothGrad(samples=1)  # of one sample the standard error is infinite: no number of JSON's
    answer = exact.attribute(pictures, method=method, target="gnu")
    answer.save(tmp_path)
    facts = json.loads((tmp_path / "answer.json").read_text(), parse_constant=pytest.fail)
    assert facts["example_count"] == len(facts["examples"]) == 2
    assert facts["provenance"]["method"] == answer.provenance.method
    assert facts["provenance_message"]["method"]["smoothgrad"]["samples"] == 1
    assert facts["provenance_message"]["target"] == {"label": "gnu"}
    assert facts["map_dtype"] == "float32"
    for each, map_, convergence in zip(facts["examples"], answer.maps, answer.convergence, strict=True):
        assert each["map_sha256"] == digest(map_)
        assert each["target"]["label"] == "gnu"
        assert each["convergence"]["rows"] == convergence.rows


def test_the_overlays_of_a_top_k_answer_are_numbered(
    exact: sidelight.Client, pictures: list[Path], tmp_path: Path
) -> None:
    exact.attribute(pictures, target=sidelight.TopK(2)).save(tmp_path / "saved")
    names = sorted(each.name for each in (tmp_path / "saved").glob("*.png"))
    assert names == ["000-0.png", "000-1.png", "001-0.png", "001-1.png"]
    facts = json.loads((tmp_path / "saved" / "answer.json").read_text())
    assert [len(each["target"]) for each in facts["examples"]] == [2, 2]
