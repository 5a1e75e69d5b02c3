"Folders of source files: what is refused, what is left out and reported, and controls that must load."
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import BASELINES, ENV, call_cli, command, one_line, shell, snapshot, walk, write, write_sources

from cryptopredict import files, sources
from cryptopredict.leakage import walk_forward

HOUR, DAY = 3_600_000, 86_400_000


def utc(text: str) -> pd.Timestamp:
    return pd.Timestamp(text, tz="UTC")


def prices(hours: int, level: float = 42000.) -> np.ndarray:
    "Closes that move by a few dollars per hour."
    return level * (1 + np.sin(np.arange(hours)) / 1000)


def klines(begin: str, closes, step: int = HOUR, last: str = "") -> str:
    "Binance klines, 12 columns, milliseconds."
    opens = utc(begin).as_unit("ms").value // 10**6 + step * np.arange(len(closes))
    rows = [f"{t},{c:.2f},{c * 1.001:.2f},{c * .999:.2f},{c:.2f},10,{t + step - 1},{c * 10:.2f},1,5,{c * 5:.2f},0" for t, c in zip(opens, closes)]
    return "\n".join(rows) + "\n" + last


def kraken(begin: str, closes, step: int = HOUR) -> str:
    seconds = utc(begin).as_unit("s").value // 10**9 + step // 1000 * np.arange(len(closes))
    return "".join(f"{t},{c:.2f},{c * 1.001:.2f},{c * .999:.2f},{c:.2f},5,9\n" for t, c in zip(seconds, closes))


