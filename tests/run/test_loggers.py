"""A run shown elsewhere: by stand-ins for the packages, which may fail or hang, and by the packages themselves where
they are installed."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time

import pytest
from runs import one_line, start, train

from conan_engine import config
from conan_engine.run import loggers

# wandb as follow.py uses it: it writes what it is given beside itself.
STAND_IN = """
import json, os, time
from pathlib import Path

PLACE = Path(__file__).parent

def tell(**what):
    with open(PLACE / "told.jsonl", "a") as file:
        file.write(json.dumps(what) + "\\n")

class Settings:
    def __init__(self, **_): pass

class Image:
    def __init__(self, path): self.path = path

class Run:
    url = "https://wandb.example/run"

    def log(self, numbers, step=None):
        if (PLACE / "hang").exists():
            time.sleep(1000)
        if (PLACE / "fail").exists() and step == 9:
            raise OSError("the network is gone")
        if step is None:
            numbers = {key: Path(image.path).read_bytes()[1:4].decode() for key, image in numbers.items()}
        tell(step=step, numbers=numbers)

    def finish(self):
        tell(finished=True)

def init(**options):
    tell(pid=os.getpid(), id=options["id"], name=options["name"], config=options["config"])
    return Run()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "wandb.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture
def ready(whole, tmp_path):
    """A run's folder with its shards."""
    run = tmp_path / "run"
    shutil.copytree(whole / "data", run / "data")
    shutil.copy(whole / "tokenizer.model", run)
    return run


def told(folder):
    return [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]


def as_sent(run, untimed_too=True):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {f"{row['stage']}/{key}": value for key, value in row.items() if not isinstance(value, str) and key != "step"}
        for row in rows
    ]


STAGES = "--stages=['pretrain', 'weak']"
TO = '--log_to=["wandb"]'


def test_every_row_is_shown_once_and_a_resumed_run_is_one_curve(tiny, ready, stand_in):
    process = start(tiny, ready, STAGES, TO, "--save_every=4", ranks=2)
    while process.poll() is None and not (
        (ready / "metrics.jsonl").exists() and len((ready / "metrics.jsonl").read_text().splitlines()) >= 7
    ):
        time.sleep(0.01)
    process.kill()  # the launcher; its ranks end, and the command beside them sends what there is
    process.communicate()
    code, out, err = train(tiny, ready, STAGES, TO, ranks=2)
    assert code == 0 and "wandb: https://wandb.example/run" in out + err, err
    said = told(stand_in)
    starts = [x for x in said if "id" in x]
    assert (
        len(starts) == 2
        and starts[0]["id"] == starts[1]["id"]
        and starts[0]["config"]["weak.lr"] == 1e-3
        and starts[0]["name"] == "run"
    )
    rows = [x for x in said if x.get("step") is not None]
    assert [x["step"] for x in rows] == list(range(12)), "each once, in order"
    expected = as_sent(ready)
    assert [set(x["numbers"]) for x in rows] == [set(x) for x in expected]
    for row, wanted in zip(rows, expected):
        stage = next(iter(wanted)).split("/")[0]
        assert row["numbers"][f"{stage}/loss"] == wanted[f"{stage}/loss"] and f"{stage}/gradient_norm" in row["numbers"]
    assert said[-2:] == [{"step": None, "numbers": {"loss.png": "PNG"}}, {"finished": True}]


@pytest.mark.parametrize("how", ["fail", "hang"])
def test_a_logger_that_fails_or_hangs_never_stops_training(tiny, ready, whole, stand_in, monkeypatch, how):
    (stand_in / how).touch()
    (stand_in / "sitecustomize.py").write_text(
        "import conan_engine.run.loggers\nconan_engine.run.loggers.PATIENCE = 3\n"
    )
    code, out, err = train(tiny, ready, STAGES, TO)
    assert code == 0 and f"python -m conan_engine.follow {ready} wandb" in out + err, err
    assert ("the network is gone" if how == "fail" else "has not taken all within 3 s") in out + err
    assert len(as_sent(ready)) == 12 and (ready / "loss.png").exists()
    (stand_in / how).unlink()
    subprocess.run([sys.executable, "-m", "conan_engine.follow", str(ready), "wandb"], check=True, timeout=60)
    assert [x["step"] for x in told(stand_in) if x.get("step") is not None] == list(range(12)) and told(stand_in)[
        -1
    ] == {"finished": True}


