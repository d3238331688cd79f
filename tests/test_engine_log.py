"""The training log of a run that goes on: what was written stays as it was, and what was not saved is written again."""

from nnssl_ext.engine.log import TrainingLog


def row(epoch: int) -> dict[str, float | int]:
    return {"epoch": epoch, "step": 25 * (epoch + 1), "loss": 1 / (epoch + 3), "lr": 1e-5, "seconds": 2.0}


def test_a_run_that_goes_on_keeps_its_rows_to_the_letter(tmp_path):
    sent = []
    log = TrainingLog(tmp_path, 0, sent.append)
    for epoch in range(3):
        log.add(row(epoch))
    whole = log.path.read_bytes()
    again = TrainingLog(tmp_path, 2, sent.append)  # the checkpoint is of two epochs: the third is run again
    assert again.rows == [row(0), row(1)]
    again.add(row(2))
    assert again.path.read_bytes() == whole
    assert sent == [row(0), row(1), row(2), row(2)]


def test_a_run_that_begins_anew_keeps_nothing(tmp_path):
    TrainingLog(tmp_path, 0, lambda row: None).add(row(7))
    log = TrainingLog(tmp_path, 0, lambda row: None)
    log.add(row(0))
    assert log.path.read_text().count("\n") == 2