def headed(begin: str, closes, header: str = "ts,open,high,low,close,volume", step: str = "1h", form: str = "%Y-%m-%dT%H:%M:%SZ",
           volume: float = 10) -> str:
    "Bars under a header, its columns in the header's order."
    times = pd.date_range(utc(begin), periods=len(closes), freq=step)
    unit = {"s": 10**9, "ms": 10**6, "us": 10**3}
    stamps = [t.value // unit[form] for t in times] if form in unit else times.strftime(form)
    value = lambda name, t, c: {"open": f"{c:.2f}", "high": f"{c * 1.001:.2f}", "low": f"{c * .999:.2f}", "close": f"{c:.2f}",
                                "volume": f"{volume}", "symbol": "BTC/USDT", "ma": ""}.get(name.lower(), str(t))
    return "\n".join([header, *(",".join(value(n, t, c) for n in header.split(",")) for t, c in zip(stamps, closes))]) + "\n"


def fred(dates, series: str = "DGS10", values=None, header: str = "observation_date") -> str:
    values = [f"{4 + k % 5 / 100:.2f}" for k in range(len(dates))] if values is None else values
    return f"{header},{series}\n" + "".join(f"{pd.Timestamp(d):%Y-%m-%d},{v}\n" for d, v in zip(dates, values))


def quotes(dates, level: float = 102., last: float | None = None, header: str = "Date,Open,High,Low,Close,Volume", form: str = "%Y-%m-%d") -> str:
    closes = [level + k % 4 / 10 for k in range(len(dates))]
    if last is not None: closes[-1] = last
    return header + "\n" + "".join(f"{pd.Timestamp(d).strftime(form)},{c},{c + .5},{c - .5},{c},0\n" for d, c in zip(dates, closes))


def chain(begin: str, days: int, level: float = 1., price: float | None = 42000., last: float | None = None) -> str:
    "A Coin Metrics file; `level` scales its counts."
    dates = pd.date_range(begin, periods=days, freq="D")
    counts = [level * (300_000 + 1000 * (k % 7)) for k in range(days)]
    if last is not None: counts[-1] = last
    return "time,PriceUSD,TxCnt,SplyCur\n" + "".join(f"{d:%Y-%m-%d},{price or ''},{n:.0f},19500000\n" for d, n in zip(dates, counts))


def zipped(name: str, text: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr(name, text)
    return packed.getvalue()


def make(folder: Path, contents: dict) -> Path:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


BTC = klines("2024-01-01", prices(48))
BARS = {"BTCUSDT-1h-2024-01.csv": BTC}
THREE = "Price,Close,High,Low,Open,Volume\nTicker" + ",{0}" * 5 + "\nDate,,,,,\n2024-01-02,102.2,102.3,101.3,101.4,0\n2024-01-03,102.5,102.8,102.1,102.2,0\n"
SPIKE = prices(48) * np.where(np.arange(48) == 20, .001, 1)
SWAPPED = "\n".join(",".join([*r[:5], r[7], r[6], r[5], *r[8:]]) for r in (line.split(",") for line in BTC.split())) + "\n"
HOURS = pd.date_range("2024-01-02 01:00", periods=4, freq="h")
WORK = pd.bdate_range("2024-01-02", periods=12)

LONG, DAYS = pd.bdate_range("2024-01-01", periods=90), pd.date_range("2023-09-01", "2024-01-20")
def chart(level): return "".join(f"{d:%Y-%m-%d} 00:00:00,{level + k:.0f}\n" for k, d in enumerate(pd.date_range("2024-01-01", periods=6)))
def drifting(seed): return 30000 * np.exp(np.random.default_rng(seed).normal(0, .006, 24 * 365 * 5).cumsum())
RANDOM = np.round(42000 * np.exp(np.random.default_rng(1).normal(0, .006, 24 * 60).cumsum()), 2)
LEVELS = {"BTCUSDT-1h.csv": klines("2024-01-01", RANDOM)}
SHIFTED = "time,PriceUSD,TxCnt\n" + "".join(f"{d:%Y-%m-%d},{RANDOM[24 * (k + 2) - 1]:.2f},300000\n" for k, d in enumerate(pd.date_range("2024-01-01", periods=58)))
# name -> (files in the folder, words that the error message must hold)
REFUSED = {
    # 1. which asset a file holds
    "ETH alone": ({"ETHUSDT-1h-2024-01.csv": klines("2024-01-01", prices(48, 2300))}, "ETHUSDT ETH/USDT Bitcoin another folder"),
    "euro": ({"XBTEUR_60.csv": kraken("2024-01-01", prices(48, 39000))}, "XBTEUR Bitcoin in EUR"),
    "a month of BTC, the next of ETH": ({**BARS, "ETHUSDT-1h-2024-02.csv": klines("2024-02-01", prices(48, 2300))}, "ETHUSDT BTCUSDT ETH/USDT"),
    "another coin in a neutral zip": ({**BARS, "feb.zip": zipped("ETHUSDT-1h-2024-02.csv", klines("2024-02-01", prices(48, 2300)))}, "feb.zip ETH BTCUSDT"),
    "a zip that names one coin and holds another": ({"BTCUSDT.zip": zipped("ETHUSDT-1h-2024-02.csv", BTC)}, "BTCUSDT.zip ETHUSDT"),
    "another coin by its symbol column": ({"bars.csv": headed("2024-01-01", prices(48), "ts,symbol,open,high,low,close,volume").replace("BTC/", "ETH/")},
                                          "bars.csv ETH/USDT"),
    "two coins in a symbol column": ({"bars.csv": headed("2024-01-01", prices(48), "ts,symbol,open,high,low,close,volume").replace("BTC/", "ETH/", 9)},
                                     "bars.csv several assets symbol"),
    "euro in the middle of a name": ({"btc_1h_in_euro.csv": headed("2024-01-01", prices(48, 38500))}, "btc_1h_in_euro.csv Bitcoin in EUR"),
    "euro as a folder": ({"EUR/btc.csv": headed("2024-01-01", prices(48, 38500))}, "EUR Bitcoin in EUR"),
    "a pair in another case and with its period": ({"EthUsdt1h.csv": klines("2024-01-01", prices(48, 2300))}, "EthUsdt1h.csv ETH"),
    "a neutral name, alone": ({"bars.csv": headed("2024-01-01", prices(48, 2300))}, "bars.csv 2024-01 closes around 2300"),
    "dollars in the name, euro in the rows": ({"BTCUSD.csv": headed("2024-01-01", prices(48), "ts,symbol,open,high,low,close,volume").replace("BTC/USDT", "BTC/EUR")}, "BTCUSD.csv symbol BTC/EUR"),
    "a supply larger than Bitcoin's": ({**BARS, "chain.csv": chain("2024-01-01", 20, price=None).replace("19500000", "120000000")}, "chain.csv SplyCur"),
    "an unlisted coin's month after Bitcoin's": ({**BARS, "FOOUSDT-1h-2024-01.csv": klines("2024-01-03", prices(48))}, "FOOUSDT BTCUSDT"),
    "gold": ({"XAUUSD_60.csv": kraken("2018-01-01", prices(48, 1300))}, "XAUUSD_60.csv XAU/USD"),
    "two charts that differ": ({**BARS, "utxo-count.csv": chart(170e6), "utxo-count_2.csv": chart(50e6)}, "utxo-count.csv utxo-count_2.csv"),
    "index and future": ({**BARS, "DX-Y.NYB.csv": quotes(WORK), "DX=F.csv": quotes(WORK, 102.2)}, "DX=F.csv DX-Y.NYB.csv days"),
    "neutral names, one after the other": ({"one.csv": headed("2024-01-01", prices(48)), "two.csv": headed("2024-01-03", prices(48, 2300))}, "one.csv two.csv jumps"),
    "neutral name, two coins in one file": ({"bars.csv": headed("2024-01-01", np.r_[prices(48), prices(48, 2300)])}, "bars.csv row 50 close"),
    "neutral name, same hours, another venue": ({**BARS, "bitstamp.csv": headed("2024-01-01", prices(48, 2300))}, "bitstamp.csv BTCUSDT closes are"),
    "euro under a neutral name": ({**BARS, "bitstamp.csv": headed("2024-01-01", prices(48, 38500))}, "bitstamp.csv BTCUSDT closes are"),
    "the dollar index as hourly bars": ({"DXY.csv": headed("2024-01-01", prices(48, 102))}, "DXY.csv DXY Bitcoin"),
    "the dollar index next to Bitcoin": ({**BARS, "DX-Y.NYB_1h.csv": headed("2024-01-01", prices(48, 102))}, "DX-Y.NYB_1h.csv BTCUSDT DXY bars"),
    "a share whose name begins like the index": ({**BARS, "DXCM.csv": quotes(WORK, 120)}, "DXCM.csv dollar index"),
    "a share under the index's name": ({**BARS, "DX-Y.NYB.csv": THREE.format("AAPL")}, "DX-Y.NYB.csv AAPL"),
    "a level that is no dollar index": ({**BARS, "DXY.csv": quotes(WORK, 13)}, "DXY.csv dollar index"),
    "on-chain of two coins, neutral names": ({**BARS, "chain_1.csv": chain("2024-01-01", 20, price=None), "chain_2.csv": chain("2024-01-01", 20, 3, None)}, "chain_1.csv chain_2.csv TxCnt times"),
    "two files named after Bitcoin that differ": ({**BARS, "btc.csv": chain("2024-01-01", 20), "btc_2.csv": chain("2024-01-01", 20, 3, None)}, "btc.csv btc_2.csv TxCnt times"),
    "on-chain whose price is another coin's": ({**BARS, "chain.csv": chain("2023-12-20", 30, price=2300.)}, "chain.csv PriceUSD BTCUSDT"),
    "a series named after another": ({**BARS, "DGS10.csv": fred(WORK, "DGS2")}, "DGS10 DGS2"),
    # 2. the period of a row
    "monthly yields": ({**BARS, "DGS10.csv": fred(pd.date_range("2023-06-01", periods=8, freq="MS"))}, "DGS10.csv row month daily"),
    "weekly yields": ({**BARS, "DGS10.csv": fred(pd.date_range("2023-10-06", periods=12, freq="7D"))}, "DGS10.csv row week daily"),
    "quarterly index": ({**BARS, "DTWEXBGS.csv": fred(pd.date_range("2022-01-01", periods=8, freq="QS"), "DTWEXBGS", ["120"] * 8)}, "DTWEXBGS.csv quarter daily"),
    "yearly yields": ({**BARS, "DGS2.csv": fred(pd.date_range("2015-01-01", periods=8, freq="YS"), "DGS2")}, "DGS2.csv year daily"),
    "two monthly yields": ({**BARS, "DGS10.csv": fred(["2023-11-01", "2023-12-01"])}, "DGS10.csv month daily"),
    "one monthly yield": ({**BARS, "DGS10.csv": fred(["2023-12-01"])}, "DGS10.csv month daily"),
    "days that turn into months": ({**BARS, "DGS10.csv": fred([*WORK, *pd.date_range("2024-02-01", periods=5, freq="MS")])}, "DGS10.csv row month"),
    "weekly dollar index quotes": ({**BARS, "DX-Y.NYB.csv": quotes(pd.date_range("2023-11-06", periods=9, freq="7D"))}, "DX-Y.NYB.csv week daily"),
    "hourly quotes under Date": ({**BARS, "DX-Y.NYB.csv": quotes(HOURS, form="%Y-%m-%d %H:%M:%S+00:00")}, "DX-Y.NYB.csv DXY"),
    "hourly on-chain rows": ({**BARS, "btc.csv": "time,TxCnt\n" + "".join(f"2024-01-01T{h:02}:00:00Z,{9000 + h}\n" for h in range(9))}, "btc.csv row several rows per day"),
    "one 1d kline per file": ({f"BTCUSDT-1d-2024-01-0{k}.csv": klines(f"2024-01-0{k}", [42000.], DAY) for k in (1, 2, 3)}, "BTCUSDT-1d row 1 1d"),
    "six 4h klines": ({"BTCUSDT-4h-2024-01-01.csv": klines("2024-01-01", prices(6), 4 * HOUR)}, "BTCUSDT-4h row 1 4h"),
    "six 4h klines named neutrally": ({"bars.csv": headed("2024-01-01", prices(6), step="4h")}, "bars.csv row 4h hour"),
    "days under ts": ({"bars.csv": headed("2024-01-01", prices(3), step="1D")}, "bars.csv row 1d hour"),
    "one day per file under ts": ({f"bars{k}.csv": headed(f"2024-01-0{k}", [42000.]) for k in (1, 2, 3, 4)}, "bars 1d hour"),
    "a daily Kraken file": ({"XBTUSD_1440.csv": kraken("2024-01-01", [42000.])}, "XBTUSD_1440.csv 1d"),
    "days, then hours": ({"btc.csv": headed("2023-12-01", prices(20), step="1D") + headed("2024-01-01", prices(48)).split("\n", 1)[1]}, "btc.csv row 3 1d"),
    "hours, then 4 h": ({"btc.csv": headed("2024-01-01", prices(48)) + headed("2024-01-03 03:00", prices(20), step="4h").split("\n", 1)[1]}, "btc.csv row 50 4h"),
    "4 h off the grid of midnight": ({"btc.csv": headed("2024-01-01 01:00", prices(6), step="4h")}, "btc.csv row 4h"),
    "one day per file next to hours": ({"btc.csv": headed("2024-01-01", prices(48)), **{f"btc-{k}.csv": headed(f"2024-01-0{k}", [42000.]) for k in (4, 5, 6, 7)}}, "btc 1d hour"),
    "months with empty days between": ({**BARS, "DGS10.csv": fred(DAYS, values=[4.1 if d.day == 1 else "" for d in DAYS])}, "DGS10.csv month daily"),
    "weeks on every day": ({**BARS, "DGS10.csv": fred(LONG, values=[f"{4 + (k // 5) % 7 / 100:.2f}" for k in range(len(LONG))])}, "DGS10.csv week daily"),
    "yields in basis points": ({**BARS, "DGS10.csv": fred(WORK, values=["401", "402"] * 6)}, "DGS10.csv per cent"),
    "two hours apart in two small files": ({"a.csv": headed("2024-01-01", prices(3), step="2h"), "b.csv": headed("2024-01-02", prices(3), step="2h")}, "b.csv 2h apart"),
    "means of months on every day": ({**BARS, "DGS10.csv": fred(LONG, values=[f"{3 + d.month / 10:.2f}" for d in LONG])}, "DGS10.csv month daily"),
    "yields as fractions": ({**BARS, "DGS10.csv": fred(LONG, values=[f"{.04 + k % 9 / 1000:.3f}" for k in range(len(LONG))])}, "DGS10.csv per cent"),
    "days of the index shifted by a zone": ({**BARS, "DXY.csv": quotes([d - pd.Timedelta("1D") for d in WORK])}, "DXY.csv Sundays"),
    "on-chain days shifted": ({**LEVELS, "btc.csv": SHIFTED}, "btc.csv PriceUSD another day"),
    "two clocks in one file": ({"bars.csv": "unix,date,open,high,low,close,volume\n" + "".join(f"{1704067200 + 3600 * k},2024-01-01T{k + 3:02}:00:00Z,42000,42100,41900,42000,5\n" for k in range(9))}, "bars.csv unix date UTC"),
    "venues whose clocks differ": ({"BTCUSDT.csv": headed("2024-01-01", RANDOM), "bitstamp.csv": headed("2024-01-01 03:00", RANDOM)}, "bitstamp.csv BTCUSDT.csv 3 hours UTC"),
    "bars of hours to come": ({"bars.csv": headed(str(pd.Timestamp.now("UTC").floor("h").tz_localize(None) - pd.Timedelta("40h")), prices(44))}, "bars.csv row future zone"),
    "minutes": ({"bars.csv": headed("2024-01-01", prices(90), step="15min")}, "bars.csv 15m hour"),
    "Yahoo's daily Bitcoin as bars": ({"BTC-USD.csv": quotes(pd.date_range("2024-01-01", periods=9), 42000.)}, "BTC-USD.csv daily quotes hourly"),
    "Yahoo's daily Bitcoin next to bars": ({**BARS, "BTC-USD.csv": quotes(pd.date_range("2024-01-01", periods=9), 42000.)}, "BTC-USD.csv daily quotes"),
    "a comma inside quotes": ({"bars.csv": headed("2024-01-01", prices(48)).replace("42000.00,10", '"42,000.00"', 1)}, "bars.csv row 2 comma quotes"),
    "a closing time without zone": ({"bars.csv": "open_time,open,high,low,close,volume,close_time\n2024-01-01T00:00:00Z,42000,42100,41900,42000,5,2024-01-01T00:59:59\n"}, "bars.csv close_time zone"),
    "another coin's prepared panel": ({"ETHUSDT_panel.csv": headed("2024-01-01 01:00", prices(48, 2300)).replace("ts,", "time,", 1).replace("volume\n", "volume,is_filled,is_splice\n", 1).replace(",10\n", ",10,False,False\n")}, "ETHUSDT_panel.csv ETH/USDT"),
    "a prepared panel with a wrong price": ({"panel.csv": headed("2024-01-01 01:00", SPIKE).replace("ts,", "time,", 1).replace("volume\n", "volume,is_filled,is_splice\n", 1).replace(",10\n", ",10,False,False\n")}, "panel.csv row 22 factor"),
    "all bars off the hour, no close_time": ({"bars.csv": headed("2024-01-01 00:30", prices(48))}, "bars.csv full hour zone"),
    # 3. unfinished rows
    "two snapshots of one day": ({**BARS, "DX-Y.NYB_a.csv": quotes(WORK[:5], last=101.), "DX-Y.NYB_b.csv": quotes(WORK[:5], last=102.7)}, "DX-Y.NYB_a.csv DX-Y.NYB_b.csv"),
    "a wrong year in the future": ({"bars.csv": headed("2024-01-01", prices(48)) + headed("2054-01-01", prices(1)).split("\n", 1)[1]}, "bars.csv row 50 year"),
    # 4. implausible values
    "a bar divided by a thousand": ({"bars.csv": headed("2024-01-01", SPIKE)}, "bars.csv row 22 open drop_invalid"),
    "a close of 1e12": ({"bars.csv": headed("2024-01-01", np.where(np.arange(48) == 30, 1e12, prices(48)))}, "bars.csv row 32 drop_invalid"),
    "a last bar of 1e12": ({"bars.csv": headed("2024-01-01", np.r_[prices(48), 1e12])}, "bars.csv row 50 drop_invalid"),
    "a year of the last century": ({"bars.csv": headed("1924-01-01", prices(1)) + headed("2024-01-01", prices(48)).split("\n", 1)[1]}, "bars.csv row 2 year"),
    "a year typed wrong": ({"bars.csv": headed("2014-01-01", prices(1)) + headed("2024-01-01", prices(48)).split("\n", 1)[1]}, "bars.csv row 2 year"),
    "a jump where venues meet": ({"XBTUSD_60.csv": kraken("2018-12-01", prices(31 * 24, 3700)), "BTCUSDT.csv": klines("2019-01-01", prices(48, 37000))},
                                 "XBTUSD_60.csv BTCUSDT.csv jumps"),
    "base and quote volume swapped": ({"BTCUSDT-1h-2024-01.csv": SWAPPED}, "BTCUSDT row 1 volume swapped"),
    "volume in dollars": ({"bars.csv": headed("2024-01-01", prices(48), volume=5e7)}, "bars.csv volume bitcoins"),
    "volume in dollars next to another venue": ({**BARS, "bitstamp.csv": headed("2024-01-01", prices(48), volume=420000)}, "bitstamp.csv volume bitcoins"),
    "one hour's volume in dollars": ({"bars.csv": headed("2024-01-01", prices(48)).replace(",10\n", ",420000\n", 1)}, "bars.csv row 2 volume exchange"),
    "volume of each hour times its price": ({"bars.csv": headed("2024-01-01", prices(48), volume=420000)}, "bars.csv volume bitcoins"),
    "the dollar index by its full name": ({"dollar_index_1h.csv": headed("2024-01-01", prices(48, 102))}, "dollar_index_1h.csv DXY"),
    "both Close and close": ({"bars.csv": headed("2024-01-01", prices(48), "ts,open,high,low,close,Close,volume")}, "bars.csv close Close"),
    "a yield without its point": ({**BARS, "DGS10.csv": fred(WORK, values=["4.1"] * 5 + ["410"] + ["4.1"] * 6)}, "DGS10.csv row 7 DGS10"),
    "a quote with a digit too many": ({**BARS, "DX-Y.NYB.csv": quotes(WORK).replace("102.1,102.6,101.6,102.1", "1021,1026,1016,1021", 1)}, "DX-Y.NYB.csv row 3"),
    "a count times a thousand": ({**BARS, "btc.csv": chain("2024-01-01", 20).replace(",303000,", ",303000000,", 1)}, "btc.csv row 5 TxCnt"),
    # 5. not data, or too large
    "a Git LFS pointer": ({"BTCUSDT_1h.csv": "version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 3\n"}, "BTCUSDT_1h.csv LFS pull"),
    "an HTML page": ({**BARS, "DGS10.csv": "<!DOCTYPE html><html><body>Too many requests</body></html>"}, "DGS10.csv HTML download"),
    "JSON called csv": ({**BARS, "utxo-count.csv": '{"status":"ok"}'}, "utxo-count.csv JSON"),
    "a header of 5 MB": ({**BARS, "x.csv": "a" * 5_000_000 + ",b\n1,2\n"}, "x.csv row 1 longer"),
    "a zip that unpacks to more than is read": ({**BARS, "x.zip": zipped("x.csv", "0" * (files.MAX_BYTES + 1))}, "x.zip MiB"),
    "a gzip that unpacks to more than is read": ({**BARS, "x.csv.gz": gzip.compress(b"0" * (files.MAX_BYTES + 1), 1)}, "x.csv.gz MiB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_trusted_is_refused_in_one_line(tmp_path, case):
    contents, words = REFUSED[case]
    place = make(tmp_path / "data", contents)
    before = snapshot(tmp_path)
    with pytest.raises(sources.SourceError) as refused: sources.load_panel(place)
    message = str(refused.value).replace(str(tmp_path), "")
    assert "\n" not in message and len(message) < 1500 and all(w.lower() in message.lower() for w in words.split()), message
    assert snapshot(tmp_path) == before


# --- controls: what must load ---------------------------------------------------------------------------------------------

JUMP = klines("2024-01-01", prices(60, 42000)) + klines("2024-02-10", prices(60, 84000))
CUT = BTC.split()[:4] + [f"{utc('2024-01-01 04:00').value // 10**6},42000,42100,41900,42010,3,{utc('2024-01-01 04:28:14.788').value // 10**6},1,1,1,1,0"] + BTC.split()[6:]
CLOSES, HEADED = prices(48), headed("2024-01-01", prices(48))
def with_running_bar(volume): return "\n".join([*HEADED.splitlines()[:20], ",".join([*HEADED.splitlines()[20].split(",")[:2], *HEADED.splitlines()[20].split(",")[1:2] * 3, str(volume)])]) + "\n"
LOADED = {  # name -> (files in the folder, hours in the panel)
    "klines": (BARS, 48),
    "ms and us files side by side": ({"BTCUSDT-1h-2024-12.csv": klines("2024-12-31", prices(24)),
                                      "BTCUSDT-1h-2025-01.csv": klines("2025-01-01", prices(24)).replace("00000,", "00000000,").replace("99999,", "99999999,")}, 48),
    "one coin over a gap and a doubling": ({"BTCUSDT_1h.csv": JUMP}, 40 * 24 + 60),
    "the same in two files": ({"BTCUSDT-1h-2024-01.csv": klines("2024-01-01", prices(60)), "BTCUSDT-1h-2024-02.csv": klines("2024-02-10", prices(60, 84000))},
                              40 * 24 + 60),
    "a bar cut short by an outage": ({"BTCUSDT-1h-2024-01.csv": "\n".join(CUT)}, 48),
    "Kraken, then Binance": ({"XBTUSD_60.csv": kraken("2018-12-01", prices(31 * 24, 3700)), "BTCUSDT.csv": klines("2019-01-01", prices(48, 3710))}, 33 * 24),
    "the same hours in a monthly and a daily file": ({**BARS, "BTCUSDT-1h-2024-01-02.csv": "\n".join(BTC.split()[24:]) + "\n"}, 48),
    "one hour per file": ({f"BTCUSDT-1h-{k:02}.csv": row for k, row in enumerate(BTC.split())}, 48),
    "thin Kraken hours": ({"XBTUSD_60.csv": "".join(np.array(kraken("2014-01-01", prices(400, 800)).splitlines(True))[[0, *np.flatnonzero(np.random.default_rng(0).random(398) < .38) + 1, 399]])}, 400),
    "two venues in the same hours": ({**BARS, "bitstamp.csv": headed("2024-01-01", prices(48, 42100))}, 48),
    "a rough day": ({"bars.csv": headed("2024-01-01", 42000 * np.exp(np.r_[np.zeros(20), np.linspace(0, -.5, 5), np.full(23, -.4)]))}, 48),
    "many honest names": ({f"{name}.csv": "\n".join(BTC.split()[k:k + 3]) for k, name in zip(range(0, 48, 3), (
        "USDT_BTC-1h", "my_eth_free_btc", "btc_link_data", "arb_btc", "prices_etc", "KRAKENUSD", "HOURLYBTC", "market_data_etc/bars", "UNI/bars", "ripple_effect_btc",
        "ETH_comparison/BTCUSDT", "ETH_BTC_both/btc", "usd_btc_hourly", "btc_vs_dollar_index", "sol_y_mar", "comp_btc"))}, 48),
    "venues named by their folders": ({"kraken/BTCUSD_1h.csv": headed("2024-01-01", prices(48, 42050)), "binance/BTCUSDT_1h.csv": HEADED}, 48),
    "dollars and a stable coin": ({"BTCUSD_1h.csv": headed("2024-01-01", prices(48, 42050)), "BTCUSDT_1h.csv": HEADED}, 48),
    "a thin venue next to a large one": ({"XBTUSD_60.csv": kraken("2014-01-01", prices(48, 800)), "bitstamp.csv": headed("2014-01-01", prices(48, 801), volume=4000)}, 48),
    "three downloads, two of a running bar": ({"a.csv": with_running_bar(3), "b.csv": with_running_bar(6), "c.csv": HEADED}, 48),
    "a neutral name": ({"bars.csv": HEADED}, 48),
    "a name in other words": ({"bitcoin_hourly_near_real_time.csv": HEADED}, 48),
    "a single hour at midnight, by its name": ({**BARS, "BTC-1h-3.csv": headed("2024-01-03", prices(1), "date,open,high,low,close,volume")}, 49),
    "Mt. Gox above the others": ({"XBTUSD_60.csv": kraken("2014-01-01", prices(48, 800)), "mtgox_BTCUSD.csv": headed("2014-01-01", prices(48, 860))}, 48),
    "a made-up history that drifts far away": ({"bars.csv": headed("2018-01-01", drifting(3))}, 24 * 365 * 5),
    "times that end in UTC, volume as vol": ({"data.csv": headed("2024-01-01", prices(48), form="%Y-%m-%d %H:%M:%S UTC").replace("volume", "vol")}, 48),
    "another coin's chart next to Bitcoin's": ({**BARS, "utxo-count.csv": chart(170e6), "ltc_utxo-count.csv": chart(50e6)}, 48),
    "quotes that change every few days": ({**BARS, "DXY.csv": quotes(LONG[:40]).splitlines()[0] + "\n" + "".join(f"{d:%Y-%m-%d},{v},{v},{v},{v},0\n" for d, v in zip(LONG[:40], [102] * 20 + [103] * 12 + [104] * 8))}, 48),
    "constant macro series": ({**BARS, "DXY.csv": quotes(WORK).splitlines()[0] + "\n" + "".join(f"{d:%Y-%m-%d},102,102,102,102,0\n" for d in WORK), "DGS10.csv": fred(WORK, values=["4.0"] * 12)}, 48),
    "gzip and zip": ({"a.csv.gz": gzip.compress(klines("2024-01-01", CLOSES[:24]).encode()), "b.zip": zipped("BTCUSDT-1h.csv", klines("2024-01-02", CLOSES[24:]))}, 48),
}
HEADERS = {
    "timestamp in ms": headed("2024-01-01", prices(48), "timestamp,open,high,low,close,volume", form="ms"),
    "unix in s": headed("2024-01-01", prices(48), "unix,open,high,low,close,volume", form="s"),
    "open_time in us": headed("2024-01-01", prices(48), "open_time,open,high,low,close,volume", form="us"),
    "date with zone": headed("2024-01-01", prices(48), "date,open,high,low,close,volume", form="%Y-%m-%d %H:%M:%S+00:00"),
    "time, shuffled and in capitals": headed("2024-01-01", prices(48), "Time,Close,High,Open,Volume,Low"),
    "with a symbol and a moving average": headed("2024-01-01", prices(48), "timestamp,symbol,open,high,low,close,MA,volume", form="ms"),
    "volume by its coin": HEADED.replace("close,volume", "close,Volume BTC"),
    "quoted, with BOM and Windows line ends": "\ufeff" + "\r\n".join(",".join(f'"{f}"' for f in line.split(",")) for line in HEADED.split()),
}
LOADED |= {name: ({"BTC_USDT-1h.csv": text}, 48) for name, text in HEADERS.items()}


@pytest.mark.parametrize("case", LOADED)
def test_valid_folders_load(tmp_path, case):
    contents, hours = LOADED[case]
    panel = sources.load_panel(make(tmp_path, contents))
    assert len(panel) == hours and not panel["close"].iloc[[0, -1]].isna().any()
    if "chart" in case: assert not panel["utxo_count"].between(4e7, 6e7).any()
    if case in HEADERS:
        other = sources.load_panel(make(tmp_path / "klines", {"BTCUSDT_1h.csv": BTC}))
        pd.testing.assert_frame_equal(panel, other)


@pytest.mark.parametrize("name, text, column", [
    ("DGS10.csv", fred(["2024-01-12", "2024-01-16", "2024-01-17"], "value", header="date"), "dgs10"),
    ("DGS10.csv", fred(["2024-01-12", "2024-01-16", "2024-01-17"]), "dgs10"),
    ("DGS2.csv", fred(["2024-01-12", "2024-01-15", "2024-01-16"], "DGS2", ["4", ".", "4"], "DATE"), "dgs2"),
    ("DX-Y.NYB.csv", THREE.format("DX-Y.NYB"), "dxy"), ("quotes.csv", THREE.format("DX-Y.NYB"), "dxy"), ("DXY.csv", quotes(WORK), "dxy"),
    ("utxo-count.csv", "\ufeffTimestamp,utxo-count\r\n2024-01-02 00:00:00,170000000\r\n2024-01-03 05:00:00,170100000\r\n", "utxo_count"),
    ("utxo-count.csv", "date,value\n2024-01-02,170000000\n2024-01-03,170100000\n", "utxo_count"),
    ("btc.csv", chain("2024-01-01", 12), "tx_count"), ("onchain/whatever.csv", chain("2024-01-01", 12), "tx_count")])
def test_daily_files_load_under_every_header(tmp_path, name, text, column):
    panel = sources.load_panel(make(tmp_path, {"BTCUSDT-1h-2024-01.csv": klines("2024-01-01", prices(480)), name: text}))
    assert panel[column].notna().any()


def test_parquet_and_feather_load_like_csv(tmp_path):
    panel = sources.load_panel(make(tmp_path / "csv", {"BTC_USDT-1h.csv": HEADED}))
    frame = pd.read_csv(tmp_path / "csv" / "BTC_USDT-1h.csv", parse_dates=["ts"])
    for name, write_to in dict(parquet=pd.DataFrame.to_parquet, feather=pd.DataFrame.to_feather).items():
        (tmp_path / name).mkdir()
        write_to(frame.rename(columns={"ts": "date"}), tmp_path / name / f"BTC_USDT-1h.{name}")
        pd.testing.assert_frame_equal(sources.load_panel(tmp_path / name), panel)
    (tmp_path / "indexed").mkdir()
    frame.set_index("ts").to_parquet(tmp_path / "indexed" / "BTC_USDT-1h.parquet")
    pd.testing.assert_frame_equal(sources.load_panel(tmp_path / "indexed"), panel)
    frame.assign(ts=frame["ts"].dt.tz_localize(None)).to_parquet(tmp_path / "indexed" / "BTC_USDT-1h.parquet")
    with pytest.raises(sources.SourceError, match="BTC_USDT-1h.parquet, row 1, column 'ts': .*has no time zone"):
        sources.load_panel(tmp_path / "indexed")


def test_a_prepared_panel_can_be_read_back(tmp_path):
    write_sources(tmp_path / "data", begin="2018-06-01", end="2019-03-31")
    assert shell("prepare", "--data", "data", "--out", "made", cwd=tmp_path).returncode == 0
    pd.testing.assert_frame_equal(sources.load_panel(tmp_path / "made"), sources.load_panel(tmp_path / "data"), check_freq=False)
    files_of = sources.inventory(tmp_path / "made")
    assert files_of["status"].to_dict() == {"panel.parquet": "used", "features.parquet": "not read", "labels.parquet": "not read",
                                            "inventory.json": "not read", "(panel)": "panel"}
    again = shell("prepare", "--data", "made", "--out", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "features.parquet").read_bytes() == (tmp_path / "made" / "features.parquet").read_bytes()


# --- what is known when ---------------------------------------------------------------------------------------------------


def test_no_bar_is_used_before_its_own_close(tmp_path):
    opens = [*pd.date_range("2018-02-08", periods=5, freq="h", tz="UTC"), *(utc("2018-02-09 09:28:14.789") + pd.Timedelta(hours=k) for k in range(6)),
             utc("2018-02-09 15:28:14.789"), *pd.date_range("2018-02-09 16:00", periods=5, freq="h", tz="UTC")]
    ends = [(after if after - t < pd.Timedelta("1h") else t + pd.Timedelta("1h")) for t, after in zip(opens, [*opens[1:], opens[-1] + pd.Timedelta("1h")])]
    closes = [8000. + k for k in range(len(opens))]
    millis = lambda t: t.value // 10**6
    text = "".join(f"{millis(t)},{c},{c + 9},{c - 9},{c},7,{millis(e) - 1},1,1,1,1,0\n" for t, e, c in zip(opens, ends, closes))
    plain = "ts,open,high,low,close,volume\n" + "".join(f"{t.isoformat()},{c},{c + 9},{c - 9},{c},7\n" for t, c in zip(opens, closes))
    for name, content in (("BTCUSDT-1h-2018-02.csv", text), ("bars.csv", plain)):
        panel = sources.load_panel(make(tmp_path / name, {name: content}))
        known = {c: panel.index[panel["close"] == c][0] for c in closes if (panel["close"] == c).any()}
        early = [c for c, e in zip(closes, ends) if c in known and known[c] < e]
        assert not early and len(known) >= len(closes) - 1, (name, early)
        assert panel["volume"].sum() == 7 * len(closes), "bars that share an hour are joined, none is lost"
        assert "opened off the hour: 7" in sources.inventory(tmp_path / name).loc[name, "note"]


def test_daily_bitcoin_of_yahoo_is_known_when_its_day_is_over(tmp_path):
    make(tmp_path, {"BTC-USD.csv": quotes(pd.date_range("2024-01-01", periods=3), 42000.)})
    table = sources.read(tmp_path / "BTC-USD.csv")
    assert (table["available_at"] == table["value_time"] + pd.Timedelta("1D")).all()


def test_the_running_bar_is_left_out_and_reported(tmp_path):
    now = pd.Timestamp.now(tz="UTC")
    begin = now.floor("h") - pd.Timedelta("47h")
    place = make(tmp_path, {"BTC_USDT.csv": headed(str(begin.tz_localize(None)), prices(48))})
    panel = sources.load_panel(place)
    assert panel.index[-1] == now.floor("h") and len(panel) == 47
    assert "1 unfinished row left out" in sources.inventory(place).loc["BTC_USDT.csv", "note"]


def test_a_bar_that_ends_after_its_file_was_written_is_left_out(tmp_path):
    # The file was written years ago at 23:20, 40 minutes before the end of its last bar.
    place = make(tmp_path, BARS)
    written = utc("2024-01-02 23:20").timestamp()
    os.utime(place / "BTCUSDT-1h-2024-01.csv", (written, written))
    assert len(sources.load_panel(place)) == 47
    os.utime(place / "BTCUSDT-1h-2024-01.csv", (0, 0))  # from an archive that keeps no times, so that nothing is known
    assert len(sources.load_panel(place)) == 48


@pytest.mark.parametrize("write_file, names", [(kraken, ("XBTUSD_60_Q1.csv", "XBTUSD_60_Q2.csv")), (klines, ("BTCUSDT-q2.csv", "BTCUSDT-q1.csv"))])
def test_of_a_bar_in_two_dumps_the_settled_one_is_used(tmp_path, write_file, names):
    closes = prices(48)
    lines = write_file("2024-01-01", closes[:24]).splitlines()
    running = lines[-1].split(",")  # the last bar of the first dump was still running
    running[2], running[3], running[4], running[5] = running[1], running[1], running[1], "1"
    first, second = "\n".join([*lines[:-1], ",".join(running)]) + "\n", "\n".join(write_file("2024-01-01", closes).splitlines()[23:]) + "\n"
    panel = sources.load_panel(make(tmp_path, dict(zip(names, (first, second)))))
    assert panel["volume"].eq(5 if write_file is kraken else 10).all() and np.allclose(panel["close"], closes.round(2))
    row = second.splitlines()[0].split(",")
    contradicts = second.replace(row[1], row[3], 1)  # has another open, so it is no later state of the same bar
    with pytest.raises(sources.SourceError, match="is .*, but .* in "): sources.load_panel(make(tmp_path, {names[1]: contradicts}))


def test_the_settled_value_of_a_snapshot_and_the_first_release_of_a_yield_are_used(tmp_path):
    work = pd.bdate_range("2024-01-02", periods=8)
    revised = fred(work, values=["4.1"] * 3 + ["4.9"] + ["4.2"] * 4)
    panel = sources.load_panel(make(tmp_path, {
        "BTCUSDT-1h-2024-01.csv": klines("2024-01-01", prices(480)),
        "DX-Y.NYB_5.csv": quotes(work[:5], last=109.), "DX-Y.NYB_8.csv": quotes(work),
        "btc_5.csv": chain("2024-01-04", 5, last=299000), "btc_9.csv": chain("2024-01-04", 9),
        "DGS10_4.csv": fred(work[:4], values=["4.1"] * 3 + ["4.5"]), "DGS10_8.csv": revised}))
    assert not panel["dxy"].eq(109.).any() and panel["dxy"].eq(102.).sum() > 24
    assert not panel["tx_count"].eq(299000).any() and panel["tx_count"].eq(304000).any()
    assert panel["dgs10"].eq(4.5).any() and not panel["dgs10"].eq(4.9).any(), "the first release of a yield is kept"


# --- repairs --------------------------------------------------------------------------------------------------------------


def test_an_implausible_bar_is_dropped_on_request_and_counted(tmp_path):
    place = make(tmp_path, {"data/BTCUSDT_1h.csv": klines("2024-01-01", SPIKE), "data/DGS10.csv": fred(WORK, values=["4.1"] * 5 + ["410"] + ["4.1"] * 6)})
    refused = call_cli("prepare", "--data", "data", "--out", "made", cwd=tmp_path)
    assert refused.returncode == 2 and "drop_invalid" in one_line(refused.stderr) and not (tmp_path / "made").exists()
    done = call_cli("prepare", "--data", "data", "--out", "made", "--repair", "drop_invalid", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    counted = [line for line in done.stdout.splitlines() if "drop_invalid 1" in line]
    assert [line.split(":")[0].strip() for line in counted] == ["BTCUSDT_1h.csv", "DGS10.csv"]
    kept = {r["file"]: r["repairs"] for r in json.loads((tmp_path / "made" / "inventory.json").read_text())}
    assert kept == {"BTCUSDT_1h.csv": "drop_invalid 1", "DGS10.csv": "drop_invalid 1", "(panel)": ""}
    panel = sources.load_panel(place / "data", repairs=("drop_invalid",))
    assert np.log(panel["close"]).diff().abs().max() < .01 and panel["is_filled"].sum() == 1


# --- everything left out is reported --------------------------------------------------------------------------------------


def test_every_file_is_in_the_inventory(tmp_path):
    make(tmp_path, {"data/BTCUSDT-1h-2024-01.csv": BTC, "data/eth.csv": chain("2024-01-01", 20, 4, 2300.), "data/sub/btc.csv": chain("2024-01-01", 20),
                    "data/utxo-count.json": "{}", "data/DGS10.txt": "x", "data/notes.md": "x", "data/.hidden/DGS2.csv": "x",
                    "elsewhere/DXY.csv": quotes(WORK)})
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "sub")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "gone.csv").symlink_to(tmp_path / "nowhere.csv")
    table = sources.inventory(tmp_path / "data")
    assert table["status"].to_dict() == {
        "BTCUSDT-1h-2024-01.csv": "used", "eth.csv": "left out", "linked/DXY.csv": "used", "sub/btc.csv": "used", "utxo-count.json": "not read",
        "DGS10.txt": "not read", "notes.md": "not read", "linked/loop": "not read", "again": "not read", "gone.csv": "not read", "(hidden)": "not read", "(panel)": "panel"}
    assert "ETH" in table.loc["eth.csv", "note"] and table["note"][table["status"] == "not read"].ne("").all()
    row = table.loc["(panel)"]
    assert (row["rows"], row["filled"], row["longest_hole"]) == (48, 0, 0) and "no file for" in row["note"] and "dgs10" in row["note"]


def test_files_of_other_coins_do_not_change_the_panel(tmp_path):
    coins = {f"{coin}.csv": chain("2024-01-01", 20, k + 2., 100. * k) for k, coin in enumerate(("ada", "bch", "doge", "eth", "ltc", "xrp", "usdt", "usdc_eth", "grin", "gno"))}
    alone = sources.load_panel(make(tmp_path / "one", {**BARS, "btc.csv": chain("2024-01-01", 20)}))
    cloned = sources.load_panel(make(tmp_path / "seven", {**BARS, "btc.csv": chain("2024-01-01", 20), **coins}))
    pd.testing.assert_frame_equal(cloned, alone)
    assert sources.inventory(tmp_path / "seven").loc[list(coins), "status"].eq("left out").all()


def test_a_stray_month_of_one_venue_costs_no_hour_of_the_other(tmp_path):
    closes = prices(150 * 24, 3700)
    place = make(tmp_path, {"XBTUSD_60.csv": kraken("2018-12-01", closes), "BTCUSDT-1h-2019-03.csv": klines("2019-03-01", prices(31 * 24, 3705))})
    panel = sources.load_panel(place)
    assert len(panel) == len(closes) and not panel["is_filled"].any()
    assert panel.index[panel["is_splice"]].tolist() == [utc("2019-03-01 01:00"), utc("2019-04-01 01:00")]
    assert sources.inventory(place)["used"].tolist()[:2] == [31 * 24, 119 * 24]


def test_a_gap_is_reported_first_and_costs_every_model_the_same_origins(tmp_path):
    bars = walk(24 * 365 * 5, start="2018-01-01")
    write(tmp_path / "data" / "bars.csv", *headed("2018-01-01", bars["close"]).splitlines())
    lines = (tmp_path / "data" / "bars.csv").read_text().splitlines()
    write(tmp_path / "data" / "bars.csv", *(line for line in lines if not line.startswith("2021-06")))
    words = ["evaluate", "--data", "data", "--models", *BASELINES, "--first-test", "2021-01-01", "--step", "QS", "--out"]
    done = call_cli(*words, "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    gap = next(k for k, line in enumerate(lines) if "2021-06-01 00:00" in line and "2021-07-01 01:00" in line and "720 h" in line)
    assert gap < next(k for k, line in enumerate(lines) if "daily origins," in line)
    made = pd.read_parquet(tmp_path / "run" / "predictions.parquet")
    times = {m: set(part["time"]) for m, part in made.groupby("model")}
    assert len({frozenset(t) for t in times.values()}) == 1 and set(times) == set(BASELINES)
    lost = json.loads((tmp_path / "run" / "scores.json").read_text())["lost_origins"]
    spoiled = pd.date_range("2021-06-08 01:00", "2021-09-29 00:00", freq="D").floor("D") + pd.Timedelta("1D")
    assert not times["ewma"] & set(pd.DatetimeIndex(spoiled, tz="UTC")) and lost["without_forecast"] == 113 and lost["without_label"] > 20, lost
    kept = json.loads((tmp_path / "run" / "inventory.json").read_text())
    assert kept[-1]["file"] == "(panel)" and kept[-1]["longest_hole"] == 720


def test_a_gap_before_the_newest_hour_stops_forecast_but_not_run(tmp_path):
    lines = headed("2018-01-01", walk(24 * 365 * 3, start="2018-01-01")["close"]).splitlines()
    write(tmp_path / "data" / "bars.csv", *(line for line in lines if not line.startswith("2020-11")))
    refused = call_cli("forecast", "--data", "data", "--models", "climatology", cwd=tmp_path)
    assert refused.returncode == 2 and all(w in one_line(refused.stderr) for w in ("2020-11-01", "2020-12-01", "90D"))
    done = call_cli("run", "--data", "data", "--models", "climatology", "ewma", "--first-test", "2020-01-01", "--step", "QS", "--out", "run", "--n-cuts", "1",
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Newest forecast" in report and "There are no bars from 2020-11-01" in report and pd.read_parquet(tmp_path / "run" / "forecast.parquet").empty


# --- bounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="address-space limits as Linux has them")
def test_too_little_memory_gets_one_line_and_does_not_hang(tmp_path):
    make(tmp_path, {"data/BTCUSDT_1h.csv": BTC})
    words = f"ulimit -v 1200000; exec {command()} evaluate --data data --models climatology"
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "memory" in one_line(done.stderr), done.stderr


def test_memory_that_runs_out_later_gets_one_line_too(tmp_path, monkeypatch):
    def full(*args, **how): raise MemoryError("Unable to allocate 9 GiB")
    make(tmp_path, {"data/BTCUSDT_1h.csv": BTC})
    monkeypatch.setattr(sources, "join_panel", full)
    done = call_cli("prepare", "--data", "data", "--out", "made", cwd=tmp_path)
    assert done.returncode == 2 and "out of memory" in one_line(done.stderr) and not (tmp_path / "made").exists()
    monkeypatch.setattr(files, "check_lines", full)
    with pytest.raises(sources.SourceError, match="BTCUSDT_1h.csv: does not fit into memory"): sources.read(tmp_path / "data" / "BTCUSDT_1h.csv")


def test_a_small_parquet_file_cannot_unpack_to_a_large_one(tmp_path):
    pd.DataFrame(dict(ts=["x" * 3000] * 300_000)).to_parquet(tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 1_000_000
    with pytest.raises(sources.SourceError, match="bomb.parquet: has more than"): sources.read(tmp_path / "bomb.parquet")


def test_gaps_of_a_daily_series_are_reported(tmp_path):
    days = [d for d in pd.bdate_range("2024-01-02", periods=250) if not "2024-03-01" <= str(d)[:10] < "2024-09-01"]
    place = make(tmp_path, {"BTCUSDT.csv": klines("2024-01-01", prices(24 * 330)), "DGS10.csv": fred(days)})
    note = sources.inventory(place).loc["(panel)", "note"]
    assert "dgs10 empty for 181 days from 2024-03-07" in note and "no file for" in note, note


def test_a_week_without_bars_is_named(tmp_path):
    place = make(tmp_path, {"BTCUSDT.csv": klines("2024-01-01", prices(240)) + klines("2024-01-18", prices(240))})
    assert "longest gap without a trade: 168 h from 2024-01-11 01:00" in sources.inventory(place).loc["(panel)", "note"]


def test_a_level_out_of_range_is_noted_where_the_name_is_bitcoin(tmp_path):
    place = make(tmp_path, {"BTCUSDT.csv": klines("2024-01-01", prices(48, 42))})
    assert "suspect: closes around 42" in sources.inventory(place).loc["BTCUSDT.csv", "note"]


def test_memory_to_read_a_file_is_bounded(tmp_path):
    place = make(tmp_path, {"bomb.zip": zipped("x.csv", "0" * (4 * files.MAX_BYTES))})
    tracemalloc.start()
    with pytest.raises(sources.SourceError, match="MiB"): sources.read(place / "bomb.zip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.2 * files.MAX_BYTES


def test_folds_of_a_million_hours_need_little_memory():
    index = pd.date_range("1910-01-01", periods=1_000_000, freq="h", tz="UTC")
    ends = pd.Series(index + pd.Timedelta("90D"), index).where(np.arange(len(index)) < len(index) - 2160)
    tracemalloc.start()
    folds = walk_forward(index, ends, first_test="1914-01-01", step="MS")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(folds) > 1300 and held < 20e6 and peak < 200e6, (held, peak)
    assert folds[-1].ranges["refit"] == (range(0, len(folds[-1].refit)),) and len(folds[-1].refit) > 990_000


@pytest.mark.parametrize("limit, text", [("rows", "a" * 20), ("line", "x")])
def test_messages_stay_short(tmp_path, monkeypatch, limit, text):
    if limit == "rows": monkeypatch.setattr(files, "MAX_ROWS", 10)
    content = "ts,a\n" + "1,2\n" * 20 if limit == "rows" else "a" * 60_000 + ",b,c\n1,2,3\n"
    with pytest.raises(sources.SourceError) as refused: sources.read(make(tmp_path, {"x.csv": content}) / "x.csv")
    assert len(str(refused.value)) < 700


# --- what the notebook of sources relies on ----------------------------------------------------------------------------------


def hourly_bars(begin: str, closes) -> pd.DataFrame:
    "Bars as a reader returns them, with `is_splice`."
    times = pd.date_range(begin, periods=len(closes), freq="h", tz="UTC")
    prices_of = {c: np.asarray(closes, float) for c in ("open", "high", "low", "close")}
    return pd.DataFrame(dict(value_time=times, available_at=times + pd.Timedelta("1h"), **prices_of, volume=10., is_splice=False))


def test_a_close_is_carried_for_seven_days_only():
    first, later = hourly_bars("2025-01-01", [93150, 93160]), hourly_bars("2025-01-10", [93150, 93160])
    filled = sources.fill_bars(pd.concat([first, later]))
    assert filled.loc[utc("2025-01-01 03:00"), [*sources.BAR_COLUMNS, "is_filled"]].tolist() == [93160.] * 4 + [0., True]
    assert filled["close"].isna().sum() == 9 * 24 - 2 - 7 * 24


def test_a_forgotten_month_is_a_gap_and_a_snapshot_is_not_used(tmp_path):
    days = pd.date_range("2023-05-28", periods=34, freq="D")
    place = make(tmp_path, {"BTCUSDT-1h-2023-05.csv": klines("2023-05-01", prices(31 * 24, 27000)), "btc.csv": chain("2023-05-28", 34, price=27000.),
                            "BTCUSDT-1h-2023-07.csv": klines("2023-07-01", prices(48, 30000)), "eth.csv": chain("2023-05-28", 34, 2.5, 67500.),
                            "DX-Y.NYB_0530.csv": quotes(days[:3], 104., last=104.7), "DX-Y.NYB.csv": quotes(days[:30], 104.)})
    panel = sources.load_panel(place)
    assert not (panel["dxy"] == 104.7).any() and panel["tx_count"].dropna().lt(4e5).all()
    assert sources.price_gaps(panel).astype(str).values.tolist() == [["2023-06-01 00:00:00+00:00", "2023-07-01 01:00:00+00:00", "720"]]
    assert sources.price_gaps(panel.drop(columns="is_filled"))["begin"].tolist() == [utc("2023-06-08 00:00")]


@pytest.mark.parametrize("contents, message", [
    ({"DGS10.csv": fred(["2024-01-12"])}, "holds no hourly bars"), ({"odd.csv": "a,b,c\n1,2,3\n"}, "odd.csv, row 1: unknown format")])
def test_a_folder_without_bars_is_refused(tmp_path, contents, message):
    with pytest.raises(sources.SourceError, match=message): sources.load_panel(make(tmp_path, contents))
    with pytest.raises(sources.SourceError, match="no such directory"): sources.load_panel(tmp_path / "nowhere")


def test_a_panel_is_cut_at_start_and_end(tmp_path):
    place = make(tmp_path, {"BTCUSDT-1h-2024-01.csv": klines("2024-01-01", prices(96))})
    assert len(sources.load_panel(place, start=pd.Timestamp("2024-01-02"), end="2024-01-02")) == 24
    with pytest.raises(ValueError, match="no hour from 2030-01-01 on; it covers"): sources.load_panel(place, start="2030-01-01")
    with pytest.raises(ValueError, match="'soon' is not a time"): sources.load_panel(place, start="soon")
    bounds = [sources.slice_bound(t) for t in (None, "2024-01", pd.Timestamp("2024-01-01"), utc("2024-01-01"))]
    assert bounds == [None, "2024-01", *[utc("2024-01-01")] * 2]


def test_the_longest_run_is_found():
    assert sources.longest_run(np.array([True, False, True, True, False])) == [(2, 2)]
    assert sources.longest_run(np.array([False])) == []


def test_a_chart_is_known_until_its_file_ends(data_dir):
    panel = sources.load_panel(data_dir)
    assert panel["utxo_count"].loc[:"2018-01-20"].notna().mean() > .99
    filled = panel["is_filled"].groupby((panel.index - pd.Timedelta("1h")).year).sum()  # by the hour at which a bar opens
    assert filled.loc[[2014, 2015]].tolist() == [5438, 4348]
