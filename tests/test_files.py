"Files as bytes and tables: compression, size limits, content that is not data, broken lines, numbers and times."
import errno
import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryptopredict.files import (
    SourceError,
    check_lines,
    epoch_times,
    iso_times,
    known_repairs,
    list_files,
    read_bytes,
    read_table,
    shorten,
    text_lines,
    to_number,
    utc_dates,
    utc_times,
)


def utc(text: str) -> pd.Timestamp:
    return pd.Timestamp(text, tz="UTC")


def column(*fields) -> pd.Series:
    "A column of a file whose first row is line 2."
    return pd.Series(fields, name="t", index=range(2, 2 + len(fields)))


def zipped(name: str, text: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive: archive.writestr(name, text)
    return packed.getvalue()


def encrypted() -> bytes:
    "A zip whose member carries the flag of encryption."
    data = bytearray(zipped("a.csv", "1,2\n"))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)): data[data.find(mark) + at] |= 1
    return bytes(data)


# --- bytes ---------------------------------------------------------------------------------------------------------------


def test_an_error_names_file_row_column_and_remedy():
    message = str(SourceError("a.csv", "is 0, not a price", "Repair it", 7, "low"))
    assert message == "a.csv, row 7, column 'low': is 0, not a price. Repair it."


def test_text_in_messages_is_shortened_to_one_line():
    assert [shorten("a\nb"), len(shorten("x" * 10**6)), shorten(" " * 999)] == ["a b", 60, "..."]


def test_compression_is_recognised_by_content(sample):
    assert read_bytes(sample(gzip.compress(b"1,2"))) == (b"1,2", "")
    assert read_bytes(sample(zipped("BTCUSDT-1h-2024-12.csv", "1,2"))) == (b"1,2", "BTCUSDT-1h-2024-12.csv")


@pytest.mark.parametrize("content, message", [(gzip.compress(b"1,2\n" * 999)[:30], "damaged"), (b"PK\x03\x04", "damaged"),
                                              (encrypted(), "encrypted")], ids=["cut gzip", "cut zip", "encrypted zip"])
def test_a_damaged_archive_is_named(sample, content, message):
    with pytest.raises(SourceError, match=f"sample.csv: .*{message}"): read_bytes(sample(content))


def test_a_disk_that_fails_is_not_called_damage(sample, monkeypatch):
    def fails(*args): raise OSError(errno.EIO, "Input/output error")
    path = sample("1,2")
    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(SourceError, match="sample.csv: cannot be read: Input/output error. Check the disk"): read_bytes(path)


def test_the_message_of_the_size_limit_depends_on_compression(sample):
    large = b"0" * 2**21
    for content, message in ((large, "holds more than 1 MiB[.]"), (gzip.compress(large), "more than 1 MiB when decompressed")):
        with pytest.raises(SourceError, match=message): read_bytes(sample(content), 2**20)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(SourceError, match="nowhere.csv: there is no such file"): read_bytes(tmp_path / "nowhere.csv")


# --- lines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa,b\r\n1,2\r\n", b"a,b\r1,2\n\n"])
def test_line_ends_of_any_system_are_accepted(content):
    assert text_lines("x", content) == b"a,b\n1,2"


@pytest.mark.parametrize("content, message", [(b"", "is empty"), (b"\n\n", "is empty"), (b"1,\x002", "NUL"),
                                              (b"a\n\xe91", "row 2: is not UTF-8")])
def test_content_that_is_not_text_is_refused(content, message):
    with pytest.raises(SourceError, match=message): text_lines("x", content)


@pytest.mark.parametrize("content, message", [
    (b"a" * 10**6 + b",b\n1,2", "row 1: is longer than"), (b"a,b\n1," + b"2" * 2**16, "row 2: is longer than"),
    (b"a,b\n1,2\n3,4,5", "row 3: has 3 fields, row 1 has 2 fields"), (b"a,b\n1,2\n\n3,4", "row 3: is empty, row 1 has 2 fields"),
    (b'a,b\n"1,2\n3,4', "row 2: has a quote that is not closed"), (b'a,b\n1,2\n"1,234.5"', "row 3: has a comma inside quotes")])
def test_the_first_broken_line_is_named(content, message):
    with pytest.raises(SourceError, match=message): check_lines("x", content)


# --- tables --------------------------------------------------------------------------------------------------------------


def test_rows_are_numbered_as_in_the_file(sample):
    assert read_table(sample("a,b\n1,.\n3,4")).frame.index.tolist() == [2, 3]
    assert read_table(sample("1,2\n3,4")).header == []
    three = read_table(sample("Price,Close,Open\nTicker,DX-Y.NYB,DX-Y.NYB\nDate,,\n2024-01-02,102.2,101.4\n"))
    assert (three.ticker, three.header, three.frame.index.tolist()) == ("DX-Y.NYB", ["Date", "Close", "Open"], [4])


