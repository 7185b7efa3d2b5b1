"""The page's HTTP server: its responses, and which requests it rejects."""

import base64
import dataclasses
import io
import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sidelight
import sidelight.aio
from PIL import Image
from sidelight._cli.app import app as command
from sidelight.methods.parsing import METHODS, parse_method
from sidelight.page import controls, pictures
from sidelight.page.app import make_app
from sidelight.visualization.colormaps import color_scale
from starlette.testclient import TestClient
from typer.testing import CliRunner

from support.models import LABELS

OWN = {"x-sidelight-page": "1"}
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


def png(pixels: np.ndarray = PIXELS) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def page_of(address: str, paths: list[Path], **options: Any) -> TestClient:
    client, probe = (sidelight.aio.connect(address, **options) for _ in range(2))
    return TestClient(make_app(client, probe, paths, hosts=["127.0.0.1"]), base_url="http://127.0.0.1", headers=OWN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "one.png").write_bytes(png())
    return tmp_path


@pytest.fixture
def page(address: str, folder: Path) -> Iterator[TestClient]:
    with page_of(address, [folder / "one.png"]) as page:
        yield page


def upload(page: TestClient, content: bytes, name: str = "new.png") -> str:
    answer = page.post("/pictures", params={"name": name}, content=content)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def events(page: TestClient, path: str, **options: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in page.post(path, json=options).text.splitlines()]


def values(event: dict[str, Any], layer: str = "raw") -> np.ndarray:
    return np.frombuffer(base64.b64decode(event[layer]["data"]), "<f4").reshape(event["shape"])


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, {}),
        ({"target": 3, "score": "logit"}, {"target": 3, "score": "logit"}),
        ({"target": "dog", "against": 1}, {"target": sidelight.Contrast("dog", 1)}),
        (
            {"method": "integrated_gradients(steps=4)", "channels": "sum"},
            {"method": sidelight.IntegratedGradients(4), "channels": "sum"},
        ),
    ],
)
def test_a_map_is_the_one_that_the_client_gets(
    page: TestClient, client: sidelight.Client, asked: dict[str, object], options: dict[str, Any]
) -> None:
    (event,) = events(page, "/explain", picture=upload(page, png()), **asked)
    answer = client.attribute(png(), probabilities=True, **options)
    assert event["final"]
    np.testing.assert_array_equal(values(event), answer.heatmap(0))
    assert (event["raw"]["low"], event["raw"]["high"]) == color_scale(answer.heatmap(0))
    assert event["signed"] == bool((answer.heatmap(0) < 0).any())
    assert event["target"]["index"] == answer.targets[0].index
    assert event["geometry"]["original_width"] == 50
    order = np.argsort(-answer.probabilities[0])
    assert [each["index"] for each in event["classes"]] == order.tolist()
    assert [each["label"] for each in event["classes"]] == [LABELS[i] for i in order]


def test_partial_maps_come_before_the_final_one(page: TestClient) -> None:
    got = events(page, "/explain", picture=upload(page, png()), method="smoothgrad(samples=2000)")
    rows = [event["convergence"]["rows"] for event in got]
    assert [event["final"] for event in got] == [False] * (len(got) - 1) + [True]
    assert len(got) > 1
    assert rows == sorted(rows)


def test_an_answer_can_be_replayed_from_its_download(
    page: TestClient, client: sidelight.Client, folder: Path, tmp_path: Path
) -> None:
    (picture,) = page.get("/setup").json()["pictures"]
    (event,) = events(page, "/explain", picture=picture["id"], method="grad_cam")
    saved = tmp_path / "saved"
    saved.mkdir()
    for name in ("answer.json", "maps.npy"):
        (saved / name).write_bytes(page.get(f"/answers/{event['id']}/{name}").content)
    np.testing.assert_array_equal(np.load(saved / "maps.npy")[0], values(event))
    assert sidelight.replay(client, saved, [folder / "one.png"]).kept
    assert page.get(f"/answers/{event['id']}/one.png").status_code == 404


def test_pictures_are_classified_and_a_bad_one_fails_alone(page: TestClient, client: sidelight.Client) -> None:
    good, bad = upload(page, png()), upload(page, b"no picture", "bad.txt")
    got = {event["picture"]: event for event in events(page, "/classify", pictures=[bad, good])}
    expected = client.attribute(png()).predictions[0]
    assert got[good]["prediction"]["index"] == expected.index
    assert got[bad]["type"] == "InvalidArgument"
    (alone,) = events(page, "/explain", picture=bad)
    assert alone["message"] == got[bad]["message"]


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"method": "gradient(steps=3)"}, "method"),
        ({"method": "integrated_gradients(steps=-1)"}, "method.steps"),
        ({"method": "grad_cam(layer=nowhere)"}, "method.layer"),
        ({"target": 99}, "target"),
        ({"score": "fame"}, "score"),
        ({"channels": "all"}, "channels"),
        ({"against": 2}, "target"),
        ({"model": "nobody"}, "model"),
        ({"target": [1]}, "target"),
    ],
)
def test_an_error_names_the_control_that_it_concerns(page: TestClient, asked: dict[str, object], field: str) -> None:
    (event,) = events(page, "/explain", picture=upload(page, png()), **asked)
    assert event["event"] == "error"
    assert event["field"].startswith(field), event["message"]


