"""Maps as DICOM objects for clinical viewers, made by highdicom from the extra `sidelight[dicom]`.

A map becomes a Parametric Map on the grid of its source image, its overlay a Secondary Capture. Both are in the source
image's study, refer to it, and have the answer's provenance in their header.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..exceptions import AlreadyExists, InvalidArgument
from ..visualization.colormaps import color_scale, is_signed
from .display import class_text
from .types import ExplainedTarget, Provenance

if TYPE_CHECKING:
    import highdicom as hd
    from pydicom import Dataset

MAKER = "Sidelight"
NOTICE = "For research only. It shows what a model reacted to, not a finding."
SERIES_NUMBERS = {"map": 9001, "overlay": 9002}
PRIVATE_GROUP, PRIVATE_CREATOR, PRIVATE_ELEMENT = 0x0075, "SIDELIGHT", 0x01
IDENTIFIERS = "StudyInstanceUID", "SOPInstanceUID", "SOPClassUID"
REQUIRED = (  # attributes that the objects must have, if only empty, and that a source may lack
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
_SOURCE_ERRORS = AttributeError, KeyError, RuntimeError, TypeError, ValueError  # highdicom's, of a bad source


@dataclass(frozen=True, slots=True)
class Drawing:
    """A map of one DICOM file: values and overlay on the file's grid."""

    name: str  # of the files, without "-map.dcm" and "-overlay.dcm"
    file: bytes
    map: NDArray[np.float32]  # [rows, columns] of the file; 0 outside the model's input
    overlay: Image.Image
    target: ExplainedTarget


@dataclass(slots=True)
class _Series:
    """The series of each study: all maps of a call in one, all overlays in another."""

    uids: dict[tuple[str, str], str] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def next_instance(self, study_uid: str, kind: str) -> dict[str, Any]:
        import highdicom as hd

        key = study_uid, kind
        self.counts[key] = self.counts.get(key, 0) + 1
        return {
            "series_instance_uid": self.uids.setdefault(key, str(hd.UID())),
            "series_number": SERIES_NUMBERS[kind],
            "sop_instance_uid": str(hd.UID()),
            "instance_number": self.counts[key],
        }


