"""Tables in files: which are found, how a CSV file is understood, and that every refusal names the file."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from anomaly_cvae.batch import CsvFormat, TableFile, find_files, read_table
from anomaly_cvae.batch.csv_text import SAMPLE_BYTES
from anomaly_cvae.batch.source import Batch, Wanted
from anomaly_cvae.errors import DataError

NO_TEXT: tuple[str, ...] = ()


def write(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    return path


def write_arrow(path: Path, table: pa.Table, new: Callable = pa.ipc.new_file, rows: int | None = None) -> Path:
    with new(path, table.schema) as sink:
        sink.write_table(table, max_chunksize=rows)
    return path


def read(path: Path, **csv_format: str) -> pd.DataFrame:
    return read_table([path], CsvFormat(**csv_format))


def words(path: Path, columns: list[str], text: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Columns that hold text, as a model would know them."""
    if TableFile.of(path).kind != "csv" or not set(columns) <= set(TableFile.of(path).columns()):
        return {}
    table = read_table([path])
    return {n: () for n in columns if n in text or not pd.api.types.is_numeric_dtype(table[n].dtype)}


def batches(path: Path, columns: list[str], text: tuple[str, ...] = NO_TEXT, rows: int = 1000) -> list[Batch]:
    return list(TableFile.of(path).batches(Wanted(columns, (), words(path, columns, text)), rows))


def cells(path: Path, columns: list[str], text: tuple[str, ...] = NO_TEXT, rows: int = 1000) -> dict[str, list]:
    frames = [batch.frame for batch in batches(path, columns, text, rows)]
    return pd.concat(frames, ignore_index=True)[columns].to_dict("list")


def found(*inputs: str | Path) -> list[str]:
    return [file.path.name for file in find_files(inputs)]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


