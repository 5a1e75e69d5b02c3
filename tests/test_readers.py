"Readers: the period of a row, the time at which it is known, and the file, row and column of every fault."
import gzip
import io
import re
import zipfile

import pandas as pd
import pytest
from numpy.testing import assert_allclose

from cryptopredict.checks import HOUR
from cryptopredict.files import SourceError
from cryptopredict.readers import (
    KLINE_COLUMNS,
    check_daily_rows,
    check_hourly_bars,
    interval_in,
    next_business_day,
    next_release_monday,
    read,
    read_binance,
    read_blockchaincom,
    read_coinmetrics,
    read_fred,
    read_kraken,
    read_yahoo,
)

KRAKEN = "1381093200,122.0,122.0,122.0,122.0,0.1,1\n1381176000,123.61,124,123.61,123.61,0.1,1\n"
KLINES = ("1518044400000,8000,8100,7900,8050,10,1518047999999,1,1,1,1,0\n"
          "1518048000000,8000,8100,7900,8050,10,1518051599999,1,1,1,1,0")
MIXED = ("1735686000000,93000.1,93100,92900,93050,12.5,1735689599999,1,2,3,4,0\n"  # milliseconds, then microseconds
         "1735689600000000,93050,93200,93000,93150,11.5,1735693199999999,1,2,3,4,0\n")
HEADED = ("ts,open,high,low,close,volume\n2024-12-31 23:00:00+00:00,93000.1,93100,92900,93050,12.5\n"
          "2025-01-01 00:00:00+00:00,93050,93200,93000,93150,11.5\n")
CCXT = "timestamp,open,high,low,close,volume\n1704067200000,42300,42400,42200,42350,10\n1704070800000,42350,42500,42300,42400,12"
TRADING_VIEW = ("time,close,open,high,low,Volume MA,Volume\n2024-01-01T00:00:00Z,42350,42300,42400,42200,,10\n"
                "2024-01-01T01:00:00Z,42400,42350,42500,42300,,12")
DATED = ("date,open,high,low,close,volume\n2024-01-01 00:00:00+00:00,42300,42400,42200,42350,10\n"
         "2024-01-01 01:00:00+00:00,42350,42500,42300,42400,12\n")
FRED = "observation_date,DGS10\n2024-01-12,3.96\n2024-01-15,\n2024-01-16,4.07\n"
YAHOO = "Date,Close,High,Low,Open,Volume\n2024-07-03,105.4,105.8,105.1,105.7,0\n2024-12-31,108.49,108.58,107.87,108.1,0\n"
THREE = "Price,Close,High,Low,Open,Volume\nTicker" + ",DX-Y.NYB" * 5 + "\nDate,,,,,\n" + YAHOO.split("\n", 1)[1]
UTXO = "2013-01-25 23:00:00,3233127.0\n2013-01-27 04:00:00,3244591.0\n"
CHAIN = ("time,AdrActCnt,AssetEODCompletionTime,BlkCnt,HashRate,TxCnt\n2020-05-01,7,1614334883,144,100,3\n"
         "2022-05-01,8,1651467600,144,200,4\n2022-05-02,9,,144,200,5\n")


def utc(text: str) -> pd.Timestamp:
    return pd.Timestamp(text, tz="UTC")


def days(*text: str) -> pd.DataFrame:
    return pd.DataFrame(dict(value_time=[utc(t) for t in text]))


def spaced(begin: str, periods: int, freq: str) -> pd.Series:
    return pd.Series(pd.date_range(begin, periods=periods, freq=freq, tz="UTC"))


