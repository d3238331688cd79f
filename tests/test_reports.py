"""Pictures show what they are given, and pages stand alone."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnssl_ext.errors import NnsslError
from nnssl_ext.reports import curves
from nnssl_ext.reports.curves import draw_progress, read_log
from nnssl_ext.reports.page import Code, Picture, Section, Table, write_page
from nnssl_ext.reports.pictures import draw_planes

HEADER = "epoch,step,loss,mse,mse_visible,lr,grad_norm,cases_per_s,feature_std,effective_rank\n"


def write_log(path: Path, rows: int, header: str = HEADER) -> Path:
    names = header.strip().split(",")
    lines = [",".join(str(epoch + index / 10) for index in range(len(names))) for epoch in range(rows)]
    path.write_text(header + "\n".join(lines) + "\n")
    return path


def pixels(png: Path) -> np.ndarray:
    return np.asarray(Image.open(png).convert("L")).astype(float)


class TestProgress:
    def test_one_panel_per_quantity_and_the_terms_with_the_loss(self, tmp_path):
        log = read_log(write_log(tmp_path / "log.csv", 3))
        assert curves._panels(log) == {
            "loss": ["loss", "mse", "mse_visible"],
            "learning rate": ["lr"],
            "gradient norm": ["grad_norm"],
            "cases per second": ["cases_per_s"],
            "feature_std": ["feature_std"],
            "effective_rank": ["effective_rank"],
        }

    @pytest.mark.parametrize(
        ("header", "rows", "grid"),
        [
            (HEADER, 12, (2, 3)),  # six panels
            (HEADER, 1, (2, 3)),
            ("epoch,loss\n", 4, (1, 3)),
            ("loss\n", 1, (1, 3)),
            ("epoch,lr\n", 2, (1, 3)),
            ("epoch\n", 2, (1, 3)),
        ],
    )
    def test_any_columns_and_any_length(self, tmp_path, header, rows, grid):
        draw_progress(write_log(tmp_path / "log.csv", rows, header), tmp_path / "progress.png")
        drawn = pixels(tmp_path / "progress.png")
        assert drawn.shape == (grid[0] * 280, grid[1] * 420)
        assert (drawn.std() > 1) == (header != "epoch\n")  # nothing to draw is a white page, not an error

    def test_gaps_and_diverged_values(self, tmp_path):
        path = tmp_path / "log.csv"
        path.write_text("epoch,loss,lr,rank\n0,1.0,1e-3,\n1,nan,1e-3,\n2,inf,,\n3,0.5,-\n")
        log = read_log(path)
        assert np.isnan(log["rank"]).all() and np.isnan(log["lr"][2:]).all() and np.isinf(log["loss"][2])
        draw_progress(path, tmp_path / "progress.png")
        assert pixels(tmp_path / "progress.png").std() > 1

    def test_the_curve_is_where_the_numbers_are(self, tmp_path):
        """A rising and a falling loss mirror each other, up to the axes' decoration."""
        for name, values in {"up": (1, 2, 3), "down": (3, 2, 1)}.items():
            rows = "".join(f"{epoch},{value}\n" for epoch, value in enumerate(values))
            (tmp_path / f"{name}.csv").write_text("epoch,loss\n" + rows)
            draw_progress(tmp_path / f"{name}.csv", tmp_path / f"{name}.png")
        up, down = (np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB")).astype(int) for n in ("up", "down"))
        blue_up, blue_down = (image[..., 2] - image[..., 0] > 80 for image in (up, down))

        def slope(blue):
            rows, columns = np.nonzero(blue)
            return np.corrcoef(columns, -rows)[0, 1]

        assert slope(blue_up) > 0.9 and slope(blue_down) < -0.9

    def test_unreadable_logs_are_named(self, tmp_path):
        (tmp_path / "empty.csv").write_text(HEADER)
        for name in ("missing.csv", "empty.csv"):
            with pytest.raises(NnsslError, match=name):
                draw_progress(tmp_path / name, tmp_path / "progress.png")
        assert not (tmp_path / "progress.png").exists()


class TestPlanes:
    volume = np.random.default_rng(0).random((1, 12, 20, 16)).astype(np.float32)

    def test_one_column_per_volume_and_three_rows_per_channel(self, tmp_path):
        shapes = {}
        for columns in (1, 3):
            for channels in (1, 2):
                volumes = {f"v{i}": np.repeat(self.volume, channels, axis=0) for i in range(columns)}
                png = tmp_path / f"{columns}{channels}.png"
                draw_planes(volumes, png, (1.0, 1.0, 1.0))
                shapes[columns, channels] = pixels(png).shape
                assert pixels(png).std() > 10
        assert shapes[3, 1][1] == 3 * shapes[1, 1][1] and shapes[3, 1][0] == shapes[1, 1][0]
        assert shapes[1, 2][0] > 1.8 * shapes[1, 1][0]

    def test_proportions_are_millimetres(self, tmp_path):
        """A cube of 24 mm, sampled at 4 x 1 x 2 mm, is drawn as squares."""
        white = np.ones((1, 6, 24, 12), np.float32)
        white[:, 0, 0, 0] = 0  # so that the window is black to white
        black = 1 - white
        draw_planes({"black": white, "drawn": black}, tmp_path / "p.png", (4.0, 1.0, 2.0))
        dark = pixels(tmp_path / "p.png") < 10
        column = dark[:, dark.shape[1] // 2 :]
        rows = np.flatnonzero(column.sum(1) > 100)
        heights = [len(run) for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)]
        widths = [column[run].sum(1).max() for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)]
        assert len(heights) == 3
        assert np.allclose(heights, widths, rtol=0.03)

    def test_volumes_share_the_first_one_s_window(self, tmp_path):
        def brightness(volume):
            draw_planes({"reference": self.volume, "other": volume}, tmp_path / "p.png", (1.0, 1.0, 1.0))
            drawn = pixels(tmp_path / "p.png")
            return np.median(drawn[:, drawn.shape[1] // 2 :][drawn[:, drawn.shape[1] // 2 :] < 255])

        assert brightness(self.volume * 0.2) < 0.5 * brightness(self.volume)

    def test_planes_pass_through_the_middle(self, tmp_path):
        marked = np.zeros((1, 13, 21, 17), np.float32)
        marked[0, 6, 10, 8] = 1.0
        reference = np.linspace(0, 1, marked.size, dtype=np.float32).reshape(marked.shape)
        draw_planes({"reference": reference, "marked": marked}, tmp_path / "p.png", (1.0, 1.0, 1.0))
        other = pixels(tmp_path / "p.png")
        other = other[:, other.shape[1] // 2 :]
        draw_planes({"reference": reference, "marked": 0 * marked}, tmp_path / "q.png", (1.0, 1.0, 1.0))
        empty = pixels(tmp_path / "q.png")
        rows = np.flatnonzero((other != empty[:, empty.shape[1] // 2 :]).any(1))
        assert len(np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)) == 3  # seen once in each plane

    def test_labels_are_outlined(self, tmp_path):
        labels = np.zeros(self.volume.shape[1:], np.uint8)
        labels[3:9, 5:15, 4:12] = 2
        for name, drawn in {"with": {"v": labels}, "without": None}.items():
            draw_planes({"v": self.volume}, tmp_path / f"{name}.png", (1.0, 1.0, 1.0), labels=drawn)
        colour = {
            n: np.ptp(np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB")), axis=2) for n in ("with", "without")
        }
        assert colour["without"].max() == 0 and (colour["with"] > 60).sum() > 300

    @pytest.mark.parametrize("value", [0.0, np.nan])
    def test_constant_and_empty_volumes(self, tmp_path, value):
        draw_planes({"v": np.full((1, 4, 4, 4), value, np.float32)}, tmp_path / "p.png", (1.0, 1.0, 1.0))
        assert (tmp_path / "p.png").stat().st_size > 0

    def test_no_volumes_are_refused(self, tmp_path):
        with pytest.raises(NnsslError, match="no volumes"):
            draw_planes({}, tmp_path / "p.png", (1.0, 1.0, 1.0))


class Strict(HTMLParser):
    """Collects tags with their attributes, and text; fails on tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


class TestPage:
    hostile = '<script>alert("x")</script>&case_"1\''

    @pytest.fixture
    def page(self, tmp_path):
        Image.new("RGB", (5, 7), "red").save(tmp_path / "red.png")
        table = Table(
            ("case", "dice", "voxels"), [(self.hostile, 0.81234567, 1234567), ("mean", float("nan"), 2)], "Dice"
        )
        sections = [
            Section("Results", ["One sentence.", table, Picture(tmp_path / "red.png", self.hostile)]),
            Section(self.hostile, [Code("nnssl_train 4 3d_fullres > log && echo <done>")]),
        ]
        write_page(tmp_path / "page.html", self.hostile, sections)
        return (tmp_path / "page.html").read_text()

    def parse(self, page):
        parser = Strict()
        parser.feed(page)
        assert not parser.open
        return parser

    def test_it_needs_nothing_else(self, page):
        for tag, attributes in self.parse(page).tags:
            assert tag not in ("script", "link", "iframe")
            for name in ("src", "href"):
                assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
        assert not re.search(r"https?:|url\(|@import", page)

    def test_hostile_names_are_text(self, page):
        parser = self.parse(page)
        assert "<script" not in page
        assert parser.text.count(self.hostile) >= 4  # window title, heading, section, cell
        assert ("img", self.hostile) in [(tag, attributes.get("alt")) for tag, attributes in parser.tags]
        assert "nnssl_train 4 3d_fullres > log && echo <done>" in parser.text

    def test_tables_hold_their_numbers(self, page):
        text = self.parse(page).text
        assert {"0.8123", "1234567", "nan", "dice"} <= set(text)

    def test_pictures_are_inside(self, page, tmp_path):
        inside = re.search(r'src="data:image/png;base64,([^"]+)"', page)
        assert base64.b64decode(inside.group(1)) == (tmp_path / "red.png").read_bytes()
