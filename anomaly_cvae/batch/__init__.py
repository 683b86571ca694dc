"""Tables in files, of any size: read, score, write; nothing is lost when the job is killed."""

from anomaly_cvae.batch.csv_text import CsvFormat
from anomaly_cvae.batch.local import ScoreOptions, score_files
from anomaly_cvae.batch.pictures import OnFault
from anomaly_cvae.batch.places import shown
from anomaly_cvae.batch.results import FileResult, Summary
from anomaly_cvae.batch.source import find_files, read_table
from anomaly_cvae.batch.table_file import TableFile

__all__ = [
    "CsvFormat",
    "FileResult",
    "OnFault",
    "ScoreOptions",
    "Summary",
    "TableFile",
    "find_files",
    "read_table",
    "score_files",
    "shown",
]
