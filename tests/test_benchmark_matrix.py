"""The matrix of ``nnssl_benchmark segmentation``: fair by construction, resumable, and told truly."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_helpers import content_of, plans_of, resenc
from fake_cells import CASES, dice_of, finish
from scipy import stats
from tiny_dataset import DATASET, write_dataset

from nnssl_ext.benchmark import execution
from nnssl_ext.benchmark.execution import Workers, execute, pilot, seconds_ahead, submit
from nnssl_ext.benchmark.matrix import Arm, Benchmark, Cell, Split, parse_arms
from nnssl_ext.benchmark.preparation import find_split
from nnssl_ext.benchmark.record import load, save
from nnssl_ext.benchmark.report import slices_through, write_report
from nnssl_ext.benchmark.summary import reach, summarise
from nnssl_ext.checkpoints.io import save_checkpoint
from nnssl_ext.checkpoints.provenance import patch_name
from nnssl_ext.errors import NnsslError
from nnssl_ext.files import read_json, write_json
from nnssl_ext.reports.statistics import compare
from nnssl_ext.trainers.finetuning.settings import FinetuneSettings

PLANS = "nnsslPrimusTinyPlans"


@pytest.fixture
def dataset(nnunet_env):
    """Eight preprocessed cases without scans."""
    folder = write_dataset(nnunet_env.preprocessed, cases=8)
    write_json(folder / "dataset_fingerprint.json", {})
    return folder


@pytest.fixture
def benchmark(dataset, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint_final.pth"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"weights")
    return Benchmark(
        dataset=DATASET,
        preprocessed=dataset,
        configuration="3d_fullres",
        split=find_split(DATASET, PLANS, "3d_fullres", 0),
        arms=tuple(parse_arms([f"MAE={checkpoint}"], PLANS)),
        train_cases=(1, 4),
        epochs=(2, 4),
        seeds=3,
        settings={PLANS: FinetuneSettings(iterations_per_epoch=10, epochs=7)},
    )


def saved(benchmark: Benchmark, output: Path, **about) -> list[Cell]:
    cells = benchmark.cells()
    save(benchmark, cells, output, about)
    return cells


class TestFairness:
    def test_arms_differ_in_weights_only(self, benchmark):
        scratch, mae = benchmark.arms
        for count in (1, 4):
            one, other = (benchmark.request(arm, count, 2, 1) for arm in (scratch, mae))
            assert {key for key in one if one[key] != other[key]} == {"checkpoint"}
            assert one["checkpoint"] is None and len(other["checkpoint"]) == 64

    def test_subsets_are_nested_seeded_and_never_test_cases(self, benchmark):
        arm = benchmark.arms[0]
        drawn = {(n, s): {*benchmark.request(arm, n, 2, s)["train"]} for n in (1, 2, 4) for s in range(3)}
        for seed in range(3):
            assert drawn[1, seed] < drawn[2, seed] < drawn[4, seed]
            assert [len(drawn[n, seed]) for n in (1, 2, 4)] == [1, 2, 4]
        assert len({frozenset(drawn[4, seed]) for seed in range(3)}) > 1
        assert not set.union(*drawn.values()) & {*benchmark.split.test}

    def test_a_seed_is_of_everything(self, benchmark):
        block = benchmark.request(benchmark.arms[0], 1, 4, 2)["plans"]["nnssl_finetuning"]
        assert (block["seed"], block["subset_seed"], block["epochs"], block["train_cases"]) == (2, 2, 4, None)
        assert block["iterations_per_epoch"] == 10

    def test_what_changes_figures_changes_the_cell(self, benchmark):
        digests = [cell.digest for cell in benchmark.cells()]
        assert len({*digests}) == len(digests) == 2 * 2 * 2 * 3
        arm = benchmark.arms[1]
        arm.checkpoint.write_bytes(b"other weights")
        changed = [cell for cell, digest in zip(benchmark.cells(), digests, strict=True) if cell.digest != digest]
        assert {cell.arm for cell in changed} == {"MAE"} and len(changed) == 12
        slower = replace(benchmark, settings={PLANS: FinetuneSettings(iterations_per_epoch=10, lr_scratch=1e-5)})
        assert not {cell.digest for cell in slower.cells()} & {cell.digest for cell in benchmark.cells()}

    def test_corrected_labels_change_the_cells_that_they_matter_to(self, benchmark, dataset):
        truth = dataset / "gt_segmentations"
        truth.mkdir(exist_ok=True)
        for case in CASES:
            (truth / f"{case}.nii.gz").write_bytes(b"drawn")
        (one, *others) = sorted(benchmark.request(benchmark.arms[0], 4, 2, 0)["train"])
        before = benchmark.cells()
        (truth / f"{one}.nii.gz").write_bytes(b"corrected")
        for old, new in zip(before, benchmark.cells(), strict=True):
            learned = one in benchmark.request(benchmark.arm(old.arm), old.train_cases, old.epochs, old.seed)["train"]
            assert (old.digest != new.digest) == learned
        assert others and any(old.digest == new.digest for old, new in zip(before, benchmark.cells(), strict=True))
        before = benchmark.cells()
        (truth / f"{benchmark.split.test[0]}.nii.gz").write_bytes(b"corrected")
        assert not {cell.digest for cell in before} & {cell.digest for cell in benchmark.cells()}

    def test_a_test_case_among_the_labelled_is_refused(self, dataset):
        write_json(dataset / "splits_final.json", [{"train": CASES[:6], "val": CASES[5:]}])
        with pytest.raises(NnsslError, match="1 test cases are among the training cases: case_05"):
            find_split(DATASET, PLANS, "3d_fullres", 0)

    def test_the_fold_is_nnunets_own(self, dataset):
        from sklearn.model_selection import KFold

        found = find_split(DATASET, PLANS, "3d_fullres", 1)
        _, test = list(KFold(5, shuffle=True, random_state=12345).split(CASES))[1]
        assert found.test == tuple(CASES[i] for i in test)
        assert sorted(found.pool + found.test) == CASES
        write_json(dataset / "splits_final.json", [{"train": CASES[:5], "val": CASES[6:]}])
        assert find_split(DATASET, PLANS, "3d_fullres", 0).test == ("case_06", "case_07")
        with pytest.raises(NnsslError, match="there are 1"):
            find_split(DATASET, PLANS, "3d_fullres", 1)

    def test_test_cases_may_be_named(self, dataset, tmp_path):
        (tmp_path / "test.txt").write_text("case_00\ncase_03\n")
        found = find_split(DATASET, PLANS, "3d_fullres", 0, tmp_path / "test.txt")
        assert found.test == ("case_00", "case_03") and len(found.pool) == 6
        (tmp_path / "test.txt").write_text("case_99")
        with pytest.raises(NnsslError, match="case_99"):
            find_split(DATASET, PLANS, "3d_fullres", 0, tmp_path / "test.txt")


class TestArms:
    def test_scratch_is_added_for_all_plans_in_use(self, tmp_path):
        file = tmp_path / "a@b.pth"
        file.touch()
        found = parse_arms([f"A={file}", f"B={file}@Other"], "Ours")
        assert found == [
            Arm("scratch", "Ours"),
            Arm("scratch@Other", "Other"),
            Arm("A", "Ours", file),
            Arm("B", "Other", file),
        ]
        assert parse_arms(["scratch"], "Ours") == [Arm("scratch", "Ours")]

    def test_repositories_of_the_hub_and_exported_folders(self, tmp_path, monkeypatch):
        weights = tmp_path / "exported" / "model.safetensors"
        weights.parent.mkdir()
        weights.touch()
        asked = []
        monkeypatch.setattr(
            "nnssl_ext.checkpoints.hub.download", lambda *repository: asked.append(repository) or weights.parent
        )
        texts = ["A=hf:o/n", "B=hf:o/n@main", "C=hf:o/n@main@Other", f"D={weights.parent}", f"E={weights.parent}@Other"]
        found = parse_arms(texts, "Ours")[2:]
        assert [(arm.plans, arm.checkpoint) for arm in found] == [
            (plans, weights) for plans in ("Ours", "Ours", "Other", "Ours", "Other")
        ]
        assert asked == [("o/n", None), ("o/n", "main"), ("o/n", "main")]

    @pytest.mark.parametrize(
        ("texts", "words"),
        [
            (["file.pth"], "write scratch, NAME=CHECKPOINT"),
            (["A=missing.pth"], "no checkpoint at missing.pth"),
            (["A={}", "A={}"], "two arms are called 'A'"),
            (["scratch={}"], "two arms are called 'scratch'"),
            (["a/b={}"], "cannot be an arm's name"),
        ],
    )
    def test_what_cannot_be_is_named(self, tmp_path, texts, words):
        (tmp_path / "w.pth").touch()
        with pytest.raises(NnsslError, match=words):
            parse_arms([text.format(tmp_path / "w.pth") for text in texts], "Ours")


class TestExecution:
    def test_killed_five_times_it_ends_with_the_same_table(self, benchmark, tmp_path):
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        for cell in saved(benchmark, whole):
            finish(cell, whole)
        write_report(whole)
        saved(benchmark, killed)
        command = [sys.executable, str(Path(__file__).parent / "fake_cells.py"), str(killed)]
        rng, progress = random.Random(3), []
        for _ in range(5):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            for _ in range(rng.randrange(1, 3)):  # it is at work; kill it somewhere in the next cells
                process.stdout.readline()
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            progress.append(len(list(killed.rglob("result.json"))))
        assert progress[0] > 0 and progress == sorted(progress) and progress[-1] < 24
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        one, other = (read_json(folder / "report.json") for folder in (whole, killed))
        assert one == other and one["cells"] == {"all": 24, "done": 24}

    def test_so_many_at_a_time_each_in_a_slot_of_its_own(self, benchmark, tmp_path):
        cells, busy, most, lock = saved(benchmark, tmp_path / "out"), set(), [0], threading.Lock()

        def run(cell, slot):
            with lock:
                assert slot not in busy
                busy.add(slot)
                most[0] = max(most[0], len(busy))
            time.sleep(0.01)
            finish(cell, tmp_path / "out")
            with lock:
                busy.remove(slot)

        assert execute(cells, tmp_path / "out", run, 3, lambda line: None) == {}
        assert most[0] == 3 and all(cell.finished(tmp_path / "out") for cell in cells)
        execute(cells, tmp_path / "out", lambda *_: pytest.fail("everything was there"), 3, lambda line: None)

    def test_a_cell_that_fails_is_named_and_the_others_go_on(self, benchmark, tmp_path):
        cells, said = saved(benchmark, tmp_path / "out"), []

        def run(cell, slot):
            if cell.seed == 1 and cell.arm == "MAE":
                raise NnsslError("the disk is full")
            if cell.seed != 2:  # those of seed 2 end without a result
                finish(cell, tmp_path / "out")

        failures = execute(cells, tmp_path / "out", run, 2, said.append)
        assert {cell.seed for cell in failures} == {1, 2} and len(failures) == 4 + 8
        assert sum("FAILED: the disk is full" in line for line in said) == 4
        assert sum("left no result" in line for line in said) == 8
        report = write_report(tmp_path / "out")
        assert report["cells"] == {"all": 24, "done": 12}
        assert all(each["seeds"] == [0] for each in report["comparisons"])

    def test_a_result_of_another_request_does_not_count(self, benchmark, tmp_path):
        cell = saved(benchmark, tmp_path / "out")[0]
        finish(cell, tmp_path / "out")
        assert cell.finished(tmp_path / "out")
        assert replace(cell, digest="other").finished(tmp_path / "out") is None
        (cell.folder(tmp_path / "out") / "result.json").write_text('{"digest": "trunc')
        assert cell.finished(tmp_path / "out") is None

    def test_stopped_workers_start_nothing_more(self, benchmark, tmp_path):
        workers = Workers(benchmark, tmp_path / "out", "cpu")
        workers.stop()
        workers.run(benchmark.cells()[0], 0)
        assert not list((tmp_path / "out").rglob("train.log"))

    def test_slurm_jobs_run_the_same_cells(self, benchmark, tmp_path, monkeypatch):
        pytest.importorskip("submitit")
        output = tmp_path / "out"
        cells = saved(replace(benchmark, seeds=1, epochs=(2,)), output)
        by_folder = {cell.folder(output): cell for cell in cells}

        def work(folder):
            job = read_json(folder / "job.json")
            assert job["digest"] == by_folder[folder].digest and job["device"] == "cpu"
            if by_folder[folder].train_cases == 4:
                raise NnsslError("no room on the node")
            finish(by_folder[folder], output)

        monkeypatch.setattr(execution, "work_on", work)
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # jobs are processes of their own
        finish(cells[0], output)
        said = []
        failures = submit(benchmark, cells, output, "cpu", {"cluster": "local", "timeout_min": 5}, said.append)
        assert {cell.train_cases for cell in failures} == {4} and len(failures) == 2
        assert "submitted 3 jobs" in said[0] and "no room on the node" in failures[cells[-1]]
        with pytest.raises(NnsslError, match="--slurm"):
            submit(benchmark, cells, output, "cpu", {"cluster": "local", "gpu_per_nodes": 1}, said.append)

    def test_hours_by_hand(self, benchmark, tmp_path):
        """Fake cells: 0.5 s per iteration; besides that 20 s for two evaluations, so 10 s each. Settings evaluate at the end."""
        cells = saved(benchmark, tmp_path / "out")
        finish(cells[0], tmp_path / "out")
        known = [(PLANS, cells[0].finished(tmp_path / "out"))]
        assert seconds_ahead(benchmark, [c for c in cells if c.epochs == 4][:2], known) == pytest.approx(2 * (20 + 10))
        thrice = replace(benchmark, settings={PLANS: FinetuneSettings(iterations_per_epoch=10, evaluations=2)})
        assert seconds_ahead(thrice, [c for c in cells if c.epochs == 4][:1], known) == pytest.approx(20 + 30)
        small = pilot(benchmark)
        (cell,) = small.cells()
        assert (cell.arm, cell.train_cases, cell.epochs, cell.seed) == ("scratch", 1, 1, 0)

    def test_a_command_for_other_cells_adds_to_the_report(self, benchmark, tmp_path):
        output, other = tmp_path / "out", tmp_path / "other.pth"
        other.write_bytes(b"other weights")
        first = saved(replace(benchmark, train_cases=(4,), epochs=(2,)), output, MAE={"about": "mae"})
        for cell in first[:-1]:
            finish(cell, output)
        arms = tuple(parse_arms([f"DINO={other}"], PLANS))
        second = replace(benchmark, arms=arms, train_cases=(1,), epochs=(4,), seeds=1)
        for cell in saved(second, output, DINO={"about": "dino"}):
            finish(cell, output)
        record, cells = load(output)
        assert {(cell.arm, cell.train_cases, cell.epochs) for cell in cells} == {
            ("scratch", 4, 2),
            ("MAE", 4, 2),
            ("scratch", 1, 4),
            ("DINO", 1, 4),
        }
        assert set(first[:-1]) < set(cells) and len(cells) == 5 + 2
        assert record["about"] == {"MAE": {"about": "mae"}, "DINO": {"about": "dino"}}
        budgets = {(each["first"], each["train_cases"]) for each in write_report(output)["comparisons"]}
        assert budgets == {("MAE", 4), ("DINO", 1)}
        slower = {PLANS: replace(second.settings[PLANS], lr_scratch=1e-5)}
        alone = saved(replace(second, settings=slower), output)
        record, cells = load(output)
        assert cells == alone and {arm["name"] for arm in record["arms"]} == {"scratch", "DINO"}

    def test_other_weights_under_a_known_name_leave_no_old_figures(self, benchmark, tmp_path):
        output, few = tmp_path / "out", replace(benchmark, epochs=(2,), seeds=1)
        for cell in saved(few, output):
            finish(cell, output)
        benchmark.arms[1].checkpoint.write_bytes(b"other weights")
        now = saved(replace(few, train_cases=(1,)), output)
        assert {(cell.arm, cell.train_cases) for cell in set(load(output)[1]) - set(now)} == {("scratch", 4)}

    def test_a_folder_of_something_else_is_not_touched(self, benchmark, tmp_path):
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(NnsslError, match="something else"):
            save(benchmark, [], tmp_path, {})
        out = tmp_path / "out"
        saved(benchmark, out)
        saved(replace(benchmark, seeds=5), out)  # more of the same is welcome
        assert len(load(out)[1]) == 40
        other = Split(benchmark.split.test, benchmark.split.pool[:2], "swapped")
        with pytest.raises(NnsslError, match="other test cases"):
            saved(replace(benchmark, split=other, train_cases=(1,)), out)
        with pytest.raises(NnsslError, match="holds no benchmark"):
            load(tmp_path)


class TestSummary:
    def test_numbers_are_those_of_the_cells(self, benchmark, tmp_path):
        output = tmp_path / "out"
        cells = saved(benchmark, output)
        for cell in cells:
            finish(cell, output)
        content = write_report(output)
        assert content == read_json(output / "report.json")
        assert len(content["rows"]) == 8 and len(content["comparisons"]) == 4
        row = next(r for r in content["rows"] if (r["arm"], r["train_cases"], r["epochs"]) == ("MAE", 4, 2))
        mine = [dice_of(c) for c in cells if (c.arm, c.train_cases, c.epochs) == ("MAE", 4, 2)]
        assert row["dice"] == pytest.approx(np.mean(mine)) and row["iterations"] == 20
        assert row["sd_of_seeds"] == pytest.approx(np.std([each.mean() for each in mine], ddof=1))
        assert row["dice_per_label"]["2"] == pytest.approx(np.mean([each[:, 1] for each in mine]))
        assert row["cases"]["case_03"] == pytest.approx(np.mean([each[3] for each in mine]))

        compared = next(c for c in content["comparisons"] if (c["train_cases"], c["epochs"]) == (4, 2))
        gains = np.mean(mine, axis=(0, 2)) - np.mean(
            [dice_of(c) for c in cells if (c.arm, c.train_cases, c.epochs) == ("scratch", 4, 2)], axis=(0, 2)
        )
        assert compared["difference"] == pytest.approx(gains.mean())
        assert compared["p"] == pytest.approx(stats.wilcoxon(gains).pvalue)
        assert (compared["low"], compared["high"]) == pytest.approx(
            (compare(gains, np.zeros(8)).low, compare(gains, np.zeros(8)).high)
        )
        assert compared["per_seed"] == pytest.approx([0.1, 0.08, 0.06], abs=0.02)
        assert compared["worst_case"] == CASES[gains.argmin()] and compared["best_case"] == CASES[gains.argmax()]
        assert (
            compared["verdict"].startswith("pretraining helps: +0.0") and "n = 8 cases x 3 seeds" in compared["verdict"]
        )
        assert content["arms"][1]["checkpoint"] == "checkpoint_final.pth"  # no path
        assert content["labels"] == {"1": "bright", "2": "2"}  # the dataset names one
        page = (output / "report.html").read_text()
        for text in ("bright", compared["verdict"].split(" (")[0], "24 of 24 cells are done", "data:image/png"):
            assert text in page
        assert 'src="http' not in page and "NaN" not in (output / "report.json").read_text()

    def test_a_matrix_that_is_still_running(self, benchmark, tmp_path):
        output = tmp_path / "out"
        cells = saved(benchmark, output)
        assert write_report(output)["cells"] == {"all": 24, "done": 0}
        assert "0 of 24 cells are done" in (output / "report.html").read_text()
        finish(cells[0], output)
        content = write_report(output)
        assert [row["arm"] for row in content["rows"]] == ["scratch"] and content["comparisons"] == []
        wanted = [c for c in cells if (c.train_cases, c.epochs) == (1, 2)]
        for cell in wanted[:3]:  # both arms of seed 0, scratch of seed 1
            finish(cell, output)
        (compared,) = write_report(output)["comparisons"]
        assert compared["seeds"] == [0] and "in these single runs" in compared["verdict"]

    def test_pretraining_that_saw_test_cases_is_named(self, benchmark, tmp_path):
        from nnssl_ext.benchmark.preparation import _pretrained_on

        checkpoint = benchmark.arms[1].checkpoint
        content = content_of(plans_of(resenc(), [16, 16, 16]))
        content["nnssl_ext"]["data"]["dataset"] = DATASET
        save_checkpoint(checkpoint, content)
        assert _pretrained_on(checkpoint, benchmark.split) is None
        seen = benchmark.split.test[0]
        cases = [patch_name(seen, 3), benchmark.split.pool[0]]
        write_json(checkpoint.parent / "settings.json", {"dataset": DATASET, "cases": cases})
        found = _pretrained_on(checkpoint, benchmark.split)
        assert found == {"dataset": DATASET, "cases": 2, "test_cases": [seen]}
        write_json(checkpoint.parent / "settings.json", {"dataset": "Dataset001_Other", "cases": cases})
        assert _pretrained_on(checkpoint, benchmark.split) is None  # settings of some other run
        for known, words in (
            (found, f"1 of 2 test cases, by name, were in its pretraining on {DATASET}: {seen}"),
            (None, "unknown"),
        ):
            saved(benchmark, tmp_path / "out", MAE={"about": "", "notes": [], "pretrained_on": known})
            (warning,) = write_report(tmp_path / "out")["warnings"]
            assert words in warning and words in (tmp_path / "out" / "report.html").read_text()

    def test_seconds_of_a_busy_machine_come_with_a_warning(self, benchmark, tmp_path):
        output = tmp_path / "out"
        cell = saved(benchmark, output, MAE={"pretrained_on": {"dataset": DATASET, "cases": 1, "test_cases": []}})[0]
        finish(cell, output)
        assert summarise(*load(output), output)["warnings"] == []
        path = cell.folder(output) / "result.json"
        write_json(path, {**read_json(path), "machine": {"device": "cpu", "cores": 2, "load_average": 19.7}})
        (warning,) = summarise(*load(output), output)["warnings"]
        assert "9.8 per core" in warning or "9.9 per core" in warning

    def test_cases_without_a_label_in_truth_and_prediction_are_counted_and_left_out(self, benchmark, tmp_path):
        output = tmp_path / "out"
        cells = saved(replace(benchmark, train_cases=(1,), epochs=(2,)), output)
        for number, cell in enumerate(cells):
            finish(cell, output)
            path = cell.folder(output) / "result.json"
            content = read_json(path)
            content["curve"][-1]["dice"]["case_04"] = {"1": None, "2": None if number == 2 else 0.5}
            write_json(path, content)
        (compared,) = summarise(*load(output), output)["comparisons"]
        assert compared["left_out"] == ["case_04"] and compared["n_cases"] == 7

    @pytest.mark.parametrize(
        ("level", "expected"),
        [(0.3, 10), (0.4, 10), (0.5, 15), (0.6, 20), (0.65, 35), (0.71, None)],
    )
    def test_reaching_by_hand(self, level, expected):
        curve = [(10, 0.4), (20, 0.6), (30, 0.55), (40, 0.7)]  # 0.65: two thirds of the way from 30 to 40
        found = reach(curve, level)
        assert found == (None if expected is None else pytest.approx(36.6667 if level == 0.65 else expected, rel=1e-4))

    def test_reaching_in_a_report(self, benchmark, tmp_path):
        """Curves rise by 0.2 from half of the schedule to its end."""
        output = tmp_path / "out"
        for cell in saved(benchmark, output):
            finish(cell, output)
        compared = next(c for c in summarise(*load(output), output)["comparisons"] if c["epochs"] == 4)
        gain = compared["difference"]
        assert compared["first_reaches_second"]["iterations"] == pytest.approx(40 - 20 * gain / 0.2)
        assert compared["first_reaches_second"]["training_seconds"] == pytest.approx(20 - 10 * gain / 0.2)
        assert compared["second_reaches_first"]["iterations"] is None

    def test_planes_go_through_the_foreground(self):
        labels = np.zeros((8, 9, 10), np.uint8)
        labels[1, 2:5, 3:9] = 2
        labels[1:4, 4, 3] = 1
        assert slices_through(labels) == [1, 4, 3]
        assert slices_through(np.zeros((4, 6, 8), np.uint8)) == [2, 3, 4]