@pytest.fixture
def numbers() -> pd.DataFrame:
    return pd.DataFrame({"x": np.arange(25) / 4, "n": np.arange(25), "name": [f"row {i}" for i in range(25)]})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder as people have them: several kinds, below each other, with things that are no table."""
    for name in ("b.csv", "a.parquet", "sub/c.arrow", "sub/deep/d.csv.gz", "e.TSV"):
        write(tmp_path / name, "x\n1\n")
    for name in (".hidden.csv", "_temporary.csv", ".git/f.csv", "_spark/g.parquet", "readme.md", "sub/notes.docx"):
        write(tmp_path / name, "x\n1\n")
    return tmp_path


# ---------------------------------------------------------------------- finding files


def test_folder_gives_every_table_below_it_in_the_order_of_names(tree):
    files = find_files([tree])
    assert [file.relative.as_posix() for file in files] == [
        "a.parquet", "b.csv", "e.TSV", "sub/c.arrow", "sub/deep/d.csv.gz",
    ]  # fmt: skip
    assert [file.kind for file in files] == ["parquet", "csv", "csv", "arrow", "csv"]


def test_hidden_file_is_taken_when_it_is_named(tree):
    assert found(tree / ".hidden.csv", tree / "_temporary.csv") == [".hidden.csv", "_temporary.csv"]


def test_table_in_a_folder_below_a_hidden_folder_is_found(tmp_path):
    write(tmp_path / ".cache" / "job" / "a.csv", "x\n1\n")
    assert found(tmp_path / ".cache" / "job") == ["a.csv"]


def test_pattern_passes_over_other_kinds(tree):
    assert found(str(tree / "[a-e]*")) == ["a.parquet", "b.csv", "e.TSV"]
    assert found(str(tree / "**" / "[a-e].csv*")) == ["b.csv", "d.csv.gz"]


def test_pattern_passes_over_the_hidden_files_that_a_folder_passes_over(tree):
    assert found(str(tree / "*")) == found(str(tree))


def test_pattern_keeps_the_folders_that_it_left_open(tree):
    (file,) = find_files([str(tree / "sub" / "*" / "d.*")])
    assert file.relative == Path("deep/d.csv.gz")


def test_file_whose_name_looks_like_a_pattern_is_taken_for_itself(tmp_path):
    write(tmp_path / "part[1].csv", "x\n1\n")
    write(tmp_path / "part1.csv", "x\n1\n")
    assert found(str(tmp_path / "part[1].csv")) == ["part[1].csv"]


def test_relative_inputs_are_found(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert found("b.csv", "b*.csv", "sub") == ["b.csv", "c.arrow", "d.csv.gz"]


def test_file_named_several_times_is_one_file(tree):
    assert found(tree / "b.csv", str(tree / "b*"), tree / "sub" / ".." / "b.csv") == ["b.csv"]


def test_file_and_link_to_it_are_one_file(tmp_path):
    write(tmp_path / "a.csv", "x\n1\n")
    (tmp_path / "b.csv").symlink_to(tmp_path / "a.csv")
    assert len(find_files([tmp_path])) == 1


def test_single_text_is_one_input_not_a_list_of_letters(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert [file.path.name for file in find_files("b.csv")] == ["b.csv"]


def test_folder_named_as_a_table_is_read_as_a_folder(tmp_path):
    write(tmp_path / "all.parquet" / "part-0.parquet", b"")
    assert found(tmp_path / "all.parquet") == ["part-0.parquet"]


@pytest.mark.parametrize("name", ["missing.csv", "missing", "missing/"])
def test_input_that_is_not_there_is_said_not_to_be_there(tmp_path, name):
    assert re.search("no such|not there|does not exist", refusal(lambda: find_files([f"{tmp_path}/{name}"])))


def test_input_without_table_names_the_kinds_that_are_read(tree):
    for given in (tree / "sub" / "notes.docx", tree / "*.docx", tree / ".git" / "none"):
        given.parent.mkdir(exist_ok=True)
        if given.name == "none":
            given.mkdir()
        message = refusal(lambda given=given: find_files([str(given)]))
        assert str(given) in message
        assert ".parquet" in message
        assert ".csv" in message


def test_nothing_asked_for_is_refused():
    with pytest.raises(DataError):
        read_table([])


# ---------------------------------------------------------------------- CSV: how it is written


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_delimiter_and_encoding_are_found_out(tmp_path, delimiter, encoding):
    path = write(tmp_path / "a.csv", "größe|ort|n\n1.5|Köln|1\n2.5|Zürich|2\n".replace("|", delimiter), encoding)
    assert TableFile.of(path).columns() == ["größe", "ort", "n"]
    whole = {"größe": [1.5, 2.5], "ort": ["Köln", "Zürich"], "n": [1, 2]}
    assert read(path).to_dict("list") == whole
    assert cells(path, ["größe", "ort", "n"], rows=1) == whole


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_cp1252_is_found_out_where_the_file_ends_with_a_letter_of_its_own(tmp_path, ending):
    path = write(tmp_path / "a.csv", "x,name\n1,café" + ending, "cp1252")
    assert read(path)["name"].tolist() == ["café"]


@pytest.mark.parametrize("name", ["a.csv.gz", "A.CSV.GZ", "a.tsv.gz"])
def test_gzipped_csv_is_read(tmp_path, name):
    path = write(tmp_path / name, "x\ty\n1\tä\n2\tb\n" if "tsv" in name else "x,y\n1,ä\n2,b\n")
    assert TableFile.of(path).columns() == ["x", "y"]
    assert read(path).to_dict("list") == {"x": [1, 2], "y": ["ä", "b"]}
    assert cells(path, ["x", "y"], rows=1) == {"x": [1, 2], "y": ["ä", "b"]}


@pytest.mark.parametrize("name", ["a.tsv", "A.TSV", "a.tsv.gz"])
def test_tab_is_the_delimiter_of_tsv_whatever_the_cells_hold(tmp_path, name):
    path = write(tmp_path / name, "x\ty\n1,5;2\t2,5;3\n")
    assert TableFile.of(path).resolved_format().delimiter == "\t"


def test_quoted_cells_may_hold_delimiters_newlines_and_quotes(tmp_path):
    path = write(tmp_path / "a.csv", 'x,note\n1,"two\nlines, and a comma"\n2,"a ""word"""\n3,plain\n')
    notes = ["two\nlines, and a comma", 'a "word"', "plain"]
    assert read(path)["note"].tolist() == notes
    assert cells(path, ["note", "x"], ("note",), rows=1) == {"note": notes, "x": [1, 2, 3]}


def test_header_may_hold_a_newline(tmp_path):
    path = write(tmp_path / "a.csv", '"power\n(kW)",x\n1,2\n')
    assert TableFile.of(path).columns() == ["power\n(kW)", "x"]
    assert cells(path, ["power\n(kW)"]) == {"power\n(kW)": [1]}


def test_blanks_after_the_delimiter_are_no_part_of_names_and_numbers(tmp_path):
    path = write(tmp_path / "a.csv", "x, y\n1, 2\n")
    assert TableFile.of(path).columns() == ["x", "y"]
    assert read(path).to_dict("list") == {"x": [1], "y": [2]}