def test_what_is_not_installed_or_no_logger_is_one_line(tiny, ready, stand_in):
    (stand_in / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda name, *rest: None if name in "
        "('mlflow', 'tensorboard') else find(name, *rest)\n"
    )
    code, out, err = train(tiny, ready, STAGES, '--log_to=["mlflow"]')
    assert (
        code == 0
        and (out + err).count("log_to: mlflow is not installed here, and nothing goes there: pip install mlflow") == 1
    )
    assert "not installed" not in train(tiny, ready, STAGES)[1]
    one_line(
        train(tiny, ready, '--log_to=["wandp"]'),
        "log_to is ['wandp']; expected some of tensorboard, wandb, mlflow, trackio",
    )
    found = subprocess.run(
        [sys.executable, "-m", "conan_engine.follow", str(stand_in), "wandb"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 2 and "holds no metrics.jsonl and config.json" in found.stderr
    assert tuple(loggers.LOGGERS) == config.LOGGERS


def of_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    assert "settings/text_summary" in found.Tags()["tensors"] and found.Tags()["images"] == ["loss"]
    return {key: [(event.step, event.value) for event in found.Scalars(key)] for key in found.Tags()["scalars"]}


def records(data):
    """Of a log as LevelDB writes it, behind 7 bytes of its own: blocks of 32 KiB of pieces, each CRC, length and
    whether it is a record's last."""
    at, record = 7, b""
    while at + 7 <= len(data):
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768


def of_wandb(run):
    from wandb.proto import wandb_internal_pb2

    found, settings, picture = {}, set(), False
    for path in sorted((run / "loggers/wandb").glob("offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            settings |= {item.key for item in record.run.config.update}
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            picture |= "loss.png/size" in items
            for key, value in items.items():
                if "/" in key and not key.startswith("loss.png") and isinstance(value, int | float):
                    found.setdefault(key, []).append((items["_step"], value))
    assert "weak.lr" in settings and picture
    return found


def of_mlflow(run):
    import mlflow

    client = mlflow.MlflowClient()
    (experiment,) = [x for x in client.search_experiments() if x.name == "conan-engine"]
    (one,) = client.search_runs([experiment.experiment_id])
    assert one.data.params["weak.lr"] == "0.001" and [x.path for x in client.list_artifacts(one.info.run_id)] == [
        "loss.png"
    ]
    return {
        key: [(x.step, x.value) for x in client.get_metric_history(one.info.run_id, key)] for key in one.data.metrics
    }


def of_trackio(run):
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("conan-engine")
    rows, found = SQLiteStorage.get_logs("conan-engine", name), {}
    for row in rows:
        for key, value in row.items():
            if "/" in key and isinstance(value, int | float):
                found.setdefault(key, []).append((row["step"], value))
    assert any("loss.png" in row for row in rows)
    return found


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio}


@pytest.mark.parametrize("name", READERS)
def test_the_package_itself_without_a_network(tiny, ready, tmp_path, monkeypatch, name):
    if not importlib.util.find_spec(name):
        pytest.skip(f"needs {name}; `make check-loggers` installs it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for stages, steps in ((["pretrain"], 6), (["pretrain", "weak"], 12)):  # the second goes on with the first one's
        code, out, err = train(tiny, ready, f"--stages={stages}", f'--log_to=["{name}"]')
        assert code == 0 and "log_to" not in out + err, out + err + (ready / f"loggers/{name}.log").read_text()
        assert json.loads((ready / f"loggers/{name}.json").read_text())["sent"] == steps - 1
    found = READERS[name](ready)
    for step, wanted in enumerate(as_sent(ready)):
        for key, value in wanted.items():
            key = key.replace("@", "_") if name == "mlflow" else key
            assert [x for at, x in found[key] if at == step] == [pytest.approx(value, rel=1e-6)], key
