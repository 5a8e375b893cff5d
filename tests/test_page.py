"""The page of a run: a pure function of report.json, self-contained, well-formed, for both colour schemes and any name."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

from tests import zoo
from toolchain import plot
from toolchain.block_picture import block_picture
from toolchain.cli import main
from toolchain.drawing import Box, Drawing
from toolchain.page import report_page
from toolchain.wording import short_names

VOID = {"meta", "br", "img", "hr", "input", "link"}


class Checked(HTMLParser):
    """Refuses tags that do not match, ids that appear twice, and anything that would be fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.used: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object", "image", "img")
        for key, value in attrs:
            assert not key.startswith("on")
            if key == "id":
                assert value is not None
                assert value not in self.ids, f"id {value} twice"
                self.ids.add(value)
            if key in ("href", "xlink:href", "src"):
                assert value is not None
                assert value.startswith("#"), f"{tag} fetches {value}"
                self.used.add(value[1:])
            self.used |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one model: units alone, and by loss."""
    folder = tmp_path_factory.mktemp("page")
    onnx.save(zoo.tiny_resnet(), folder / "net<b>&.onnx")
    np.savez(folder / "calib.npz", **zoo.images(32).inputs, labels=np.arange(32) % 10)  # pyright: ignore[reportArgumentType]
    for units in ("none", "modcap"):
        arguments = ["quantize", folder / "net<b>&.onnx", "--calibration-data", folder / "calib.npz", "--eval-data", folder / "calib.npz"]
        arguments += ["--units", units, "-o", folder / f"{units}.onnx", "--iterations", 5, "--device", "cpu", "--sensitivity", "-q"]
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def facts(place: Path) -> dict[str, Any]:
    return json.loads((place / "modcap.report" / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(facts: dict[str, Any]) -> str:
    return report_page(facts)


def check(page: str) -> Checked:
    parser = Checked()
    parser.feed(page)
    assert parser.open == []
    assert parser.used <= parser.ids
    return parser


def test_the_page_is_a_pure_function_of_the_json(place: Path, page: str) -> None:
    written = (place / "modcap.report" / "report.html").read_text(encoding="utf-8")
    assert page == written
    assert (
        CliRunner().invoke(main, ["report", str(place / "modcap.report" / "report.json"), "-o", str(place / "again.html")]).exit_code == 0
    )
    assert (place / "again.html").read_text(encoding="utf-8") == written


def test_the_page_is_self_contained_and_escaped(page: str) -> None:
    check(page)
    assert "net<b>" not in page
    assert "net&lt;b&gt;&amp;.onnx" in page
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]00", page)  # every stand-in colour became a variable


def test_every_section_is_there_with_its_numbers(facts: dict[str, Any], page: str) -> None:
    for title in (
        "Reconstruction loss", "Capacity and units", "How each unit was learned", "Sensitivity of the layers",
        "Values that their grid fits worst", "What stayed float", "Units", "Blocks", "The run",
    ):  # fmt: skip
        assert f"<h2>{title}</h2>" in page
    v = facts["validation"]
    low, high = v["intervals"]["top1_quantized"]
    for text in (
        f"{v['top1_quantized']:.2f} %",
        f"95 %: {low:.1f} to {high:.1f}",
        f"{v['agreement']:.2f} %",
        facts["verdict"]["sentence"][1:],
    ):
        assert text in page
    for unit in facts["units"]:
        assert f"{unit['loss_before']:.4g} → {unit['loss_after']:.4g}" in page
        assert {len(column) for column in unit["curve"].values()} == {5}


def test_what_was_not_done_is_said(facts: dict[str, Any]) -> None:
    bare = facts | {
        "units": [],
        "worst_values": [],
        "float_nodes": [{"node": "gate", "op_type": "Conv", "reason": "asked for by --keep-float"}],
        "sensitivity": facts["sensitivity"] | {"layers": [], "skipped": "too slow here"},
        "oscillation": dict.fromkeys(facts["oscillation"]),
        "validation": facts["validation"] | {"top1_float": None, "agreement": None, "sqnr": {"y": None}},
    }
    page = report_page(bare)
    check(page)
    for text in ("Not measured: too slow here", "asked for by --keep-float", "exact"):
        assert text in page


def test_losses_that_are_no_finite_numbers_are_said(facts: dict[str, Any]) -> None:
    """A report has None in their place."""
    units = [{**unit, "loss_before": None, "loss_after": None} if i == 0 else unit for i, unit in enumerate(facts["units"])]
    endless = {**facts, "units": units, "oscillation": dict.fromkeys(facts["oscillation"])}
    page = report_page(endless)
    check(page)
    assert "loss infinite → infinite" in page
    assert "is infinite over the calibrated blocks" in page


def test_another_run_is_overlaid(place: Path) -> None:
    joined, alone = (str(place / f"{units}.report" / "report.json") for units in ("modcap", "none"))
    result = CliRunner().invoke(main, ["report", joined, "--overlay", alone, "-o", str(place / "both.html")])
    assert result.exit_code == 0, result.output
    page = (place / "both.html").read_text(encoding="utf-8")
    check(page)
    assert "reconstructed, units none" in page


@pytest.mark.parametrize(
    ("text", "message"), [("nothing", "is not JSON"), ("{}", "has no 'model'"), ("[1]", "has no 'model'"), (None, "cannot be read")]
)
def test_no_report_is_an_error(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(main, ["report", str(path)])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "report.html").exists()


def test_a_report_of_another_version_is_an_error(facts: dict[str, Any], tmp_path: Path) -> None:
    old = tmp_path / "report.json"
    old.write_text(json.dumps(facts | {"units": [{key: unit[key] for key in unit if key != "reason"} for unit in facts["units"]]}))
    result = CliRunner().invoke(main, ["report", str(old)])
    assert result.exit_code == 2
    assert "has no 'reason': it was written by another version" in result.output
    assert not (tmp_path / "report.html").exists()


def test_a_report_of_another_model_is_not_overlaid(place: Path, facts: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(facts | {"model": facts["model"] | {"sha256": "0", "path": "other.onnx"}}))
    result = CliRunner().invoke(main, ["report", str(place / "modcap.report" / "report.json"), "--overlay", str(other)])
    assert result.exit_code == 2
    assert "is of another model (other.onnx" in result.output


def test_block_picture_frames_units_and_draws_long_edges(facts: dict[str, Any]) -> None:
    picture = block_picture(facts).svg()
    check(picture)
    assert picture.count("<title>one unit:") == sum("+" in unit for unit in facts["plan"]["units"])
    blocks = [dict(block) for block in facts["blocks"]]
    assert block_picture(facts | {"blocks": blocks}).svg().count("<path") == len(blocks) - 1
    blocks[3]["inputs"] = [*blocks[3]["inputs"], *blocks[0]["outputs"]]
    skipping = block_picture(facts | {"blocks": blocks})
    assert re.search(r"<path d=\"M\d+ \d+C", skipping.svg())
    pixels = [np.asarray(Image.open(io.BytesIO(plot.png(drawing))).convert("RGB")) for drawing in (block_picture(facts), skipping)]
    left, right = (int((image[:, : 3 * 26] != image[0, 0]).any(axis=2).sum()) for image in pixels)  # where only arcs are
    assert pixels[0].shape[:2] == (3 * block_picture(facts).height, 3 * 340)
    assert left == 0 < right


def test_a_picture_of_many_blocks_stays_a_file_that_opens(facts: dict[str, Any]) -> None:
    high = Drawing(340, 40_000, "many rows", [Box(10, 39_000, 300, 900, 6, "blue")])
    image = np.asarray(Image.open(io.BytesIO(plot.png(high))).convert("RGB"))
    assert image.shape[0] <= 30_000
    assert (image[-200:, image.shape[1] // 2] != image[0, 0]).any()


def test_names_of_nodes_stay_apart_in_little_room() -> None:
    names = [f"/features/features.{i}/conv/conv.{j}/Conv" for i in range(3) for j in (0, 3)] + ["/classifier/classifier.1/Gemm"]
    assert short_names(names, 60) == names
    assert short_names(names, 18)[:2] == ["features.0/conv.0", "features.0/conv.3"]
    assert short_names(["a/long/Conv", "a/long/Gemm"], 8) == ["…ng/Conv", "…ng/Gemm"]  # the operator is all that differs
    assert all(len(name) <= 12 for name in short_names(names, 12))
