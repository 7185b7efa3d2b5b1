"""Storage of answers in folders, for reading and for replay.

`answer.json` has everything except the maps, a digest of each map, and the provenance also as the wire message.
`maps.npy` has the maps, `baseline.npy` an array that was given as a baseline.
"""

import dataclasses
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray
from PIL import Image

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.tensors import Array
from ..exceptions import AlreadyExists, InvalidArgument, UnreadableFile

if TYPE_CHECKING:
    from .attribution import Attribution

FACTS, MAPS, BASELINE = "answer.json", "maps.npy", "baseline.npy"
OVERLAY = r"\d{3,}(-\d+)?\.png"

Draw = Callable[[int], dict[str, Image.Image]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A saved answer: everything that is needed to recompute it and to compare."""

    folder: Path
    provenance: pb.Provenance
    map_dtype: str
    digests: tuple[str | None, ...]  # of each example's map; None if the example failed
    names: tuple[str | None, ...]  # the path of each example that came from a file
    maps: NDArray[np.float32] | None  # None if the file is missing


def to_dict(answer: "Attribution") -> dict[str, object]:
    """Return everything except the maps as values for JSON."""
    entries = zip(
        answer.names or (None,) * len(answer), answer.predictions, answer.targets, answer.geometry,
        answer.convergence, digests(answer), strict=True,
    )  # fmt: skip
    names = ("name", "prediction", "target", "geometry", "convergence", "map_sha256")
    return {
        "id": answer.id,
        "example_count": len(answer),
        "examples": [dict(zip(names, map(plain, entry), strict=True)) for entry in entries],
        "failures": plain(answer.failures),
        "provenance": plain(answer.provenance),
        "timing": plain(answer.timing),
        "map_dtype": answer.map_dtype,
        "transport": answer.transport,
        "final": answer.final,
    }


def digests(answer: "Attribution") -> tuple[str | None, ...]:
    """Return the digest of each example's map; None for an example without a map."""
    pairs = zip(answer.maps, answer.predictions, strict=True)
    return tuple(None if prediction is None else digest(map_) for map_, prediction in pairs)


def digest(map_: NDArray[np.float32]) -> str:
    """Return the SHA-256 of a map's bytes, as little-endian float32."""
    return hashlib.sha256(map_.astype("<f4").tobytes()).hexdigest()


def write(
    answer: "Attribution",
    folder: Path,
    *,
    provenance: pb.Provenance | None,
    baseline: Array | None,
    draw: Draw,
    overwrite: bool,
) -> None:
    """Write an answer into a folder. `AlreadyExists` if the folder has one and `overwrite` is False.

    `draw` returns an example's overlays by file name. An overlay that cannot be drawn is left out, with the reason in
    `overlay_missing`: a replay does not need it.
    """
    check_free(folder, overwrite=overwrite)
    parent = folder if folder.is_dir() else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".sidelight-") as hidden:
        made = Path(hidden) / "answer"
        made.mkdir()
        np.save(made / MAPS, answer.maps)
        if baseline is not None:
            np.save(made / BASELINE, baseline)
        failed = {failure.example for failure in answer.failures}
        facts: dict[str, Any] = to_dict(answer)
        for i, example in enumerate(facts["examples"]):
            example.update(_write_overlays(made, i, draw=draw, is_failed=i in failed))
        facts["provenance_message"] = json_format.MessageToDict(
            provenance or pb.Provenance(), preserving_proto_field_name=True
        )
        (made / FACTS).write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        _publish(made, folder)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise `AlreadyExists` if the folder has an answer and `overwrite` is False."""
    if not overwrite and (folder / FACTS).exists():
        raise AlreadyExists(f"{folder}: this folder already has an answer; choose another folder, or allow overwriting")


def _write_overlays(folder: Path, i: int, *, draw: Draw, is_failed: bool) -> dict[str, object]:
    """Write an example's overlays, and return their entries for `answer.json`."""
    if is_failed:
        return {"overlays": None, "overlay_missing": None}
    try:
        overlays = draw(i)
    except Exception as error:  # Pillow and pydicom document no set of exceptions
        return {"overlays": None, "overlay_missing": str(error) or type(error).__name__}
    for name, overlay in overlays.items():
        overlay.save(folder / name)
    return {"overlays": list(overlays), "overlay_missing": None}


def _publish(made: Path, folder: Path) -> None:
    """Move a finished answer into its folder: `answer.json` last, so that a folder with one is complete."""
    if not folder.exists():
        made.rename(folder)
        return
    for old in _files_of(folder):
        (folder / old).unlink(missing_ok=True)
    for file in sorted(made.iterdir(), key=lambda each: each.name == FACTS):
        file.replace(folder / file.name)


def _files_of(folder: Path) -> list[str]:
    """Return the files of the answer in a folder, `answer.json` first."""
    try:
        examples = json.loads((folder / FACTS).read_bytes())["examples"]
        overlays = [name for each in examples for name in each["overlays"] or () if re.fullmatch(OVERLAY, name)]
    except (OSError, ValueError, LookupError, TypeError):
        overlays = []
    return [FACTS, MAPS, BASELINE, *overlays]


def load(path: Path) -> Record:
    """Read what `write` wrote. `path` is the folder, or the `answer.json` in it.

    `UnreadableFile` for a file that cannot be read, `InvalidArgument` for a file with other content.
    """
    path = path / FACTS if path.is_dir() else path
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UnreadableFile.of(error, "saved", path) from None
    try:
        saved = json.loads(text)
        provenance = json_format.ParseDict(saved["provenance_message"], pb.Provenance())
        expected = tuple(each["map_sha256"] for each in saved["examples"])
        names = tuple(each.get("name") for each in saved["examples"])
        map_dtype, is_final = saved["map_dtype"], saved["final"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, json_format.Error) as error:
        why = str(error).partition("\n")[0]
        raise InvalidArgument(f"{path}: not a saved answer: {type(error).__name__}: {why}") from None
    if not is_final:
        raise InvalidArgument(f"{path}: the answer was saved before it was final, and cannot be recomputed")
    return Record(path.parent, provenance, map_dtype, expected, names, _load_maps(path.parent / MAPS, expected))


def load_array(path: Path) -> Array:
    """Return the array in a .npy file. `UnreadableFile`, or `InvalidArgument` if the file has other content."""
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UnreadableFile.of(error, "array", path) from None
    except (ValueError, EOFError) as error:
        raise InvalidArgument(f"{path}: not a .npy array: {error}") from None
    if not isinstance(array, np.ndarray):
        raise InvalidArgument(f"{path}: got an archive of arrays, expected one array")
    return array


def _load_maps(path: Path, expected: Sequence[str | None]) -> NDArray[np.float32] | None:
    """Return the maps in a file, or None if it is missing. `InvalidArgument` if a digest does not match."""
    if not path.exists():
        return None
    maps = load_array(path)
    if maps.dtype != np.float32 or maps.shape[:1] != (len(expected),):
        raise InvalidArgument(f"{path}: got {maps.dtype} of {list(maps.shape)}, expected {len(expected)} float32 maps")
    for i, (map_, each) in enumerate(zip(maps, expected, strict=True)):
        if each is not None and digest(map_) != each:
            raise InvalidArgument(f"{path}: the map of example {i} does not match its digest in {FACTS}")
    return maps


def plain(value: Any) -> Any:
    """Convert to values for JSON: NaN and infinity become text, because JSON has no such numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
