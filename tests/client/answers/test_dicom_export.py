"""Maps as DICOM objects: they have the grid of their source, refer to it, and standard readers accept them."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
import sidelight
import sidelight_server
from PIL import Image
from pydicom.data import get_testdata_file
from sidelight.visualization.overlay import placed_map

from support.models import LABELS, small_cnn

PARAMETRIC_MAP, SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.30", "1.2.840.10008.5.1.4.1.1.7"


def packaged(name: str) -> Path:
    return Path(str(get_testdata_file(name, download=False)))


@pytest.fixture(scope="module")
def client(device: str) -> Iterator[sidelight.Client]:
    """A client of a server that crops: 32 of 40 pixels of the short side."""
    spec = sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32), resize=40, class_names=LABELS)
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        yield client


@pytest.fixture(scope="module")
def written(client: sidelight.Client, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sidelight.Attribution]:
    folder = tmp_path_factory.mktemp("dicom")
    answer = client.attribute(
        [packaged("CT_small.dcm"), packaged("MR_small.dcm")], method=sidelight.SmoothGrad(samples=4)
    )
    names = [path.name for path in answer.save_dicom(folder)]
    assert names == ["000-map.dcm", "000-overlay.dcm", "001-map.dcm", "001-overlay.dcm"]
    return folder, answer


def strictly_read(path: Path) -> pydicom.Dataset:
    """Read a file, and every value in it, with pydicom's validation."""
    with pydicom.config.strict_reading():
        dataset = pydicom.dcmread(path)
        assert [element.value for element in dataset.iterall()]
        return dataset


@pytest.mark.parametrize(("i", "name"), [(0, "CT_small.dcm"), (1, "MR_small.dcm")])
def test_a_map_lies_on_the_grid_of_its_source(written: tuple[Path, sidelight.Attribution], i: int, name: str) -> None:
    folder, answer = written
    source, made = pydicom.dcmread(packaged(name)), strictly_read(folder / f"{i:03}-map.dcm")
    assert made.SOPClassUID == PARAMETRIC_MAP
    values = made.pixel_array
    assert (values.dtype, values.shape) == (np.float32, (source.Rows, source.Columns))
    shared, frame = made.SharedFunctionalGroupsSequence[0], made.PerFrameFunctionalGroupsSequence[0]
    assert shared.PixelMeasuresSequence[0].PixelSpacing == source.PixelSpacing
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == source.ImageOrientationPatient
    assert frame.PlanePositionSequence[0].ImagePositionPatient == source.ImagePositionPatient
    assert made.FrameOfReferenceUID == source.FrameOfReferenceUID
    margin = round(source.Rows * 4 / 40)  # of each side, that the model did not see
    assert not values[:margin].any()
    assert not values[:, -margin:].any()
    inside = values[margin:-margin, margin:-margin]
    expected = Image.fromarray(answer.heatmap(i)).resize(inside.shape[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(inside, np.asarray(expected))


def test_objects_refer_to_their_source_and_have_the_provenance(written: tuple[Path, sidelight.Attribution]) -> None:
    folder, answer = written
    source = pydicom.dcmread(packaged("CT_small.dcm"))
    map_, overlay = (strictly_read(folder / f"000-{kind}.dcm") for kind in ("map", "overlay"))
    derivation = map_.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0]
    for reference in (derivation.SourceImageSequence[0], overlay.SourceImageSequence[0]):
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert reference.ReferencedSOPClassUID == source.SOPClassUID
    for made in (map_, overlay):
        assert (made.StudyInstanceUID, made.PatientID) == (source.StudyInstanceUID, source.PatientID)
        facts = json.loads(made.private_block(0x0075, "SIDELIGHT")[0x01].value)
        assert facts["method"] == answer.provenance.method
        assert facts["model_digest"] == answer.provenance.model_digest
        assert facts["explained"]["index"] == answer.targets[0].index
        assert "research only" in made.DerivationDescription
    assert map_.SeriesInstanceUID != overlay.SeriesInstanceUID
    assert strictly_read(folder / "001-map.dcm").SeriesInstanceUID != map_.SeriesInstanceUID  # of another study


def test_real_world_values_are_the_values_of_the_map(written: tuple[Path, sidelight.Attribution]) -> None:
    made = strictly_read(written[0] / "000-map.dcm")
    (mapping,) = made.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    values = made.pixel_array
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1.0, 0.0)
    assert mapping.DoubleFloatRealWorldValueFirstValueMapped == values.min()
    assert mapping.DoubleFloatRealWorldValueLastValueMapped == values.max()
    (window,) = made.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence
    assert float(window.WindowCenter) + float(window.WindowWidth) / 2 == pytest.approx(
        sidelight.visualization.colormaps.color_scale(values).high
    )


