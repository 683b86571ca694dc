"""The command line end to end, on a made-up table: what is printed, what is written, and how each command ends."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from anomaly_cvae import CVAEDetector, bundle
from anomaly_cvae.cli import app

PROGRAM = [sys.executable, "-m", "anomaly_cvae.cli"]
TINY = ["--no-tracking", "--set", "max_steps=60", "--set", "hidden_dims=[16]", "--set", "n_estimators=1"]
# A terminal of 80 columns without colours, whatever the machine that runs the tests.
PLAIN = {"COLUMNS": "80", "NO_COLOR": "1", "FORCE_COLOR": None, "TTY_COMPATIBLE": None, "OMP_NUM_THREADS": "1"}
COLUMNS = [
    "Air temperature [K]",
    "Process temperature [K]",
    "Rotational speed [rpm]",
    "Torque [Nm]",
    "Tool wear [min]",
]
N, FAILURES = 300, 15


def made_up(n: int = N, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    kind = rng.choice(["L", "M", "H"], n)
    air = rng.normal(300, 2, n)
    failed = np.arange(n) >= n - FAILURES
    torque = np.select([kind == "L", kind == "M"], [20, 40], 60) + rng.normal(0, 2, n) + 40 * failed
    cells = [air, air + 10 + rng.normal(0, 0.5, n), rng.integers(1200, 2000, n), torque, rng.integers(0, 250, n)]
    return pd.DataFrame({"Type": kind, **dict(zip(COLUMNS, cells, strict=True)), "Failure": failed.astype(int)})


def run(*arguments: Any) -> Any:
    """One command in this process."""
    return CliRunner(env=PLAIN).invoke(app, [str(argument) for argument in arguments])


def done(*arguments: Any) -> str:
    """Standard output of a command that ended well."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return str(result.stdout)


def spawn(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """One command as a process of its own."""
    env = {name: value for name, value in {**os.environ, **PLAIN}.items() if value is not None}
    command = [*options.pop("program", PROGRAM), *map(str, arguments)]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=env, **options)