def test_parquet_and_feather_become_the_same_table(tmp_path):
    hours = pd.date_range("2024-01-01", periods=2, freq="h", tz="UTC", name="date")
    frame = pd.DataFrame(dict(close=[42350., 42400.]), index=hours)
    frame.to_parquet(tmp_path / "bars.parquet")
    frame.reset_index().to_feather(tmp_path / "bars.feather")
    for name in ("bars.parquet", "bars.feather"): assert read_table(tmp_path / name).frame["close"].tolist() == [42350., 42400.]


@pytest.mark.parametrize("content, message", [
    ("a,b", "a header and no rows"), ("Price,Close,Close\nTicker,A,B\nDate,,\n1,2,3", "several tickers: A, B"),
    (b"PAR1 and no more", "cannot be read"),
    ("ts,Close,close\n1,2,3", "row 1, column 'close': column names 'Close' and 'close' differ only in case"),
    ("ts,close,close\n1,2,3", "row 1, column 'close': two columns are named 'close'")])
def test_a_table_that_cannot_be_read_is_refused(sample, content, message):
    with pytest.raises(SourceError, match=message): read_table(sample(content))


@pytest.mark.parametrize("name, message", [("nowhere", "no such directory"), ("empty", "holds no .csv")])
def test_a_folder_without_data_is_refused(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=message): list_files(tmp_path / name)


# --- numbers and times -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_the_unit_of_a_unix_time_is_inferred(unit):
    assert epoch_times("x", column(1735689600 * unit))[2] == utc("2025-01-01")


@pytest.mark.parametrize("wrong", [-5, 9e18, 13811004000, np.nan, 20240101, 1735689600.5])
def test_a_number_that_is_not_a_unix_time_is_named(wrong):
    with pytest.raises(SourceError, match="row 2, column 't': .* not a unix time"): epoch_times("x", column(wrong))


def test_a_date_written_as_a_number_is_recognised():
    with pytest.raises(SourceError, match="If it is a date, write it as 2024-01-31"): epoch_times("x", column(20240131))


def test_a_field_that_is_not_a_number_is_named():
    with pytest.raises(SourceError, match="row 3, column 't': is 'abc', not a number"): to_number("x", column("1", "abc"))


def test_offsets_are_read_per_row():
    texts = pd.Series(["2013-01-25T23:00:00Z", "2024-01-01 00:00+02:00", "2024-01-01 00:00+02", "2024-02-29"])
    times, zones = iso_times("x", texts, "")
    assert times.tolist() == [utc("2013-01-25 23:00"), *[utc("2023-12-31 22:00")] * 2, utc("2024-02-29")]
    assert zones.tolist()[:3] + [zones.isna()[3]] == ["Z", "+02:00", "+02", True]


@pytest.mark.parametrize("wrong", ["2023-02-29", "2924-01-01", None])
def test_a_text_that_is_not_a_time_is_named(wrong):
    with pytest.raises(SourceError, match="row 3, column 't': .* is not an ISO 8601 time .*Write it as 2024-01-31"):
        iso_times("x", column("2023-02-28", wrong), "2024-01-31")


@pytest.mark.parametrize("text, message", [("2024-01-01 02:00", "has no time zone. If it is UTC"),
                                           ("2024-01-01 01:00+02:00", "is not UTC"),
                                           ("31/12/2024", "is not an ISO 8601 time")])
def test_a_time_that_is_not_utc_is_named(text, message):
    with pytest.raises(SourceError, match=f"row 3, column 't': .*{message}"):
        utc_times("x", column("2024-01-01 00:00Z", text), (), {})


def test_a_time_in_utc_needs_no_repair():
    times = utc_times("x", column("2024-01-01 01:00:00+00:00", "2024-01-01T02:00Z"), (), {})
    assert times.tolist() == [utc("2024-01-01 01:00"), utc("2024-01-01 02:00")]


def test_typed_times_need_a_zone_too():
    typed = pd.Series(pd.to_datetime(["2024-01-01 01:00"]), name="t", index=[1])
    with pytest.raises(SourceError, match="has no time zone"): utc_times("x", typed, (), {})
    assert utc_times("x", typed.dt.tz_localize("UTC"), (), {}).tolist() == [utc("2024-01-01 01:00")]


def test_dates_are_utc_days():
    dates = utc_dates("x", pd.Series(["2024-02-29", "2013-01-25 23:00:00"]))
    assert dates.tolist() == [utc("2024-02-29"), utc("2013-01-25 23:00")]
    with pytest.raises(SourceError, match="row 3, column 't': time .* is not UTC"):
        utc_dates("x", column("2024-01-01", "2024-01-02T00:00+02:00"))


def test_repairs_are_checked_by_name():
    assert [known_repairs(r) for r in ("sort", iter(["sort"]), ())] == [("sort",), ("sort",), ()]
    with pytest.raises(ValueError, match="unknown repair"): known_repairs(["guess"])