def test_empty_lines_are_passed_over(tmp_path):
    path = write(tmp_path / "a.csv", "\nx,y\n1,2\n\n3,4\n\n")
    assert TableFile.of(path).columns() == ["x", "y"]
    assert read(path).to_dict("list") == {"x": [1, 3], "y": [2, 4]}


def test_byte_order_mark_is_no_part_of_the_first_name_when_utf8_was_asked_for(tmp_path):
    path = write(tmp_path / "a.csv", "x,y\n1,2\n", "utf-8-sig")
    assert TableFile.of(path, CsvFormat(encoding="utf-8")).columns() == ["x", "y"]


def test_column_without_a_name_is_read_under_the_name_it_is_listed_under(tmp_path):
    """pandas writes its index so."""
    path = tmp_path / "a.csv"
    pd.DataFrame({"x": [1.5, 2.5]}).to_csv(path)
    names = TableFile.of(path).columns()
    assert len(names) == 2
    assert list(read(path).columns) == names
    assert cells(path, names)["x"] == [1.5, 2.5]


def test_header_only_is_a_table_without_rows(tmp_path):
    for ending in ("\n", ""):
        path = write(tmp_path / "a.csv", "x,y" + ending)
        assert TableFile.of(path).columns() == ["x", "y"]
        assert read(path).shape == (0, 2)
        assert sum(len(batch.frame) for batch in batches(path, ["x", "y"])) == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("x;y\n1,5;1\n-2,25;2\n", [1.5, -2.25]),
        ("x;y\n1.234,5;1\n12,5;2\n", [1234.5, 12.5]),
        ("x;y\n1.234,5;1\n12.345,25;2\n", [1234.5, 12345.25]),
        ("x;y\n1.234.567;1\n12;2\n", [1234567, 12]),
        ('x,y\n"1,234",1\n"12,345.5",2\n', [1234, 12345.5]),
        ("x;y\n1,234.5;1\n-2,345,678;2\n", [1234.5, -2345678]),
        ("x;y\n1.234;1\n2.345;2\n", [1.234, 2.345]),
        ("x;y\n0,125;1\n0,250;2\n", [0.125, 0.25]),  # no thousand begins with 0
        ("x;y\n1,5E3;1\n2,5E-1;2\n", [1500, 0.25]),
        ("x;y\n1,5;1\nNA;2\n", [1.5, np.nan]),
        ("x;y\n1,5;1\n;2\n", [1.5, np.nan]),
    ],
)
def test_decimal_and_thousands_separators_are_found_out(tmp_path, content, expected):
    path = write(tmp_path / "a.csv", content)
    np.testing.assert_array_equal(np.asarray(read(path)["x"].tolist(), dtype=float), expected)
    np.testing.assert_array_equal(np.asarray(cells(path, ["x"])["x"], dtype=float), expected)


def test_dates_are_no_numbers_with_thousands(tmp_path):
    path = write(tmp_path / "a.csv", "x;day\n1,5;01.02.2024\n2,5;02.02.2024\n")
    assert read(path).to_dict("list") == {"x": [1.5, 2.5], "day": ["01.02.2024", "02.02.2024"]}


def test_format_that_was_given_wins_over_the_one_found_out(tmp_path):
    path = write(tmp_path / "a.csv", "x;y\n1,234;1\n2,345;2\n")
    assert read(path, decimal=",")["x"].tolist() == [1.234, 2.345]
    assert read(path, thousands=",")["x"].tolist() == [1234, 2345]
    other = write(tmp_path / "b.csv", "x;y\n1;caf\u00c3\n")  # valid as UTF-8, and as something else
    assert read(other, encoding="cp1252")["y"].tolist() == ["caf\u00c3\u0192"]
    assert TableFile.of(other, CsvFormat(delimiter="|")).columns() == ["x;y"]


def test_format_is_described_where_it_is_not_the_common_one(tmp_path):
    common = write(tmp_path / "a.csv", "x,y\n1.5,2\n")
    assert TableFile.of(common).resolved_format().describe() == ""
    other = write(tmp_path / "b.csv", "x;y\n1,5;é\n", "cp1252")
    words = TableFile.of(other).resolved_format().describe()
    assert "';'" in words
    assert "cp1252" in words
    assert "decimal ','" in words