def zipped(name: str, text: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive: archive.writestr(name, text)
    return packed.getvalue()


# --- the period of a row -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freq, name", [("15min", "15m"), ("4h", "4h"), ("7D", "7d"), ("2h", "2h")])
@pytest.mark.parametrize("n", [4, 20])
def test_bars_of_another_interval_are_refused(freq, name, n):
    with pytest.raises(SourceError, match=f"bars are {name} apart"): check_hourly_bars("x", spaced("2024-01-01", n, freq), None)


@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_hourly_bars_pass(n):
    check_hourly_bars("x", spaced("2024-01-01", n, "h"), None)


def test_hours_without_a_trade_may_be_absent():
    check_hourly_bars("x", pd.Series([utc("2013-10-06 21:00"), utc("2013-10-07 20:00"), utc("2013-10-08 05:00")]), None)


@pytest.mark.parametrize("n, closes, name, message", [
    (5, None, "", "row 2, column 'value_time': bars are 1d apart from here on, expected 1h"),
    (1, 4, "", "row 1: the bar lasts 4h"),
    (1, None, "BTCUSDT-1d-2024-01-01.csv", "row 1: the interval in the file name is 1d, expected 1h")])
def test_a_daily_bar_is_named(n, closes, name, message):
    day = spaced("2024-01-01", n, "D").set_axis(range(1, n + 1))
    with pytest.raises(SourceError, match=message): check_hourly_bars("x", day, closes and day + closes * HOUR, name)


def test_a_name_may_state_the_interval():
    names = {"BTCUSDT-1h-2024-11": "1h", "XBTUSD_1440": "1d", "BTC_USDT-4h": "4h", "bars": "", "kraken_XBTUSD_60": "1h",
             "BTC_daily": "1d"}
    assert {name: interval_in(name) for name in names} == names


@pytest.mark.parametrize("freq", ["7D", "30D", "MS", "QS", "YS"])
@pytest.mark.parametrize("n", [2, 3, 12])
def test_a_series_that_is_not_daily_is_refused(freq, n):
    with pytest.raises(SourceError, match="apart; a daily series"): check_daily_rows("x", spaced("2020-01-01", n, freq))


@pytest.mark.parametrize("times, message", [
    (spaced("2024", 9, "h"), "1h apart"), (spaced("2023-06-01", 2, "MS"), "a month apart"),  # the second is a Saturday
    (spaced("2023-07-08", 1, "D"), "one row, dated Saturday"), (spaced("2023-06-01", 1, "MS"), "one row, dated Thursday")])
def test_a_business_series_that_is_not_daily_is_refused(times, message):
    with pytest.raises(SourceError, match=message): check_daily_rows("x", times, business=True)


@pytest.mark.parametrize("kept", [slice(None), slice(None, None, 4), [0], [*range(5), *range(12, 40)], [0, 39]],
                         ids=["all", "every fourth", "one", "a week missing", "first and last"])
def test_a_daily_series_with_gaps_passes(kept):
    check_daily_rows("x", spaced("2024-01-01", 40, "D").iloc[kept])


# --- when a row is known -----------------------------------------------------------------------------------------------------


def test_yields_are_known_on_the_next_business_day():
    # Friday; before Martin Luther King Day; summer time; before Juneteenth; Veterans Day, a Saturday kept on Friday; Thanksgiving
    table = days("2024-01-05", "2024-01-12", "2024-07-10", "2024-06-18", "2023-11-09", "2023-11-22")
    assert next_business_day(table).tolist() == [
        utc("2024-01-08 21:15"), utc("2024-01-16 21:15"), utc("2024-07-11 20:15"), utc("2024-06-20 20:15"),
        utc("2023-11-13 21:15"), utc("2023-11-24 21:15")]


def test_the_broad_dollar_index_is_known_on_the_next_monday():
    # two weeks, the second before Labor Day; Christmas and New Year on a Monday
    table = days("2024-08-19", "2024-08-23", "2024-08-26", "2024-08-30", "2023-12-22", "2023-12-29")
    assert next_release_monday(table).tolist() == [
        *[utc("2024-08-26 20:15")] * 2, *[utc("2024-09-03 20:15")] * 2, utc("2023-12-26 21:15"), utc("2024-01-02 21:15")]


def test_a_bar_cut_short_is_known_at_its_own_close(sample):
    late = "\n1518053294789,8200,8250,8100,8210,9,1518056894788,1,1,1,1,0"  # opens at 01:28:14.789
    table = read_binance(sample(KLINES + late))
    assert table.available_at.iloc[-1] == utc("2018-02-08 02:28:14.789") and table.attrs["notes"] == ["opened off the hour: 1"]


def test_a_users_rule_replaces_the_default(sample):
    late = read_kraken(sample(KRAKEN), available_at=lambda t: t.value_time + pd.Timedelta("2h"))
    assert late.available_at[0] == utc("2013-10-06 23:00")


def test_a_completion_time_must_lie_shortly_after_the_day(sample):
    table = read_coinmetrics(sample(CHAIN, "btc.csv"))  # a back-fill, a real one, none
    assert table.available_at.tolist() == [utc("2020-05-03"), utc("2022-05-02 05:00"), utc("2022-05-04")]
    early = CHAIN.replace("1651467600", "1651440000")  # before the day is over
    assert read_coinmetrics(sample(early)).available_at[1] == utc("2022-05-03")


# --- bars --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [
    HEADED, gzip.compress(HEADED.encode()), zipped("BTCUSDT-1h-2024-12.csv", ",".join(KLINE_COLUMNS) + "\n" + MIXED),
    re.sub(r"([^,\n]+)", r'"\1"', MIXED)], ids=["header", "gzip", "zip", "quoted"])