def write(drawings: Sequence[Drawing], folder: Path, *, provenance: Provenance, overwrite: bool) -> list[Path]:
    """Write a Parametric Map and a Secondary Capture for each drawing, and return the paths.

    `AlreadyExists` if one is there and `overwrite` is False, `InvalidArgument` without highdicom, or for a file that
    cannot be a source.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError:
        raise InvalidArgument("save_dicom needs highdicom: pip install 'sidelight[dicom]'") from None
    series = _Series()
    made: dict[Path, Dataset] = {}
    for each in drawings:
        source = _source(each)
        study_uid = source.StudyInstanceUID
        for kind, make in (("map", _parametric_map), ("overlay", _secondary_capture)):
            if kind == "map" and not source.get("FrameOfReferenceUID"):
                continue  # a Parametric Map must have one
            path = folder / f"{each.name}-{kind}.dcm"
            if path.exists() and not overwrite:
                raise AlreadyExists(f"{path}: this file exists; choose another folder, or allow overwriting")
            try:
                dataset: Dataset = make(each, source, series.next_instance(study_uid, kind), provenance)
            except _SOURCE_ERRORS as error:
                raise InvalidArgument(f"images: {each.name} cannot be the source of a DICOM {kind}: {error}") from error
            _add_provenance(dataset, each, source, provenance)
            made[path] = dataset
    folder.mkdir(parents=True, exist_ok=True)
    for path, dataset in made.items():
        dataset.save_as(path, enforce_file_format=True)
    return list(made)


def _source(drawing: Drawing) -> "Dataset":
    import pydicom

    source = pydicom.dcmread(io.BytesIO(drawing.file))
    if int(source.get("NumberOfFrames") or 1) > 1:
        raise InvalidArgument(f"images: {drawing.name} has several frames, expected an image of one")
    for name in IDENTIFIERS:
        if not source.get(name):
            raise InvalidArgument(f"images: {drawing.name} has no {name}, which DICOM objects refer to")
    for name in REQUIRED:
        if name not in source:
            setattr(source, name, None)
    return source


def _parametric_map(
    drawing: Drawing, source: "Dataset", instance: dict[str, Any], provenance: Provenance
) -> "hd.pm.ParametricMap":
    import highdicom as hd
    from pydicom.sr.codedict import codes

    low, high = color_scale(drawing.map)
    if is_signed(drawing.map):
        low = -high
    mapping = hd.pm.RealWorldValueMapping(
        lut_label="attribution",
        lut_explanation=_cut(f"Influence on the {provenance.score} of {class_text(drawing.target)}", 64),
        unit=codes.UCUM.NoUnits,
        value_range=(float(drawing.map.min()), float(drawing.map.max())),
        slope=1.0,
        intercept=0.0,
        quantity_definition=hd.sr.CodedConcept("attribution", "99SIDELIGHT", "Attribution of a model's score"),
    )
    return hd.pm.ParametricMap(
        [source],
        drawing.map,
        **instance,
        **_equipment(provenance),
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[
            hd.VOILUTTransformation(
                window_center=(low + high) / 2, window_width=(high - low) or 1.0, voi_lut_function="LINEAR_EXACT"
            )
        ],
        content_description=_cut(f"{provenance.method}, {class_text(drawing.target)}", 64),
        content_label="ATTRIBUTION",
    )


def _secondary_capture(
    drawing: Drawing, source: "Dataset", instance: dict[str, Any], provenance: Provenance
) -> "hd.sc.SCImage":
    import highdicom as hd

    equipment = _equipment(provenance)
    capture = hd.sc.SCImage.from_ref_dataset(
        source,
        np.asarray(drawing.overlay.convert("RGB")),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=_orientation(source) or ("L", "P"),
        pixel_spacing=source.get("PixelSpacing"),
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        manufacturer=equipment.pop("manufacturer"),
        **instance,
    )
    if _orientation(source) is None:
        capture.PatientOrientation = []  # unknown; highdicom requires a value
    capture.ManufacturerModelName = equipment["manufacturer_model_name"]
    capture.SoftwareVersions = equipment["software_versions"]
    capture.SourceImageSequence = [_reference(source)]
    return capture


def _add_provenance(dataset: "Dataset", drawing: Drawing, source: "Dataset", provenance: Provenance) -> None:
    """Write method, score, class and model into the description, and the provenance as JSON into a private element."""
    text = f"{provenance.method}; {provenance.score} of {class_text(drawing.target)}; model {provenance.model}"
    dataset.Laterality = source.get("Laterality")
    dataset.SeriesDescription = _cut(f"Attribution: {provenance.method}", 64)
    dataset.DerivationDescription = _cut(f"{text}, digest {provenance.model_digest}. {NOTICE}", 1024)
    facts = asdict(provenance) | {"explained": asdict(drawing.target), "source": str(source.SOPInstanceUID)}
    block = dataset.private_block(PRIVATE_GROUP, PRIVATE_CREATOR, create=True)
    block.add_new(PRIVATE_ELEMENT, "UT", json.dumps(facts))


def _equipment(provenance: Provenance) -> dict[str, Any]:
    versions = [_cut(f"{name} {version}", 64) for name, version in sorted(provenance.software.items())]
    return {
        "manufacturer": MAKER,
        "manufacturer_model_name": _cut(provenance.model, 64),
        "software_versions": versions or ["unknown"],
        "device_serial_number": provenance.model_digest[:64] or "unknown",
    }


def _reference(source: "Dataset") -> "Dataset":
    from pydicom import Dataset

    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    return reference


def _orientation(source: "Dataset") -> tuple[str, str] | None:
    """Return the directions in which the source's columns and rows are numbered; None if it has no orientation."""
    if given := source.get("PatientOrientation"):
        return given[0][:1], given[1][:1]  # of an oblique direction the main one
    cosines = [float(each) for each in source.get("ImageOrientationPatient") or ()]
    return (_letter(cosines[:3]), _letter(cosines[3:])) if len(cosines) == 6 else None


def _letter(direction: Sequence[float]) -> str:
    """Return the letter of the main direction. Coordinates grow to the left, to the back and to the head."""
    axis = int(np.abs(direction).argmax())
    return ("LR", "PA", "HF")[axis][int(direction[axis] < 0)]


def _cut(text: str, length: int) -> str:
    """Return text for a DICOM element: at most `length` characters, without backslashes, which separate values."""
    text = " ".join(text.replace("\\", "/").split())
    return text if len(text) <= length else text[: length - 3] + "..."
