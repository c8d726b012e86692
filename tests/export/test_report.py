"""The page of a comparison: what it says is what was found, and what it is given cannot become markup."""

import base64
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_export.commands.compare import run as compare
from sana_export.parity.ladder import LadderResult
from sana_export.parity.metrics import measure
from sana_export.parity.report import difference, write_report
from sana_export.parity.tolerance import ParityError
from sana_runtime.errors import InputError
from sana_runtime.manifest import GateEntry

FACTS = {"bundle": "some/bundle", "prompt": "a <script>alert(1)</script> & a fox"}
GATE = GateEntry(True, 12.0, 30.0, 0.95, 8.0, 25.0, 0.9, 1, 3)


class Page(HTMLParser):
    """Texts, pictures and open tags of a page."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.pictures: dict[str, np.ndarray] = {}
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        if tag == "img":
            kind, _, data = str(values["src"]).partition(",")
            assert kind == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                self.pictures[str(values["alt"])] = np.asarray(image)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


def result(images: tuple[np.ndarray, np.ndarray], error: float = 1e-3) -> LadderResult:
    reference = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    candidate = reference * np.float32(1 + error)

    def row(stage: str):  # noqa: ANN202
        return measure(stage, "x", candidate, reference)

    steps = tuple(row(f"step {i + 1}") for i in range(3))
    components = tuple(row(name) for name in ("text_encoder", "transformer", "vae_decoder"))
    picture = measure("picture", "image", *images)
    return LadderResult(str(FACTS["prompt"]), 4.5, components, steps, steps, steps, picture, 0.987, images)


def pair(height: int = 6, width: int = 9) -> tuple[np.ndarray, np.ndarray]:
    reference = np.random.default_rng(1).integers(0, 200, (height, width, 3), np.uint8)
    candidate = reference.copy()
    candidate[2, 3] += 5
    candidate[4, 1] += 50
    return candidate, reference


def written(folder: Path, found: LadderResult, gate: GateEntry | None = GATE, bound: float = 1.0) -> Page:
    path = folder / "report.html"
    write_report(path, FACTS, found, gate, (bound,) * 3)
    assert [*folder.iterdir()] == [path]
    return Page(path)


def test_the_page_says_what_was_found_and_shows_both_pictures(tmp_path: Path) -> None:
    images = pair()
    page = written(tmp_path, result(images))
    assert page.open == []
    for text in ("passed", "some/bundle", "12.0 dB", "at least 8 dB", "30.0 dB", "0.950", "1.00e-03", "60.0"):
        assert text in page.texts, text
    assert "MISSED" not in page.source
    np.testing.assert_array_equal(page.pictures["engine"], images[0])
    np.testing.assert_array_equal(page.pictures["PyTorch fp32"], images[1])
    apart = page.pictures["difference, times 8"]
    assert apart[2, 3].tolist() == [40] * 3
    assert apart[4, 1].tolist() == [255] * 3
    assert not apart[0].any()
    assert page.source.count("<svg") == 2


def test_what_comes_from_outside_is_no_markup(tmp_path: Path) -> None:
    page = written(tmp_path, result(pair()))
    assert FACTS["prompt"] in page.texts
    assert "script" not in page.seen
    # Nothing is fetched: the page is as good on a machine without a network.
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page.source)


def test_a_missed_threshold_stands_out(tmp_path: Path) -> None:
    missed = GateEntry(False, 7.9, 30.0, 0.95, 8.0, 25.0, 0.9, 1, 3)
    page = written(tmp_path, result(pair()), missed)
    assert "MISSED" in page.texts
    assert page.source.count('class="no"') == 1


@pytest.mark.parametrize(("bound", "verdict"), [(2e-3, "passed"), (0.9e-3, "MISSED")])
def test_without_a_gate_components_are_held_to_their_bounds(bound: float, verdict: str, tmp_path: Path) -> None:
    page = written(tmp_path, result(pair()), None, bound)
    assert verdict in page.texts
    assert f"at most {bound:.2e}" in page.texts


def test_equal_sides_have_no_infinite_figures(tmp_path: Path) -> None:
    reference = pair()[1]
    page = written(tmp_path, result((reference, reference), error=0.0))
    assert "equal" in page.texts
    assert "inf" not in page.texts
    assert not page.pictures["difference, times 8"].any()


def test_large_pictures_are_shown_smaller_and_lose_no_difference(tmp_path: Path) -> None:
    candidate, reference = pair(40, 2100)
    page = written(tmp_path, replace(result((candidate, reference)), images=(candidate, reference)))
    assert page.pictures["engine"].shape == (math.ceil(40 / 3), 700, 3)
    apart = page.pictures["difference, times 8"]
    assert apart.shape == (14, 700, 3)
    assert apart[1, 0].tolist() == [255] * 3
    assert int((apart.max(axis=-1) > 0).sum()) == int((difference(candidate, reference).max(axis=-1) > 0).sum()) == 2
    assert any("2100 x 40 px, shown smaller" in text for text in page.texts)


def test_compare_writes_it_also_where_the_verdict_is_no(
    tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    compare(tiny_bundle(), num_steps=2, prompt="a fox", negative_prompt="fog", report=path)
    page = Page(path)
    assert {
        "passed",
        "a fox",
        "fog",
        "onnxruntime",
        "text_encoder float32, transformer float32, vae_decoder float32",
    } <= {*page.texts}
    assert page.pictures["engine"].shape == (128, 128, 3)
    monkeypatch.setattr("sana_export.parity.tolerance._ORDER_OF_SUMS", 0.0)
    monkeypatch.setattr("sana_export.parity.tolerance._ROUNDOFF", {"float32": 1e-12})
    with pytest.raises(ParityError):
        compare(tiny_bundle(), num_steps=2, report=path)
    assert "MISSED" in Page(path).texts


def test_it_does_not_go_with_quality(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--report belongs to a comparison with PyTorch"):
        compare(tmp_path, quality=True, report=tmp_path / "report.html")


@pytest.mark.parametrize("flag", ["report", "json_file", "pictures"])
@pytest.mark.parametrize(
    ("name", "says"), [("", "it is a directory"), ("file/report.html", "file is a file")], ids=["directory", "file"]
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    flag: str, name: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=says):
        compare(tmp_path / "no bundle", **{flag: tmp_path / name})