def test_a_server_that_is_away_is_reported_and_the_page_goes_on(folder: Path, tmp_path: Path) -> None:
    with page_of(f"unix:{tmp_path}/nobody", [folder / "one.png"], connect_timeout=0.1) as page:
        assert page.get("/").status_code == 200
        assert not page.get("/server").json()["reachable"]
        (event,) = events(page, "/explain", picture=page.get("/setup").json()["pictures"][0]["id"])
        assert event["type"] == "Unavailable"
        assert page.get(f"/pictures/{upload(page, png())}/thumbnail").status_code == 200


def test_the_same_bytes_are_one_picture_and_uploads_end_with_the_page(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with page_of(address, []) as page:
        assert upload(page, png(), "a.png") == upload(page, png(), "b.png")
        assert [path.read_bytes() for path in tmp_path.glob("*/*")] == [png()]
    assert not list(tmp_path.iterdir())


def test_an_upload_has_a_limit(page: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_FILE_BYTES", 1000)
    answer = page.post("/pictures?name=large.png", content=bytes(1001))
    assert answer.status_code == 413
    assert answer.json()["field"] == "picture"
    monkeypatch.setattr(pictures, "MAX_UPLOAD_BYTES", 1500)
    assert page.post("/pictures?name=a", content=bytes(1000)).status_code == 200
    assert page.post("/pictures?name=b", content=bytes(999)).json()["type"] == "ResourceExhausted"


def test_a_picture_is_shown_at_its_own_size_and_a_bomb_is_not(
    page: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    id_ = upload(page, png())
    shown = page.get(f"/pictures/{id_}/picture")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(shown.content))), PIXELS)
    assert Image.open(io.BytesIO(page.get(f"/pictures/{id_}/thumbnail").content)).size == (128, 128)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1999)
    assert "megapixels" in page.get(f"/pictures/{id_}/picture").json()["message"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "one.png"])
def test_no_path_reaches_a_file(page: TestClient, name: str) -> None:
    for path in (f"/pictures/{name}/picture", f"/static/{name}", f"/answers/{name}/answer.json"):
        assert page.get(path).status_code == 404
    assert page.post("/explain", json={"picture": name}).status_code == 404
    picture = page.post("/pictures", params={"name": name}, content=png(PIXELS[::-1])).json()
    assert "/" not in picture["name"]


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_other_sites_are_refused(page: TestClient, headers: dict[str, str]) -> None:
    assert page.get("/setup", headers=headers).status_code == 403
    assert page.post("/pictures?name=a", content=png(), headers=headers).status_code == 403


def test_requests_that_change_something_need_the_pages_header(page: TestClient) -> None:
    del page.headers["x-sidelight-page"]
    assert page.get("/setup").status_code == 200
    assert page.post("/pictures?name=a", content=png()).status_code == 403
    assert page.post("/explain", json={}).status_code == 403


def test_the_policy_allows_nothing_from_elsewhere(page: TestClient) -> None:
    answer = page.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "access-control-allow-origin" not in answer.headers
    static = Path(sidelight.page.__file__).parent / "static"
    for file in static.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert "innerHTML" not in text


def test_the_command_refuses_what_it_cannot_listen_on() -> None:
    everywhere = CliRunner().invoke(command, ["page", "--host", "0.0.0.0"])
    assert everywhere.exit_code == 2
    assert "--host-name" in everywhere.output
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = CliRunner().invoke(command, ["page", "--port", str(taken.getsockname()[1])])
    assert refused.exit_code == 1
    assert "in use" in refused.output


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_control_for_each_option(name: str) -> None:
    described = next(each for each in controls.describe()["methods"] if each["name"] == name)
    options = {each["name"]: each["default"] for each in described["options"]}
    fields = {each.name for each in dataclasses.fields(METHODS[name])} - {"baselines"}  # an array has no control
    assert options.keys() == fields
    assert parse_method(name).message() == METHODS[name]().message()
    given = ", ".join(f"{each}={value}" for each, value in options.items() if value not in (None, ""))
    assert parse_method(f"{name}({given})").message() == METHODS[name]().message()
