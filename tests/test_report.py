from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from infoclip.report.curves import Series, bar_chart, line_chart
from infoclip.report.html import Cell, Markup, Page, chip, figure
from infoclip.report.overlay import class_shares, color_labels, overlay
from infoclip.report.palette import NO_LABEL, hex_color, ink, palette

SVG = "{http://www.w3.org/2000/svg}"


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Palette


def test_a_colour_depends_on_its_index_alone() -> None:
    large = palette(1000)
    assert np.array_equal(palette(7), large[:7])
    assert large.shape == (1000, 3)
    assert palette(0).shape == (0, 3)
    assert hex_color((1, 171, 255)) == "#01abff"
    with pytest.raises(ValueError, match="expected 0 or more"):
        palette(-1)


def test_colours_are_apart() -> None:
    # In 0..255 RGB: the first sixteen stay far apart, the first 128 are all different and none is the "no label" grey.
    first = palette(16).astype(int)
    gaps = np.linalg.norm(first[:, None] - first[None], axis=-1)[np.triu_indices(16, 1)]
    assert gaps.min() > 40
    many = palette(128).astype(int)
    assert len({tuple(c) for c in many}) == 128
    assert np.linalg.norm(many - np.array(NO_LABEL), axis=1).min() > 25


def test_colours_differ_for_eyes_without_green_cones() -> None:
    from infoclip.report.palette import _DEUTERANOPIA, _linear

    seen = _linear(palette(16) / 255) @ _DEUTERANOPIA.T
    seen = np.clip(seen, 0, 1) ** (1 / 2.2)
    gaps = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(16, 1)]
    assert gaps.min() > 0.12  # plain hues around the circle of the same count come below 0.05


def test_ink_is_readable() -> None:
    assert ink((255, 255, 255)) == (0, 0, 0)
    assert ink((0, 0, 0)) == (255, 255, 255)
    for color in palette(128):
        levels = [(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in color / 255]
        ground = 0.2126 * levels[0] + 0.7152 * levels[1] + 0.0722 * levels[2]
        on = 1.0 if ink(color) == (255, 255, 255) else 0.0
        contrast = (max(ground, on) + 0.05) / (min(ground, on) + 0.05)
        assert contrast >= 4.5  # WCAG AA; the better of black and white always reaches it


# Overlay


def test_overlay_without_legend_keeps_the_size() -> None:
    image, labels = picture(), np.zeros((40, 60), dtype=np.int64)
    labels[:, 30:] = 1
    before = image.copy()
    assert overlay(image, labels, ["a", "b"], legend=False).size == (60, 40)
    assert np.array_equal(image, before)
    full = np.asarray(overlay(image, labels, ["a", "b"], legend=False, alpha=1.0))
    assert np.array_equal(full, color_labels(labels, 2))
    assert tuple(full[0, 0]) == tuple(palette(2)[0])
    assert tuple(full[0, 59]) == tuple(palette(2)[1])


def test_legend_lists_the_classes_that_occur() -> None:
    labels = np.zeros((40, 60), dtype=np.uint16)
    labels[:10] = 7
    names = [f"class {i}" for i in range(9)]
    drawn = overlay(picture(), labels, names)
    # Magnified eightfold, and the legend is to the right of it.
    assert drawn.height == 320
    assert drawn.width > 480
    panel = {tuple(c) for c in np.asarray(drawn)[:, 480:].reshape(-1, 3)}
    colors = palette(9)
    assert {tuple(colors[0]), tuple(colors[7])} <= panel
    assert not {tuple(colors[i]) for i in (1, 2, 3, 4, 5, 6, 8)} & panel
    assert class_shares(labels, 9) == [(0, 0.75), (7, 0.25)]


def test_unknown_labels_are_grey() -> None:
    labels = np.full((40, 60), 255, dtype=np.int64)
    assert tuple(np.asarray(overlay(picture(), labels, ["a"], legend=False, alpha=1.0))[0, 0]) == NO_LABEL
    assert overlay(picture(), labels, ["a"]).width > 480
    assert color_labels(np.array([[-1, 0, 65535]]), 1)[0].tolist() == [[*NO_LABEL], palette(1)[0].tolist(), [*NO_LABEL]]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 700), (700, 3), (300, 400)])