def test_text_columns_stay_as_they_are_written(tmp_path):
    path = write(tmp_path / "a.csv", 'code,x\n007,1\n1e5,2\n"1,234",3\n1.50,4\nTrue,5\n')
    assert cells(path, ["code", "x"], ("code",), rows=2) == {
        "code": ["007", "1e5", "1,234", "1.50", "True"],
        "x": [1, 2, 3, 4, 5],
    }


def test_row_longer_than_the_header_is_refused_however_the_file_is_read(tmp_path):
    """An unquoted comma shifts the cells of its row: they must not be scored under the wrong names."""
    path = write(tmp_path / "a.csv", "x,y,z\n1,2,3\n1,5,2,3\n4,5,6\n")
    for call in (lambda: read(path), lambda: batches(path, ["x", "y", "z"])):
        message = refusal(call)
        assert str(path) in message
        assert "line 3" in message


def test_csv_longer_than_the_sample_is_read_to_its_end(tmp_path):
    n = SAMPLE_BYTES // 8
    path = write(tmp_path / "a.csv", "x,name\n" + "".join(f"{i},ü{i:06d}\n" for i in range(n)))
    assert path.stat().st_size > SAMPLE_BYTES
    got = cells(path, ["name", "x"], ("name",), rows=10_000)
    assert got["x"] == list(range(n))
    assert got["name"][-1] == f"ü{n - 1:06d}"


# ---------------------------------------------------------------------- Parquet and Arrow


def test_parquet_batches_hold_the_file_in_its_order(tmp_path, numbers):
    path = tmp_path / "a.parquet"
    numbers.to_parquet(path, row_group_size=7)
    parts = batches(path, ["n", "x"], rows=10)
    assert [part.start for part in parts] == list(np.cumsum([0, *(len(part.frame) for part in parts[:-1])]))
    assert max(len(part.frame) for part in parts) <= 10
    assert [part.done for part in parts] == sorted(part.done for part in parts)
    assert parts[-1].done == 1.0
    assert cells(path, ["n", "x"], rows=10) == numbers[["n", "x"]].to_dict("list")


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_file_and_stream_are_read(tmp_path, numbers, new):
    path = write_arrow(tmp_path / "a.arrow", pa.Table.from_pandas(numbers), new, rows=10)
    assert TableFile.of(path).columns() == ["x", "n", "name"]
    assert read(path).to_dict("list") == numbers.to_dict("list")
    parts = batches(path, ["name", "x"], rows=4)
    assert max(len(part.frame) for part in parts) <= 4
    assert [part.start for part in parts] == list(np.cumsum([0, *(len(part.frame) for part in parts[:-1])]))
    assert parts[-1].done == 1.0
    assert cells(path, ["name", "x"], rows=4) == numbers[["name", "x"]].to_dict("list")


@pytest.mark.parametrize("compression", ["lz4", "zstd", "uncompressed"])
def test_feather_is_read(tmp_path, numbers, compression):
    numbers.to_feather(tmp_path / "a.feather", compression=compression)
    assert cells(tmp_path / "a.feather", ["x", "n"]) == numbers[["x", "n"]].to_dict("list")


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_tables_without_rows_have_their_columns(tmp_path, numbers, new):
    empty = pa.Table.from_pandas(numbers.head(0), preserve_index=False)
    paths = [write_arrow(tmp_path / "a.arrow", empty, new)]
    with new(tmp_path / "b.arrow", empty.schema) as sink:  # a batch without rows, not no batch
        sink.write_batch(pa.RecordBatch.from_pandas(numbers.head(0), preserve_index=False))
    pq.write_table(empty, tmp_path / "c.parquet")
    for path in [*paths, tmp_path / "b.arrow", tmp_path / "c.parquet"]:
        assert list(read(path).columns) == ["x", "n", "name"]
        parts = batches(path, ["n", "x"])
        assert parts, path
        assert all(list(part.frame.columns) == ["n", "x"] and not len(part.frame) for part in parts)