def test_the_same_bars_in_another_form_give_the_same_table(sample, content):
    klines = read_binance(sample(MIXED))
    assert klines.value_time.tolist() == [utc("2024-12-31 23:00"), utc("2025-01-01 00:00")]
    pd.testing.assert_frame_equal(read_binance(sample(content)), klines)


def test_columns_are_found_by_name(sample):
    pd.testing.assert_frame_equal(read_binance(sample(CCXT)), read_binance(sample(TRADING_VIEW)))


def test_repairs_of_times_are_counted(sample):
    assert read_binance(sample(HEADED.replace("+00:00", "")), repairs=("assume_utc",)).attrs["repairs"] == dict(assume_utc=2)


def test_two_clocks_that_disagree_are_refused(sample):
    two = "unix,date,open,high,low,close,volume\n1704067200,2024-01-01T03:00:00Z,42300,42400,42200,42350,10"
    with pytest.raises(SourceError, match="row 2, column 'date': is .*, but column 'unix' is"): read(sample(two))


def test_swapped_volumes_are_refused(sample):
    swapped = "open_time,open,high,low,close,volume,quote_volume\n1704067200000,42300,42400,42200,42350,423500,10"
    with pytest.raises(SourceError, match="row 2, column 'volume': .*base and quote volume are swapped"): read(sample(swapped))


FAULTS = {  # old text|new text in the Kraken sample -> message
    "122.0,122.0,122.0,0.1|122.0,0,122.0,0.1": "row 1, column 'low': 0.0 is not a price",
    "1381093200,122.0|1381093200,": "row 1, column 'open': is empty",
    "124|1.24": "row 2, column 'high': 1.24 lies below", "124|inf": "row 2, column 'high': inf is not a price",
    "123.61,124|123.61,abc": "row 2, column 'high': is 'abc', not", "124,123.61|124,": "row 2, column 'low': is empty",
    "0.1,1\n1381176000|0.1,1\n1381093200": "row 2, column 'value_time': .*repeats the time",
    "1381176000|1381089600": "row 2, column 'value_time': .*comes before the row above",
    "1381176000|x": "row 2, column 'time': is 'x', not a number",
    "123.61,0.1,1|123.61,-1,1": "row 2, column 'volume': -1.0 is not a volume"}


@pytest.mark.parametrize("change", FAULTS, ids=lambda change: FAULTS[change])
def test_a_fault_in_a_bar_names_row_and_column(sample, change):
    assert KRAKEN != (faulty := KRAKEN.replace(*change.split("|")))
    with pytest.raises(SourceError, match="sample.csv, " + FAULTS[change]): read_kraken(sample(faulty))


# --- daily series ------------------------------------------------------------------------------------------------------------


def test_a_fred_file_may_have_any_of_its_headers(sample):
    table = read_fred(sample(FRED))
    pd.testing.assert_frame_equal(table, read_fred(sample(FRED.replace("observation_date", "DATE").replace("15,\n", "15,.\n"))))
    pd.testing.assert_frame_equal(table, read_fred(sample(FRED.replace("observation_date,DGS10", "date,value"), "DGS10.csv")))


def test_one_header_line_of_yahoo_or_three_give_the_same_table(sample):
    table = read_yahoo(sample(YAHOO, "DX-Y.NYB.csv"))
    assert table.available_at.tolist() == [utc("2024-07-03 21:15"), utc("2024-12-31 22:15")]
    pd.testing.assert_frame_equal(read_yahoo(sample(THREE, "quotes.csv")), table)
    assert read_yahoo(sample(YAHOO, "BTC-USD.csv")).available_at[0] == utc("2024-07-04")  # its day ends at midnight UTC


@pytest.mark.parametrize("offset", ["-05:00", "+01:00"])
def test_a_quote_belongs_to_the_day_as_written(sample, offset):
    moved = read_yahoo(sample(YAHOO.replace("12-31", f"12-31 00:00:00{offset}"), "DX-Y.NYB.csv"))
    pd.testing.assert_frame_equal(moved, read_yahoo(sample(YAHOO, "DX-Y.NYB.csv")))