def test_a_capture_has_the_pixels_of_the_overlay(written: tuple[Path, sidelight.Attribution]) -> None:
    folder, answer = written
    made = strictly_read(folder / "000-overlay.dcm")
    assert made.SOPClassUID == SECONDARY_CAPTURE
    np.testing.assert_array_equal(made.pixel_array, np.asarray(answer.overlay(0, original=True)))
    assert list(made.PatientOrientation) == ["L", "P"]  # an axial slice


@pytest.mark.requires("dciodvfy")
def test_an_independent_validator_finds_no_error(written: tuple[Path, sidelight.Attribution]) -> None:
    for path in sorted(written[0].glob("*.dcm")):
        done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False, timeout=60)
        assert not [line for line in done.stderr.splitlines() if line.startswith("Error")], path.name


def test_an_image_without_a_frame_of_reference_gets_the_overlay(client: sidelight.Client, tmp_path: Path) -> None:
    """Like a plain radiograph: without a frame of reference there is no Parametric Map."""
    source = pydicom.dcmread(packaged("CT_small.dcm"))
    del source.FrameOfReferenceUID, source.ImageOrientationPatient
    source.save_as(tmp_path / "plain.dcm")
    (path,) = client.attribute(tmp_path / "plain.dcm").save_dicom(tmp_path)
    assert path.name == "000-overlay.dcm"
    assert not strictly_read(path).PatientOrientation  # unknown


def test_a_top_k_target_has_objects_for_each_class(client: sidelight.Client, tmp_path: Path) -> None:
    answer = client.attribute(packaged("MR_small.dcm"), target=sidelight.TopK(2), score="logit", channels="sum")
    made = answer.save_dicom(tmp_path)
    assert [path.name for path in made] == [f"000-{k}-{kind}.dcm" for k in (0, 1) for kind in ("map", "overlay")]
    maps = [strictly_read(path).pixel_array for path in made[::2]]
    assert (maps[0] != maps[1]).any()


def test_what_cannot_be_written_is_refused(client: sidelight.Client, tmp_path: Path) -> None:
    with pytest.raises(sidelight.InvalidArgument, match="example 0 is not a DICOM file"):
        client.attribute(np.zeros((40, 40, 3), np.uint8)).save_dicom(tmp_path)
    answer = client.attribute(packaged("CT_small.dcm"))
    answer.save_dicom(tmp_path)
    with pytest.raises(sidelight.exceptions.AlreadyExists, match=r"000-map\.dcm"):
        answer.save_dicom(tmp_path)
    answer.save_dicom(tmp_path, overwrite=True)
    source = pydicom.dcmread(packaged("CT_small.dcm"))
    del source.StudyInstanceUID
    source.save_as(tmp_path / "stray.dcm")
    with pytest.raises(sidelight.InvalidArgument, match="has no StudyInstanceUID"):
        client.attribute(tmp_path / "stray.dcm").save_dicom(tmp_path / "stray")
    assert not (tmp_path / "stray").exists()


@pytest.mark.parametrize("box", [(0.0, 0.0, 30.0, 20.0), (3.0, 2.0, 13.0, 17.0)])
def test_a_placed_map_fills_its_box_and_nothing_else(box: tuple[float, float, float, float]) -> None:
    placed = placed_map(np.full((8, 8), 3.0), box, (30, 20))
    left, top, right, bottom = (int(edge) for edge in box)
    assert placed.shape == (20, 30)
    assert (placed[top:bottom, left:right] == 3.0).all()
    assert placed.sum() == 3.0 * (right - left) * (bottom - top)