def test_overlay_of_any_size_and_of_very_many_classes(height: int, width: int) -> None:
    count = 3000
    labels = (np.arange(height * width) % count).reshape(height, width)
    names = [f"a class with quite a long name, number {i} of the whole list of names" for i in range(count)]
    drawn = overlay(picture(height, width), labels, names)
    assert drawn.height < 3000
    assert drawn.width < 6000


def test_overlay_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="labels have shape"):
        overlay(picture(), np.zeros((40, 61), dtype=int), ["a"])
    with pytest.raises(ValueError, match="expected uint8"):
        overlay(picture().astype(float), np.zeros((40, 60), dtype=int), ["a"])
    with pytest.raises(ValueError, match="alpha"):
        overlay(picture(), np.zeros((40, 60), dtype=int), ["a"], alpha=1.5)


# Charts and page


def test_charts_are_svg_with_the_names_in_them() -> None:
    other = Series("other", [1, 3], [0.2, 20.0])
    line = line_chart(
        [Series("first <&>", [1, 2, 3], [3.0, float("nan"), 1.0]), other], x_label="step", y_label="loss", log_y=True
    )
    bars = bar_chart(["g1", "g2"], [("b", [1.5, float("nan")], [0.2, 0.0])], y_label="mIoU, %")
    for chart, words in (
        (line, ["first <&>", "other", "step", "loss", "1", "10"]),
        (bars, ["g1", "g2", "b", "1.5", "mIoU, %"]),
    ):
        root = ElementTree.fromstring(chart)
        assert root.tag == f"{SVG}svg"
        texts = {"".join(node.itertext()).strip() for node in root.iter(f"{SVG}text")}
        assert set(words) <= texts
    assert line_chart([], x_label="x", y_label="y").startswith("<svg")


def test_ids_of_two_charts_differ() -> None:
    series = [Series("s", [1, 2], [1.0, 2.0])]
    charts = [line_chart(series, x_label="x", y_label="y") for _ in range(2)]
    ids = [set(re.findall(r'\bid="([^"]+)"', chart)) for chart in charts]
    assert ids[0]
    assert not ids[0] & ids[1]
    for chart, own in zip(charts, ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", chart)) | set(re.findall(r'href="#([^"]+)"', chart)) <= own


class Sources(HTMLParser):
    """Collects what a page would fetch, and checks that elements are closed in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "action") or (name in ("href", "xlink:href") and tag != "use"):
                self.fetched.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_self_contained_and_escapes_everything() -> None:
    evil = '<script>alert("x")</script> & "more"'
    page = Page(evil)
    page.heading(evil)
    page.paragraph(evil, "lead")
    page.code(evil)
    page.table([evil, "b"], [[evil, Cell(evil, best=True)]])
    chart = line_chart([Series(evil, [1, 2], [1.0, 2.0])], x_label=evil, y_label=evil)
    page.cards([(evil, Markup(chart), evil)])
    page.panel(
        evil, [figure(picture(), evil, evil)], [chip(evil, 3, evil), chip(evil, 4, evil, wrong=True)], small=True
    )
    page.details(evil, [evil], [[evil]])
    page.details_code(evil, evil)
    text = page.render()
    parser = Sources()
    parser.feed(text)
    parser.close()
    assert not parser.open
    assert "script" not in parser.tags
    assert all(source.startswith("data:image/png;base64,") for source in parser.fetched)
    assert len(parser.fetched) == 1
    assert not re.findall(r"(?:@import|url\((?!#))", text)
    assert 'class="best"' in text
    assert "prefers-color-scheme: dark" in text


def test_pictures_in_the_page_are_the_pictures() -> None:
    import base64
    import io

    pixels = picture()
    data = re.search(r"base64,([^\"]+)", figure(pixels, "t"))
    assert data is not None
    with Image.open(io.BytesIO(base64.b64decode(data[1]))) as image:
        assert np.array_equal(np.asarray(image), pixels)