@pytest.mark.parametrize("name, text, message", [
    ("quotes.csv", YAHOO.replace("108.58", "100"), "row 3, column 'high'"),
    ("DXY.csv", "Date,Open,High,Low,Close\n2024-01-02,12,12,12,12", "is not that of the dollar index"),
    ("DX-Y.NYB.csv", THREE.replace(",DX-Y.NYB", ",DOGE-USD"), "DX-Y.*states DXY, the ticker DOGE-USD"),
    ("quotes.csv", "Date,Open,High,Low,Close\n2024-01-02 01:00,1,1,1,1\n2024-01-02 02:00,1,1,1,1", "has several rows per day")])
def test_quotes_that_cannot_be_right_are_refused(sample, name, text, message):
    with pytest.raises(SourceError, match=message): read_yahoo(sample(text, name))


def test_a_chart_may_have_a_header(sample):
    table = read_blockchaincom(sample(UTXO))
    assert table.available_at.tolist() == [utc("2013-01-27"), utc("2013-01-29")]
    pd.testing.assert_frame_equal(table, read_blockchaincom(sample("\ufeffTimestamp,utxo-count\n" + UTXO)))
    with pytest.raises(SourceError, match="row 2, column 'value': -1.0 is negative"):
        read_blockchaincom(sample(UTXO.replace("3244591.0", "-1")))


def test_hash_rate_and_difficulty_follow_from_each_other(sample):
    assert_allclose(read_coinmetrics(sample(CHAIN, "btc.csv")).DiffMean[0], 100 * 1e12 * 86400 / 144 / 2**32)
    vintage = read_coinmetrics(sample("date,BlkCnt,DiffMean,TxCnt\n2019-10-20,146,13008091666971.93,281555\n"))
    assert_allclose(vintage.HashRate[0], 13008091666971.93 * 146 * 2**32 / 86400 / 1e12)


@pytest.mark.parametrize("change, message", [
    ("200,4|200,-4", "row 3, column 'TxCnt': -4.0 is negative"), ("200,4|inf,4", "row 3, column 'HashRate': inf is infinite"),
    ("2022-05-02,|2022-05-01 01:00,", "row 4, column 'time': has several rows per day"),
    ("1651467600|soon", "row 3, column 'AssetEODCompletionTime': is 'soon'")])
def test_a_fault_in_an_on_chain_file_names_row_and_column(sample, change, message):
    with pytest.raises(SourceError, match=message): read_coinmetrics(sample(CHAIN.replace(*change.split("|"))))


# --- formats -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text, kind", [
    ("XBTUSD_60.csv", KRAKEN, "kraken"), ("BTCUSDT-1h-2018-02.csv", KLINES, "binance"), ("BTC_USDT-1h.csv", CCXT, "binance"),
    ("bars.csv", DATED, "binance"), ("DGS10.csv", FRED, "fred"), ("DX-Y.NYB.csv", THREE, "yahoo"),
    ("utxo-count.csv", UTXO, "blockchaincom"), ("btc.csv", CHAIN, "coinmetrics")])
def test_the_format_is_recognised(sample, name, text, kind):
    assert read(sample(text, name)).attrs["format"] == kind


@pytest.mark.parametrize("text, message", [
    ("https://www.cryptodatadownload.com\n1", "row 1: unknown format"), ("1381093200000,1,2,3,4,5", "row 1: unknown format"),
    ("a,b,c\n1,2,3", "row 1: unknown format"), (FRED.replace("DGS10", "GDP"), "column 'GDP': unknown publication time"),
    (FRED.replace("observation_date,DGS10", "date,value"), "does not name the series")])
def test_an_unknown_format_is_refused(sample, text, message):
    with pytest.raises(SourceError, match=message): read(sample(text))


def test_a_monthly_mean_and_a_lost_decimal_point_are_refused(sample):
    monthly = "observation_date,DGS10\n2023-12-01,4.00\n2024-01-01,4.10\n2024-02-01,4.20"
    with pytest.raises(SourceError, match="rows are a month apart"): read_fred(sample(monthly, "DGS10.csv"))
    with pytest.raises(SourceError, match="row 5, column 'DGS10': 410.0 differs"):
        read_fred(sample(FRED + "2024-01-17,410\n2024-01-18,4.14\n2024-01-19,4.15\n"))
