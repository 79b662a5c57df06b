import json
import sys
import threading

import pytest

from nested_learning.train.metrics import Background, FanOut, JsonLinesWriter, read_metrics
from nested_learning.train.plots import plot_losses
from nested_learning.train.progress import Clock


class Recorder:
    def __init__(self):
        self.seen = []

    def write(self, record):
        self.seen.append(record)

    def close(self):
        self.seen.append("closed")


def test_every_record_reaches_every_writer(tmp_path):
    recorder = Recorder()
    writer = FanOut([JsonLinesWriter(tmp_path / "m.jsonl", 0), recorder])
    writer.write({"step": 1, "loss": 2.5})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": 2.5}  # before closing
    writer.close()
    assert recorder.seen == [{"step": 1, "loss": 2.5}, "closed"]


def test_starting_anew_drops_all_rows(tmp_path):
    for resume_step, expected in ((0, [5]), (5, [5, 5]), (4, [5])):
        writer = JsonLinesWriter(tmp_path / "m.jsonl", resume_step)
        writer.write({"step": 5})
        writer.close()
        assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == expected


def test_plot_shows_both_curves_and_the_entropy(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kw: drawn.append((figure, path)))
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "valid_loss": 2.25}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_losses(tmp_path / "m.jsonl", tmp_path / "loss.png", 2.75)
    [(figure, path)] = drawn
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert path == tmp_path / "loss.png"
    assert lines["training"] == [[1, 3], [2, 2]]
    assert lines["validation"] == [[2, 2.25]]
    assert [y for _, y in lines["unigram entropy"]] == [2.75, 2.75]


def test_clock_leaves_out_pauses(monkeypatch):
    times = iter([0.0, 1.0, 11.0, 12.0, 16.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock(step=10)
    with clock.paused():
        pass  # from 1 to 11
    assert clock.rate(14) == 2.0  # four steps in 12 - 10 seconds
    assert clock.rate(15) == 0.25


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_an_unreachable_logger_never_stops_training(make_trainer, monkeypatch, capsys, broken):
    class Service:
        def __getattr__(self, name):
            def call(*args, **kwargs):
                if name == broken:
                    raise ConnectionError("no network")
                return self

            return call

    monkeypatch.setitem(sys.modules, "wandb", Service())
    trainer = make_trainer()
    trainer.config.logging.wandb = "online"
    assert trainer.fit().step == 8
    assert capsys.readouterr().err.count("W&B fails and is left out from here on: no network") == 1
    assert len(read_metrics(trainer.config.run_dir / "metrics.jsonl")) == 10


def test_a_logger_in_the_background_gets_every_record_in_order():
    recorder = Recorder()
    writer = Background(lambda: recorder, "it")
    for step in range(100):
        writer.write({"step": step})
    writer.close()
    assert recorder.seen == [*({"step": step} for step in range(100)), "closed"]


def test_a_logger_that_never_answers_holds_up_nothing(capsys):
    answer = threading.Event()
    writer = Background(answer.wait, "it", patience=0.01)
    writer.write({"step": 1})
    writer.close()
    assert writer.thread.is_alive() and writer.thread.daemon
    assert capsys.readouterr().err == "it is not done after 0.01 s and is left out\n"
    answer.set()
    writer.thread.join()
