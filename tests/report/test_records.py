import json

import numpy as np
import pytest

from depthmix.errors import RunError, UserError
from depthmix.report.records import read_run, smooth


def test_reads_what_was_written(fake, make_config, tmp_path):
    config = make_config("mgr-competitive", seed=3, steps=20)
    record = read_run(fake.fabricate(tmp_path / "run", config))
    assert (record.residual, record.seed, record.steps_done) == ("mgr-competitive", 3, 20)
    assert record.train["loss"].tolist() == [fake.train_loss("mgr-competitive", 3, k) for k in range(1, 21)]
    assert record.val["step"].tolist() == [10, 20]
    np.testing.assert_allclose(record.wall_seconds(record.val["step"]), [0.3, 0.6])


def test_torn_and_repeated_lines(fake, make_config, tmp_path):
    run = fake.fabricate(tmp_path / "run", make_config(steps=20), upto=5)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"split": "train", "step": 5, "tokens": 1, "loss": 9.0}) + "\n")
        file.write('{"split": "train", "step": 6, "lo')
    record = read_run(run)
    assert record.train["step"].tolist() == [1, 2, 3, 4, 5]
    assert record.train["loss"][-1] == 9.0
    assert np.isnan(record.train["lr"][-1])


def test_time_of_a_step_that_is_not_on_record_is_the_median(fake, make_config, tmp_path):
    run = fake.fabricate(tmp_path / "run", make_config(steps=4))
    lines = [{"step": 1, "seconds": 1.0}, {"step": 3, "seconds": 3.0}, {"step": 4, "seconds": 2.0}]
    (run / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read_run(run)
    assert record.wall_seconds(np.array([1.0, 2.0, 4.0])).tolist() == [1.0, 3.0, 8.0]


def test_no_run_folder(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_result(fake, make_config, tmp_path, text):
    run = fake.fabricate(tmp_path / "run", make_config(steps=4))
    (run / "result.json").write_text(text)
    with pytest.raises(RunError, match=r"result\.json is damaged"):
        read_run(run)


def test_smooth():
    values = np.array([1.0, 5.0, 3.0, 8.0, 10.0, 0.0])
    expected = [1.0, np.mean(values[0:3]), np.mean(values[0:5]), np.mean(values[1:6]),
                np.mean(values[2:6]), np.mean(values[3:6])]  # fmt: skip
    np.testing.assert_allclose(smooth(values, 5), expected)
    np.testing.assert_allclose(smooth(values, 1), values)
    np.testing.assert_allclose(smooth(np.full(50, 2.5), 9), 2.5)