def test_whole_numbers_stay_whole_where_cells_are_missing(tmp_path):
    pq.write_table(pa.table({"n": pa.array([1, None, 3])}), tmp_path / "a.parquet")
    (part,) = batches(tmp_path / "a.parquet", ["n"])
    assert pd.api.types.is_integer_dtype(part.frame["n"].dtype)
    assert part.frame["n"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize("suffix", ["parquet", "feather"])
def test_column_that_pandas_had_as_its_index_is_a_column(tmp_path, numbers, suffix):
    path = tmp_path / f"a.{suffix}"
    table = pa.Table.from_pandas(numbers.set_index("name"))
    pq.write_table(table, path) if suffix == "parquet" else write_arrow(path, table)
    names = TableFile.of(path).columns()
    assert set(names) == {"x", "n", "name"}
    assert set(read(path).columns) == {"x", "n", "name"}
    (part,) = batches(path, ["name", "x"])
    assert part.frame["name"].tolist() == numbers["name"].tolist()


# ---------------------------------------------------------------------- several files as one table


def test_files_of_several_kinds_become_one_table(tmp_path, numbers):
    numbers[:10].to_parquet(tmp_path / "a.parquet")
    numbers[10:20][["name", "n", "x"]].to_csv(tmp_path / "b.csv", index=False)  # another order of columns
    numbers[20:].reset_index(drop=True).to_feather(tmp_path / "c.feather")
    table = read_table([tmp_path])
    assert list(table.columns) == ["x", "n", "name"]
    assert table.index.equals(pd.RangeIndex(25))
    assert table.to_dict("list") == numbers.to_dict("list")


def test_numbers_stay_numbers_beside_a_file_without_rows(tmp_path):
    write(tmp_path / "a.csv", "x,name\n")
    write(tmp_path / "b.csv", "x,name\n1.5,a\n")
    table = read_table([tmp_path])
    assert pd.api.types.is_numeric_dtype(table["x"].dtype)
    assert table.to_dict("list") == {"x": [1.5], "name": ["a"]}


def test_codes_are_text_in_every_file_when_they_are_text_in_one(tmp_path):
    write(tmp_path / "a.csv", "code,x\n007,1\n008,2\n")
    write(tmp_path / "b.csv", "code,x\nA1,3\n")
    assert read_table([tmp_path])["code"].tolist() == ["007", "008", "A1"]


def test_file_with_other_columns_is_named_with_what_differs(tmp_path):
    write(tmp_path / "a.csv", "x,y\n1,2\n")
    write(tmp_path / "b.csv", "x,z\n1,2\n")
    message = refusal(lambda: read_table([tmp_path]))
    assert str(tmp_path / "a.csv") in message
    assert str(tmp_path / "b.csv") in message
    assert "'y'" in message
    assert "'z'" in message


# ---------------------------------------------------------------------- refusals


def damaged_parquet(path: Path, numbers: pd.DataFrame) -> Path:
    numbers.to_parquet(path)
    return write(path, path.read_bytes()[:-20])


def twice_the_same_name(path: Path) -> Path:
    table = pa.table([[1.0], [2.0], [3.0]], names=["x", "n", "x"])
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    return write_arrow(path, table)


BAD: dict[str, Callable[[Path, pd.DataFrame], Path]] = {
    "empty csv": lambda folder, _: write(folder / "a.csv", ""),
    "empty parquet": lambda folder, _: write(folder / "a.parquet", b""),
    "empty arrow": lambda folder, _: write(folder / "a.arrow", b""),
    "only newlines": lambda folder, _: write(folder / "a.csv", "\n\n\n"),
    "no parquet": lambda folder, _: write(folder / "a.parquet", "x,y\n1,2\n" * 10),
    "cut parquet": lambda folder, numbers: damaged_parquet(folder / "a.parquet", numbers),
    "no arrow": lambda folder, _: write(folder / "a.arrow", "x,y\n1,2\n" * 10),
    "no gzip": lambda folder, _: write(folder / "b.csv", "x,n\n1,2\n").rename(folder / "a.csv.gz"),
    "empty gzip": lambda folder, _: write(folder / "a.csv.gz", ""),
    "cut gzip": lambda folder, numbers: cut_gzip(folder / "a.csv.gz", numbers),
    "damaged gzip": lambda folder, numbers: damaged_gzip(folder / "a.csv.gz", numbers),
    "no text": lambda folder, _: write(folder / "a.csv", bytes(range(256)) * 20),
    "not utf-8 late": lambda folder, _: write(folder / "a.csv", b"x,n\n" + b"1,a\n" * SAMPLE_BYTES + b"1,\xe9\n"),
    "quote left open": lambda folder, _: write(folder / "a.csv", 'x,n\n1,"a\n' + "1,a\n" * SAMPLE_BYTES),
    "copied name csv": lambda folder, _: write(folder / "a.csv", "x,n,x\n1,2,3\n"),
    "copied name parquet": lambda folder, _: twice_the_same_name(folder / "a.parquet"),
    "copied name arrow": lambda folder, _: twice_the_same_name(folder / "a.arrow"),
}


def cut_gzip(path: Path, numbers: pd.DataFrame) -> Path:
    write(path, numbers.to_csv(index=False))
    path.write_bytes(path.read_bytes()[:-30])
    return path


def damaged_gzip(path: Path, numbers: pd.DataFrame) -> Path:
    write(path, numbers.to_csv(index=False))
    content = bytearray(path.read_bytes())
    content[40:80] = bytes(40)
    path.write_bytes(content)
    return path


REMEDY = re.compile(
    r"write it|take it away|rename|convert|give|choose|drop|correct|replace|copy|check|download|leave|close|remove"
)


@pytest.mark.parametrize("what", BAD)
def test_refused_file_is_named_with_a_remedy_however_it_is_read(tmp_path, numbers, what):
    path = BAD[what](tmp_path, numbers)
    for call in (lambda: read_table([path]), lambda: batches(path, ["x", "n"])):
        message = refusal(call)
        assert message.startswith(str(path)), message
        assert REMEDY.search(message.removeprefix(str(path))), message
        assert "\n" not in message
        assert len(message) < 500


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.feather"])
def test_column_that_is_not_there_is_refused_by_name(tmp_path, numbers, name):
    path = tmp_path / name
    {"csv": numbers.to_csv, "parquet": numbers.to_parquet, "feather": numbers.to_feather}[name.split(".")[1]](path)
    message = refusal(lambda: batches(path, ["absent"]))
    assert str(path) in message
    assert "absent" in message


def test_encoding_that_does_not_fit_or_exist_is_refused_with_the_file(tmp_path):
    path = write(tmp_path / "a.csv", "x,name\n1,café\n", "cp1252")
    for encoding in ("utf-8", "ascii", "no-such-encoding"):
        message = refusal(lambda encoding=encoding: read(path, encoding=encoding))
        assert str(path) in message
        assert encoding in message
        assert "encoding" in message.replace(encoding, "")


def test_byte_that_is_no_text_is_counted_from_the_start_of_the_file(tmp_path):
    content = b"x,name\n" + b"1,abcdefgh\n" * (SAMPLE_BYTES // 8) + b"1,caf\xe9\n"
    message = refusal(lambda: read(write(tmp_path / "a.csv", content)))
    place = content.index(b"\xe9")
    assert f"{place:,}" in message


def test_file_that_vanished_is_refused_by_name(tmp_path):
    path = write(tmp_path / "a.csv", "x\n1\n")
    file = TableFile.of(path)
    path.unlink()
    for call in (file.columns, file.read_raw, lambda: list(file.batches(Wanted(["x"]), 10))):
        assert str(path) in refusal(call)


def test_long_whole_numbers_are_exact_or_text(tmp_path):
    big = [2**53, 2**53 + 1, 2**53 + 3]
    table = read(write(tmp_path / "a.csv", "n,id\n" + "".join(f"{n},{10**20 + i}\n" for i, n in enumerate(big))))
    assert table["n"].tolist() == big
    assert table["id"].tolist() == [str(10**20 + i) for i in range(3)]
    gaps = read(write(tmp_path / "b.csv", f"n,x\n{big[1]},1\n,2\n"))
    assert gaps["n"].iloc[0] == big[1]
    assert gaps["n"].isna().tolist() == [False, True]


def test_tables_in_linked_folders_are_found_once(tmp_path):
    write(tmp_path / "data" / "a.csv", "x\n1\n")
    write(tmp_path / "real" / "b.csv", "x\n1\n")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "round").symlink_to(tmp_path / "data")
    assert [file.relative.as_posix() for file in find_files(tmp_path / "data")] == ["a.csv", "linked/b.csv"]


def test_files_that_are_no_tables_by_their_name_are_mentioned(tmp_path):
    write(tmp_path / "a.csv", "x\n1\n")
    write(tmp_path / "part-000", "x\n1\n")
    with pytest.warns(UserWarning, match=r"1 file.* passed over.*part-000"):
        find_files(tmp_path)


def test_known_levels_are_taken_as_they_stand(tmp_path):
    path = write(tmp_path / "a.csv", "g,x\na  ,1\nNA,2\n b,3\nnull,4\n")
    (part,) = TableFile.of(path).batches(Wanted(["g", "x"], (), {"g": frozenset({"a  ", "NA"})}), 100)
    assert part.frame["g"].tolist()[:3] == ["a  ", "NA", "b"]
    assert part.frame["g"].isna().tolist() == [False, False, False, True]