def only_json(text: str) -> dict[str, Any]:
    """The one object that ``text`` is; NaN and Infinity are no JSON."""

    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads(text, parse_constant=refused)
    assert isinstance(read, dict)
    return read


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table and a model; tests work on copies."""
    folder = tmp_path_factory.mktemp("shelf")
    made_up().to_csv(folder / "table.csv", index=False)
    given = ["--condition", "Type", "--label", "Failure", "--name", "mill", "--output", folder / "mill"]
    assert run("train", folder / "table.csv", *given, *TINY, "--quiet").exit_code == 0
    return folder


@pytest.fixture
def here(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test: table.csv and the model mill."""
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = ["train", "table.csv", "-c", "Type", "--label", "Failure", "--name", "new", *TINY]
COMMANDS: dict[str, list[str]] = {
    "train": TRAIN,
    "train without a label": ["train", "table.csv", "-i", "Failure", "--name", "new", *TINY],
    "evaluate": ["evaluate", "mill", "table.csv", "--label", "Failure", "--no-tracking"],
    "score": ["score", "mill", "table.csv", "--output", "scored", "--contrast", "--explain", "--no-tracking"],
    "explain": ["explain", "mill", "table.csv"],
    "generate": ["generate", "mill", "-n", "4"],
    "recalibrate": ["recalibrate", "mill", "--false-alarm-rate", "0.05", "--no-tracking"],
}
WRONG: dict[str, tuple[int, list[str], str]] = {
    "a parameter without a value": (2, [*TRAIN, "--set", "max_steps"], "NAME=VALUE, not 'max_steps'"),
    "a parameter that does not exist": (2, [*TRAIN, "--set", "max_step=3"], "did you mean 'max_steps'"),
    "a parameter of the wrong type": (2, [*TRAIN, "--set", "max_steps=many"], "max_steps must be"),
    "a value that is no YAML": (2, [*TRAIN, "--set", "hidden_dims=[16"], "hidden_dims"),
    "a kind without a value": (2, [*TRAIN, "--kind", "Torque [Nm]"], "NAME=VALUE, not 'Torque [Nm]'"),
    "a kind that does not exist": (2, [*TRAIN, "--kind", "Torque [Nm]=reel"], "'reel'"),
    "a likelihood of another kind": (2, [*TRAIN, "--likelihood", "Torque [Nm]=poisson"], "'poisson'"),
    "a device that does not exist": (2, [*TRAIN, "--device", "nonsense"], "'nonsense'"),
    "a rate that is no share": (2, [*TRAIN, "--false-alarm-rate", "2"], "false_alarm_rate must"),
    "a share of 1": (2, [*TRAIN, "--test-fraction", "1"], "test_fraction"),
    "a configuration that is not there": (2, [*TRAIN, "--config", "none.yaml"], "none.yaml: no such file"),
    "a folder as configuration": (2, [*TRAIN, "--config", "mill"], "mill"),
    "nothing to change": (2, ["recalibrate", "mill", "--no-tracking"], "--false-alarm-rate"),
    "a table that is not there": (3, ["train", "none.csv", *TINY], "none.csv: no such file"),
    "a column that is not there": (3, [*TRAIN, "-c", "type"], "did you mean 'Type'"),
    "a label that is not there": (3, ["evaluate", "mill", "table.csv", "--label", "Fail"], "did you mean 'Failure'"),
    "a model that is not there": (3, ["explain", "none", "table.csv"], "none"),
    "a file as model": (3, ["generate", "table.csv"], "table.csv is not a model"),
    "a row that is not there": (3, ["explain", "mill", "table.csv", "--row", "999"], "no row 999"),
    "a class that is not there": (3, ["generate", "mill", "-c", "Z"], "it has H, L, M"),
    "a suffix that says nothing": (2, ["generate", "mill", "-o", "rows.txt"], ".parquet, .csv, .json"),
    "a file as folder": (3, ["generate", "mill", "-o", "table.csv/rows.csv"], "table.csv/rows.csv: cannot be written"),
    "a file as output": (3, ["score", "mill", "table.csv", "-o", "table.csv", "--no-tracking"], "table.csv"),
}


# ---------------------------------------------------------------------- how commands end


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_message_and_an_exit_code(here: Path, name: str) -> None:
    code, arguments, message = WRONG[name]
    result = run(*arguments)
    assert result.exit_code == code, (result.stderr, result.exception)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (here / "new").exists()


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_json_object_too(here: Path, name: str) -> None:
    code, arguments, message = WRONG[name]
    result = run(*arguments, "--json")
    said = only_json(result.stdout)
    assert said["exit_code"] == code == result.exit_code
    assert message in said["error"]


@pytest.mark.parametrize("name", WRONG)
def test_quiet_does_not_keep_errors_back(here: Path, name: str) -> None:
    code, arguments, message = WRONG[name]
    result = run(*arguments, "--quiet")
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr


@pytest.mark.parametrize(
    "arguments", [["nosuch"], ["train", "--nosuch"], ["evaluate", "mill"], ["generate", "mill", "-n", "0"]]
)
def test_a_command_that_cannot_be_parsed_ends_with_2(here: Path, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_one_object_on_standard_output(here: Path, name: str) -> None:
    result = run(*COMMANDS[name], "--json")
    assert result.exit_code == 0, result.stderr
    assert only_json(result.stdout)["exit_code"] == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_quiet_prints_nothing(here: Path, name: str) -> None:
    result = run(*COMMANDS[name], "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_quiet_and_json_print_the_object_only(here: Path) -> None:
    result = run(*COMMANDS["explain"], "--quiet", "--json")
    assert only_json(result.stdout)["rows"] == N
    assert result.stderr == ""


def test_files_that_cannot_be_used_are_named_and_the_others_scored(here: Path) -> None:
    (here / "in").mkdir()
    shutil.copy("table.csv", "in/good.csv")
    Path("in/bad.csv").write_text("a,b\n1,2\n")
    result = run("score", "mill", "in", "-o", "scored", "--no-tracking", "--json")
    said = only_json(result.stdout)
    assert result.exit_code == said["exit_code"] == 4
    assert {Path(file["path"]).name: file["status"] for file in said["files"]} == {
        "good.csv": "scored",
        "bad.csv": "failed",
    }
    assert "bad.csv" in result.stderr
    assert "Type" in result.stderr
    assert len(pd.read_parquet("scored")) == N


def test_a_file_that_cannot_be_used_ends_the_command_when_asked_to(here: Path) -> None:
    Path("bad.csv").write_text("a,b\n1,2\n")
    result = run("score", "mill", "bad.csv", "-o", "scored", "--on-error", "fail", "--no-tracking")
    assert result.exit_code == 3
    assert "bad.csv" in result.stderr


@pytest.mark.parametrize("output", ["table.csv", "other"])
def test_a_model_that_cannot_be_saved_is_refused_before_training(here: Path, output: str) -> None:
    (here / "other").mkdir()
    (here / "other" / "notes.txt").write_text("mine")
    result = run(*TRAIN, "--output", output)
    assert result.exit_code == 3
    assert output in result.stderr
    assert "training" not in result.stderr
    assert (here / "other" / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------------- interruption

# The heavy imports first, so that what is interrupted is the command's own work.
PRELOADED = "import anomaly_cvae.jobs, anomaly_cvae.detector, pandas, rich.console; from anomaly_cvae.cli import main\n"


def interrupted_in_training(folder: Path, *, max_steps: int, at: str, after: float = 0.0) -> tuple[int, str, str]:
    """Train before a terminal, interrupt ``after`` seconds once it shows the words ``at``."""
    made_up(200).to_csv(folder / "table.csv", index=False)
    sets = [f"max_steps={max_steps}", "patience=1000000", "hidden_dims=[16]", "n_estimators=1", "batch_size=32"]
    flags = ["-c", "Type", "--label", "Failure", "--name", "m", "--no-tracking", *(f"--set={text}" for text in sets)]
    terminal, its_end = pty.openpty()
    env = {**os.environ, "COLUMNS": "200", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    command = [*PROGRAM, "train", "table.csv", *flags]
    process = subprocess.Popen(command, stdout=-1, stderr=its_end, env=env, cwd=folder)
    os.close(its_end)
    try:
        err = read_terminal(terminal, at)
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        err += read_terminal(terminal)
        out = process.communicate(timeout=30)[0].decode()
    finally:
        process.kill()
        os.close(terminal)
    return process.returncode, out, err


def read_terminal(terminal: int, until: str | None = None) -> str:
    """What is written there until some words come, or until its writer ends."""
    text, ends = "", time.monotonic() + 120
    while until is None or until not in text:
        assert time.monotonic() < ends, text
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            read = os.read(terminal, 1 << 16)
        except OSError:  # on Linux: nobody writes there any more
            read = b""
        if not read:
            assert until is None, text
            break
        text += read.decode(errors="replace")
    return text


def test_an_interrupt_while_training_keeps_the_best_weights(tmp_path: Path) -> None:
    code, out, err = interrupted_in_training(tmp_path, max_steps=8_000, at="held-out negative ELBO")
    assert code == 0, err
    assert "training was interrupted" in err
    assert "best weights so far were kept" in " ".join(err.split())
    assert "model   m " in re.sub("\x1b\\[[0-9;]*m", "", out)
    detector = CVAEDetector.load(tmp_path / "m", device="cpu")
    assert detector.history_.attrs["stopped_by"] == "interrupt"
    assert detector.history_["step"].max() < 8_000
    assert len(detector.predict(made_up(20))) == 20


def test_an_interrupt_before_the_first_look_at_held_out_rows_saves_no_untrained_model(tmp_path: Path) -> None:
    """Of ten million steps a fortieth is done before the first look: there are no best weights until then."""
    code, _, err = interrupted_in_training(tmp_path, max_steps=10_000_000, at="steps", after=2.0)
    assert "Traceback" not in err
    # Python ends by the signal itself where an import was interrupted; a shell calls that 130, too.
    assert code in (0, 130, -signal.SIGINT), err
    assert (tmp_path / "m").exists() == (code == 0)
    if code == 0:
        assert CVAEDetector.load(tmp_path / "m", device="cpu").history_["step"].max() > 0


def test_an_interrupt_while_reading_ends_with_130(tmp_path: Path) -> None:
    lines = "\n".join(f"{i / 7},{i / 3},{i % 9}" for i in range(1000))
    (tmp_path / "long.csv").write_text("x,y,z\n" + "\n".join([lines] * 2_000))
    os.mkfifo(tmp_path / "config.yaml")
    program = [sys.executable, "-c", PRELOADED + "main()"]
    process = spawn("train", "long.csv", "--config", "config.yaml", *TINY, "--name", "m", cwd=tmp_path, program=program)
    try:
        (tmp_path / "config.yaml").write_text("preset: fast\n")  # returns once the command reads it
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=40)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.strip() == "error: interrupted"
    assert out == ""
    assert not (tmp_path / "m").exists()


# ---------------------------------------------------------------------- the program itself


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        process = spawn("--help")
        out, _ = process.communicate(timeout=30)
        seconds.append(time.perf_counter() - started)
        assert process.returncode == 0
        assert "recalibrate" in out
    assert min(seconds) < 0.4, seconds
    look = "from anomaly_cvae.cli import app; app(['--help'], standalone_mode=False); import sys; print(*sys.modules)"
    out, _ = spawn(program=[sys.executable, "-c", look]).communicate(timeout=30)
    loaded = set(out.splitlines()[-1].split())
    assert "typer" in loaded
    assert not loaded & {"torch", "pandas", "numpy", "sklearn", "mlflow", "pyarrow", "matplotlib", "pydantic"}


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "score", "explain", "generate", "recalibrate", "runs", "promote"]
)
def test_every_command_has_help(command: str) -> None:
    for flag in ("--help", "-h"):
        assert f"{command} [OPTIONS]" in done(command, flag)


def test_the_program_says_its_version_and_its_exit_codes() -> None:
    from anomaly_cvae import __version__

    assert done("--version").strip() == f"anomaly-cvae {__version__}"
    said = " ".join(done("--help").split())
    assert all(f"{code} " in said for code in (0, 1, 2, 3, 4, 5, 130))


def test_as_a_process_it_trains_and_answers_in_json(tmp_path: Path) -> None:
    made_up().to_csv(tmp_path / "table.csv", index=False)
    process = spawn(*TRAIN, "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert only_json(out)["model"] == "new"
    assert len(CVAEDetector.load(tmp_path / "new", device="cpu").predict(made_up())) == N
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new", "table.csv"]


def test_as_a_process_it_ends_with_the_code_and_no_traceback(tmp_path: Path) -> None:
    process = spawn("train", "none.csv", "--no-tracking", cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, "")
    assert err.strip() == "error: none.csv: no such file"


# ---------------------------------------------------------------------- how it looks


def assert_tidy(text: str) -> None:
    too_wide = [line for line in text.splitlines() if len(line) > 80]
    assert not too_wide, too_wide
    cut = re.findall(r"\S*\w…", text)
    assert not cut, cut


@pytest.mark.parametrize("name", COMMANDS)
def test_tables_fit_80_columns_and_cut_no_word_off(here: Path, name: str) -> None:
    assert_tidy(done(*COMMANDS[name]))


@pytest.mark.parametrize("name", ["train", "train without a label", "explain", "generate"])
def test_column_names_are_printed_in_full(here: Path, name: str) -> None:
    said = " ".join(done(*COMMANDS[name]).split())
    for column in COLUMNS if name.startswith("train") else ["Torque [Nm]"]:
        assert column in said


def test_many_columns_and_long_names_are_not_cut_off_either(here: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"temperature_of_the_{part}_bearing" for part in ("front", "rear", "upper", "lower")]
    names += [f"vibration_{i} [mm/s]" for i in range(10)]
    pd.DataFrame(rng.normal(size=(120, len(names))), columns=names).to_csv("wide.csv", index=False)
    assert_tidy(done("train", "wide.csv", "--name", "wide", *TINY))
    assert_tidy(done("explain", "wide", "wide.csv"))
    drawn = done("generate", "wide", "-n", "3")
    assert_tidy(drawn)
    for name in names:
        assert name.replace(" ", "") in "".join(drawn.split()) or name in drawn


def test_classes_of_long_names_are_not_cut_off(here: Path) -> None:
    table = made_up()
    table["Type"] = table["Type"].map(lambda kind: f"production_line_{kind}_in_the_northern_hall")
    table.to_csv("long.csv", index=False)
    said = [done("train", "long.csv", "-c", "Type", "--label", "Failure", "--name", "long", *TINY)]
    said.append(done("evaluate", "long", "long.csv", "--label", "Failure", "--no-tracking"))
    said.append(done("recalibrate", "long", "--false-alarm-rate", "0.1", "--no-tracking"))
    for text in said:
        assert not re.findall(r"\S*\w…", text)


def test_brackets_in_names_of_models_and_files_are_printed(here: Path) -> None:
    shutil.copy("table.csv", "rows[new].csv")
    said = done("train", "rows[new].csv", "-i", "Failure", "--name", "mill[b]", *TINY)
    assert "rows[new].csv" in said
    assert "model   mill[b] " in said
    assert "anomaly-cvae score mill[b] FILES" in said
    assert "drawn[1a].csv" in done("generate", "mill[b]", "-o", "drawn[1a].csv")
    assert "mill[b]" in done("recalibrate", "mill[b]", "--false-alarm-rate", "0.1", "--no-tracking")


def test_a_name_that_looks_like_markup_does_no_harm(here: Path) -> None:
    assert "mill [/b]" in done("train", "table.csv", "-c", "Type", "-i", "Failure", "--name", "mill [/b]", *TINY)


def test_conditions_and_values_with_brackets_are_printed_in_full(here: Path) -> None:
    table = made_up().rename(columns={"Type": "Type [mill]"})
    table["Type [mill]"] = "[" + table["Type [mill]"] + "]"
    table.to_csv("brackets.csv", index=False)
    said = done("train", "brackets.csv", "-c", "Type [mill]", "--label", "Failure", "--name", "b", *TINY)
    assert "Type [mill]" in said
    assert "[H] " in said
    assert "Torque [Nm]" in done("explain", "b", "brackets.csv")
    assert "[L]" in done("generate", "b", "-c", "[L]", "-n", "2")


# ---------------------------------------------------------------------- train


def test_train_says_what_it_took_the_columns_for_how_good_it_is_and_what_next(here: Path) -> None:
    said = done(*TRAIN)
    assert re.search(r"Torque \[Nm\]\s+real", said)
    assert re.search(r"Failure\s+ignored\s+the label", said)
    assert "Type as the condition" in said
    assert re.search(rf"overall\s+\d+\s+{FAILURES}\s+(0\.9|1\.0)", said)
    assert "anomaly-cvae score new FILES" in said
    detector = CVAEDetector.load("new", device="cpu")
    assert detector.schema_.class_names == ["H", "L", "M"]
    assert bundle.model_hash("new")[:12] in said


def test_train_reads_a_configuration_and_flags_win(here: Path) -> None:
    Path("train.yaml").write_text(
        "data: table.csv\ncondition: Type\nlabel: Failure\nname: from_file\ntracking: false\n"
        "detector: {max_steps: 60, hidden_dims: [16], n_estimators: 1, latent_dim: 2}\n"
        'column_kinds: {"Tool wear [min]": real}\n'
    )
    said = only_json(
        done(
            "train", "--config", "train.yaml", "--name", "from_flag", "--kind", "Rotational speed [rpm]=real", "--json"
        )
    )
    assert said["model"] == "from_flag"
    assert not Path("from_file").exists()
    assert {c["name"]: c["kind"] for c in said["columns"] if c["role"] == "column"} == dict.fromkeys(COLUMNS, "real")
    parameters = CVAEDetector.load("from_flag", device="cpu").get_params()
    assert (parameters["latent_dim"], parameters["max_steps"]) == (2, 60)


def test_train_takes_parameters_kinds_and_likelihoods(here: Path) -> None:
    given = ["--kind", "Tool wear [min]=real", "--likelihood", "Torque [Nm]=student_t", "--set", "latent_dim=3"]
    given += ["--false-alarm-rate", "0.05", "--score-kind", "both", "--conditioning", "per_class", "--preset", "fast"]
    done(*TRAIN, *given)
    parameters = CVAEDetector.load("new", device="cpu").get_params()
    assert parameters["column_kinds"] == {"Tool wear [min]": "real"}
    assert parameters["likelihoods"] == {"Torque [Nm]": "student_t"}
    assert (parameters["latent_dim"], parameters["false_alarm_rate"]) == (3, 0.05)
    assert (parameters["score_kind"], parameters["conditioning"]) == ("both", "per_class")
    assert parameters["max_steps"] == 60


def test_train_reads_a_folder_of_several_files(here: Path) -> None:
    (here / "in").mkdir()
    table = made_up()
    for i, start in enumerate(range(0, N, 100)):
        table.iloc[start : start + 100].to_csv(f"in/part{i}.csv", index=False)
    Path("in/readme.md").write_text("not a table")
    whole, parts = (only_json(done("train", data, *TRAIN[2:], "--json")) for data in ("table.csv", "in"))
    assert parts["training_rows"] + parts["test_rows"] == N
    assert parts["ranking"] == whole["ranking"]
    assert parts["classes"] == whole["classes"]


def test_train_reads_a_csv_file_as_it_is_told(here: Path) -> None:
    made_up().to_csv("odd.csv", index=False, sep="|", decimal=",", encoding="utf-16")
    form = ["--delimiter", "|", "--decimal", ",", "--encoding", "utf-16"]
    said = only_json(done("train", "odd.csv", *TRAIN[2:], *form, "--json"))
    same = only_json(done(*TRAIN, "--json"))
    assert said["ranking"] == same["ranking"]


@pytest.mark.parametrize("flags", [["--anomaly", "bad"], ["--normal", "ok"], ["--anomaly", "bad", "--normal", "ok"]])
def test_train_reads_named_labels(here: Path, flags: list[str]) -> None:
    table = made_up()
    table["Failure"] = np.where(table["Failure"] == 1, "bad", "ok")
    table.to_csv("named.csv", index=False)
    said = only_json(done("train", "named.csv", *TRAIN[2:], *flags, "--json"))
    assert next(line for line in said["ranking"] if line["class"] == "overall")["anomalies"] == FAILURES


# ---------------------------------------------------------------------- use of a model


def test_evaluate_ranks_and_counts_per_class(here: Path) -> None:
    said = only_json(done(*COMMANDS["evaluate"], "--json"))
    ranking = {line["class"]: line for line in said["ranking"]}
    assert {"overall", "macro", "H", "L", "M"} <= ranking.keys()
    assert ranking["overall"]["rows"] == N
    assert ranking["overall"]["anomalies"] == FAILURES
    assert ranking["overall"]["roc_auc"] > 0.95
    assert any(line["column"] == "Torque [Nm]" for line in said["alarm_columns"])
    assert said["run_id"] is None


def test_score_takes_the_rows_that_where_says_and_no_more_than_asked_for(here: Path) -> None:
    where = "Type in ['L', 'M'] and `Torque [Nm]` > 15"
    said = " ".join(done("score", "mill", "table.csv", "-o", "scored", "--where", where, "--no-tracking").split())
    chosen = made_up().query(where)
    assert len(pd.read_parquet("scored")) == len(chosen)
    assert f"{len(chosen):,} rows in" in said
    assert re.search(r"(reading|scoring|writing) was the bottleneck: \d+ % of the time", said.replace("%", " %"))
    assert "stopped" not in said
    shutil.copy("table.csv", "table2.csv")
    given = ["score", "mill", "table.csv", "table2.csv", "-o", "few", "--max-rows", 40, "--no-tracking"]
    said = " ".join(done(*given).split())
    assert len(pd.read_parquet("few")) == 40
    assert "stopped at --max-rows: the rest of table.csv is not scored; 1 file(s) were not opened" in said
    result = only_json(done(*given, "--json"))
    assert (result["limited"], result["files_not_opened"], result["files"][0]["cut"]) == (True, 1, True)
    assert result["slowest_stage"] in ("read", "score", "write")


@pytest.mark.parametrize(
    ("where", "part"), [("Typ == 'L'", "did you mean 'Type'"), ("Type = 'L'", "character 6"), ("Type", "neither true")]
)
def test_score_refuses_a_filter_that_cannot_be_meant(here: Path, where: str, part: str) -> None:
    result = run("score", "mill", "table.csv", "-o", "scored", "--where", where, "--no-tracking")
    assert result.exit_code in (2, 4)
    assert part in " ".join(result.stderr.split())


def test_score_reads_and_writes_at_addresses(here: Path) -> None:
    pytest.importorskip("fsspec", reason="files at URLs need fsspec")
    source, target = f"local://{here}/table.csv", f"local://{here}/scored"
    assert target in done("score", "mill", source, "-o", target, "--no-tracking").replace("\n", "")
    assert len(pd.read_parquet("scored/table.csv.parquet")) == N
    result = run("score", "mill", "nonsense://user:secret@a/b.csv", "-o", "other", "--no-tracking")
    assert result.exit_code == 3
    assert "nonsense://a/b.csv" in result.stderr
    assert "secret" not in result.stderr


def test_score_writes_what_the_detector_says(here: Path) -> None:
    done(*COMMANDS["score"])
    scored = pd.read_parquet("scored")
    expected = CVAEDetector.load("mill", device="cpu").score_table(made_up())
    np.testing.assert_allclose(scored["negative_elbo"], expected["negative_elbo"], rtol=1e-4)
    assert scored["is_anomaly"].tolist() == expected["is_anomaly"].tolist()
    assert "Failure" in scored
    assert {"contrast", "top_column", "top_nats"} <= set(scored)


def test_explain_names_column_and_value_of_the_failures(here: Path) -> None:
    said = only_json(done("explain", "mill", "table.csv", "--top", "8", "--columns", "2", "--json"))
    assert (len(said["explained"]), len(said["top_columns"])) == (8, 16)
    assert {row["row"] for row in said["explained"]} <= set(range(N - FAILURES, N))
    first = next(line for line in said["top_columns"] if line["row"] == said["explained"][0]["row"])
    assert first["column"] == "Torque [Nm]"
    assert first["observed"] == pytest.approx(made_up().loc[first["row"], "Torque [Nm]"])
    assert first["low"] < first["expected"] < first["high"] < first["observed"]


@pytest.mark.parametrize("command", ["explain", "evaluate"])
def test_a_row_without_a_condition_is_named_with_a_remedy_that_the_command_has(here: Path, command: str) -> None:
    table = made_up()
    table["Type"] = table["Type"].mask(table.index == 7)
    table.to_csv("gap.csv", index=False)
    result = run(*[argument.replace("table.csv", "gap.csv") for argument in COMMANDS[command]])
    if result.exit_code:
        assert "row 7" in result.stderr
        flags = run(command, "--help").stdout
        assert "missing_condition" not in result.stderr or "--missing-condition" in flags, result.stderr


def test_explain_takes_rows_by_number(here: Path) -> None:
    said = only_json(done("explain", "mill", "table.csv", "--row", "3", "--row", "0", "--json"))
    assert sorted(row["row"] for row in said["explained"]) == [0, 3]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
@pytest.mark.parametrize("command", ["explain", "generate"])
def test_tables_are_written_in_the_format_of_their_suffix(here: Path, command: str, suffix: str) -> None:
    path = here / "deep" / f"table{suffix}"
    assert f"table{suffix}" in done(*COMMANDS[command], "--output", path).replace("\n", "")
    read = {".parquet": pd.read_parquet, ".csv": pd.read_csv, ".json": pd.read_json}[suffix](path)
    if command == "explain":
        assert len(read) == 15
        assert {"row", "condition", "score", "is_anomaly", "column", "nats", "observed", "expected"} <= set(read)
        assert set(read["column"]) <= set(COLUMNS)
    else:
        assert list(read) == ["Type", *COLUMNS]
        assert len(read) == 4
        assert read.dtypes[COLUMNS].map(pd.api.types.is_numeric_dtype).all()


def test_generate_draws_rows_of_a_class(here: Path) -> None:
    rows = only_json(done("generate", "mill", "-n", "30", "-c", "L", "--json"))["rows"]
    assert len(rows) == 30
    assert {row["Type"] for row in rows} == {"L"}
    assert abs(np.median([row["Torque [Nm]"] for row in rows]) - 20) < 10
    assert rows == only_json(done("generate", "mill", "-n", "30", "-c", "L", "--json"))["rows"]
    other = ["generate", "mill", "-n", "30", "-c", "L", "--random-state", "1", "--json"]
    assert rows != only_json(done(*other))["rows"]


def test_generate_says_how_many_rows_it_does_not_show(here: Path) -> None:
    said = done("generate", "mill", "-n", "60")
    header = next(line for line in said.splitlines() if line.startswith("column"))  # a column of the table a line
    shown = int(header.split()[-1])
    assert f"… and {60 - shown} more" in said


def test_recalibrate_changes_the_thresholds_of_the_model_itself(here: Path) -> None:
    before = CVAEDetector.load("mill", device="cpu").thresholds_["threshold"]
    said = only_json(done(*COMMANDS["recalibrate"], "--json"))
    after = CVAEDetector.load("mill", device="cpu").thresholds_["threshold"]
    assert (after < before).all()
    assert [line["threshold"] for line in said["thresholds"]] == pytest.approx(after.tolist())
    assert said["model_sha256"] == bundle.model_hash("mill")


def test_recalibrate_takes_fresh_normals_into_another_folder(here: Path) -> None:
    before = bundle.model_hash("mill")
    made_up(600, seed=1).to_csv("fresh.csv", index=False)
    said = only_json(
        done("recalibrate", "mill", "fresh.csv", "--label", "Failure", "-o", "newer", "--no-tracking", "--json")
    )
    assert said["model"] == "newer"
    assert bundle.model_hash("mill") == before
    rows = {line["class"]: line["calibration_rows"] for line in said["thresholds"]}
    assert rows["H"] + rows["L"] + rows["M"] == 600 - FAILURES


# ---------------------------------------------------------------------- runs in a store of its own


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    """A folder in which one model was trained, logged and registered."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("store")
    made_up().to_csv(folder / "table.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        yield folder, run(*TRAIN, "--tracking", "--register", "mills", "--quiet")


def test_a_tracked_training_is_quiet_too(store) -> None:
    result = store[1]
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == ""


def test_runs_lists_what_was_done_with_uris_to_copy(store) -> None:
    listed = only_json(done("runs", "--json"))["runs"]
    assert [run["job"] for run in listed] == ["train"]
    said = done("runs")
    assert f"runs:/{bundle.provenance('new')['run_id']}" in said
    where, table = said.split("\n", 1)
    assert where.startswith("runs at ")  # as long as its path is
    assert_tidy(table)


def test_a_promoted_version_is_found_under_its_alias(store) -> None:
    assert only_json(done("promote", "mills", "1", "--alias", "live", "--json"))["model_uri"] == "models:/mills@live"
    drawn = [only_json(done("generate", model, "--json"))["rows"] for model in ("models:/mills@live", "new")]
    assert drawn[0] == drawn[1]


def test_a_version_that_is_not_there_cannot_be_promoted(store) -> None:
    result = run("promote", "mills", "7")
    assert result.exit_code == 3
    assert "7" in result.stderr


def test_a_model_in_a_store_is_recalibrated_into_a_folder_only(store) -> None:
    uri = f"runs:/{bundle.provenance('new')['run_id']}"
    result = run("recalibrate", uri, "--false-alarm-rate", "0.1", "--no-tracking")
    assert result.exit_code == 2
    assert "--output" in result.stderr
    done("recalibrate", uri, "--false-alarm-rate", "0.1", "--no-tracking", "-o", "again")
    assert (CVAEDetector.load("again", device="cpu").thresholds_["rule"].str.contains("0.1")).all()
